"""What a fit needs where several processes share it: the strategy's arguments, and an order of rows that all follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from importlib import util
from typing import Any, overload

import numpy as np
from accelerate.utils import DistributedType
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from finsa.config import Train
from finsa.data.rows import CHUNK, Row
from finsa.errors import ConfigError, Problem
from finsa.models.classifier import Classifier, causal
from finsa.runs import processes


def arguments(train: Train, model: Any) -> dict[str, Any]:
    """The trainer's arguments that carry out ``train.strategy``.

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


def allow_on_cpu(trainer: Any) -> None:
    """Let accelerate divide a model on processors too, where FSDP2 computes but accelerate does not offer it."""
    plugin, state = trainer.args.fsdp_plugin_args, trainer.accelerator.state
    if plugin is None or state.distributed_type != DistributedType.MULTI_CPU:
        return
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


@dataclass(frozen=True)
class Filled(Sequence[Row]):
    """Rows followed by blank ones, which have weight 0; made when they are asked for, so that millions of them fit.

    Args:
        rows: the real ones.
        blank: the blank one.
        lacking: number of blank ones.
    """

    rows: Sequence[Row]
    blank: Row
    lacking: int

    def __len__(self) -> int:
        return len(self.rows) + self.lacking

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


def filled(rows: Sequence[Row], each: int) -> Sequence[Row]:
    """Add blank rows, so that every process has as many in an epoch's last step; accelerate would repeat real ones.

    Args:
        rows: all of them; they are not copied.
        each: rows per optimiser step and process.
    """
    lacking = -len(rows) % (each * processes.world())
    if not lacking:
        return rows
    short = min(rows[:CHUNK], key=lambda row: len(row["input_ids"]))  # costs little to compute
    return Filled(rows, Row(**{**short, "weight": 0.0}), lacking)


class Order(Sampler[int]):
    """The order of the rows in an epoch, process 0's in every process, and the blank rows last.

    Each process draws its own order, which is the same until dropout has drawn other amounts of random numbers.

    Args:
        inner: gives the order of the real rows.
        size: of the data, blank rows included.
    """

    def __init__(self, inner: Any, size: int) -> None:
        if isinstance(inner, LengthGroupedSampler):
            inner.batch_size *= processes.world()  # rows of a whole step are of like length, as in one process
        self.inner, self.size = inner, size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.fromiter(self.inner, dtype=np.int64)
        order *= processes.first()
        yield from processes.total(order).tolist()
        yield from range(len(order), self.size)


def order(inner: Any, rows: Sized) -> Any:
    """The sampler of a fit; one process keeps its own."""
    return Order(inner, len(rows)) if processes.together() else inner
