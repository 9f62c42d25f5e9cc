"""Training in several processes: the arguments of a strategy, and one order of rows for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from typing import Any, overload

import numpy as np
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from finsa.config import Train
from finsa.data.rows import CHUNK, Row
from finsa.errors import ConfigError, Problem
from finsa.models.classifier import Classifier, causal
from finsa.runs import processes


def arguments(train: Train, model: Any) -> dict[str, Any]:
    """The trainer's arguments for ``train.strategy``.

    Raises:
        ConfigError: where DeepSpeed is not installed.
    """
    if train.strategy == "deepspeed":
        if util.find_spec("deepspeed") is None:
            text = "deepspeed is not installed: pip install 'finsa[deepspeed]', or choose train.strategy=fsdp"
            raise ConfigError([Problem("train.strategy", text)])
        return {"deepspeed": dict(train.deepspeed)}
    if train.strategy == "fsdp":
        body = causal(model.backbone if isinstance(model, Classifier) else model)
        return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": sorted(body._no_split_modules)}}
    return {"ddp_find_unused_parameters": False}


def allow_fsdp_on_cpu(trainer: Any) -> None:
    """Let accelerate shard a model on CPUs too, where FSDP2 works but accelerate does not offer it."""
    plugin, state = trainer.args.fsdp_plugin_args, trainer.accelerator.state
    if plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True


@dataclass(frozen=True)
class FilledRows(Sequence[Row]):
    """Rows followed by blank ones of weight 0; they are made on access, so that millions of them fit into memory.

    Args:
        rows: the real ones.
        blank: the blank one.
        missing: number of blank ones.
    """

    rows: Sequence[Row]
    blank: Row
    missing: int

    def __len__(self) -> int:
        return len(self.rows) + self.missing

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        """One row, or a list of them."""
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        return Row(**{"weight": 1.0, **self.rows[at]}) if at < len(self.rows) else self.blank


def fill_up(rows: Sequence[Row], each: int) -> Sequence[Row]:
    """Add blank rows, so that an epoch's last step has as many for every process; accelerate would repeat real ones.

    Args:
        rows: all of them; they are not copied.
        each: rows per optimiser step and process.
    """
    missing = -len(rows) % (each * processes.world())
    if not missing:
        return rows
    shortest = min(rows[:CHUNK], key=lambda row: len(row["input_ids"]))  # costs little to compute
    return FilledRows(rows, Row(**{**shortest, "weight": 0.0}), missing)


class SameOrder(Sampler[int]):
    """The order of the rows in an epoch: process 0's in every process, and the blank rows last.

    Each process draws an order, and they differ once dropout has drawn different amounts of random numbers.

    Args:
        sampler: draws the order of the real rows.
        size: number of rows, blank ones included.
    """

    def __init__(self, sampler: Any, size: int) -> None:
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= processes.world()  # the rows of a whole step are of similar length, as in one process
        self.sampler, self.size = sampler, size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.fromiter(self.sampler, dtype=np.int64)
        order *= processes.first()
        yield from processes.total(order).tolist()
        yield from range(len(order), self.size)


def same_order(sampler: Any, size: int) -> Any:
    """The sampler of a fit of `size` rows; a single process keeps its own."""
    return SameOrder(sampler, size) if processes.together() else sampler
