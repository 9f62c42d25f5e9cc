"""Training in several processes: the arguments of a strategy, and the same order of rows in all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from finsa.config import Train
from finsa.data.rows import CHUNK, LazyRows, Row
from finsa.errors import ConfigError, Problem
from finsa.models.classifier import Classifier, unwrap_peft
from finsa.runs import processes


def arguments(train: Train, model: Any) -> dict[str, Any]:
    """Training arguments of transformers for ``train.strategy``.

    Raises:
        ConfigError: if DeepSpeed is not installed.
    """
    if train.strategy == "deepspeed":
        if util.find_spec("deepspeed") is None:
            text = "deepspeed is not installed: pip install 'finsa[deepspeed]', or choose train.strategy=fsdp"
            raise ConfigError([Problem("train.strategy", text)])
        return {"deepspeed": dict(train.deepspeed)}
    if train.strategy == "fsdp":
        body = unwrap_peft(model.backbone if isinstance(model, Classifier) else model)
        return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": sorted(body._no_split_modules)}}
    return {"ddp_find_unused_parameters": False}


def allow_fsdp_on_cpu(trainer: Any) -> None:
    """Enable FSDP in accelerate on CPUs too: FSDP2 supports them, but accelerate does not offer it there."""
    plugin, state = trainer.args.fsdp_plugin_args, trainer.accelerator.state
    if plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True


@dataclass(frozen=True)
class PaddedRows(LazyRows):
    """Rows followed by padding rows of weight 0.

    Args:
        rows: the real rows.
        padding: the row that is appended.
        missing: how many times it is appended.
    """

    rows: Sequence[Row]
    padding: Row
    missing: int

    def __len__(self) -> int:
        return len(self.rows) + self.missing

    def row(self, at: int) -> Row:
        """One row; real ones have an explicit weight, as the padding does."""
        return Row(**{"weight": 1.0, **self.rows[at]}) if at < len(self.rows) else self.padding


def pad_rows(rows: Sequence[Row], each: int) -> Sequence[Row]:
    """Append padding rows, so that all processes get equally many in an epoch's last step, and no row is repeated.

    Args:
        rows: all rows; they are not copied.
        each: rows per optimizer step and process.
    """
    missing = -len(rows) % (each * processes.world_size())
    if not missing:
        return rows
    shortest = min(rows[:CHUNK], key=lambda row: len(row["input_ids"]))  # costs little to compute
    return PaddedRows(rows, Row(**{**shortest, "weight": 0.0}), missing)


class SameOrder(Sampler[int]):
    """The order of the rows in an epoch: that of process 0 in every process, and the padding rows last.

    Each process draws an order; these would differ once dropout has consumed different amounts of random numbers.

    Args:
        sampler: draws the order of the real rows.
        size: number of rows, including padding rows.
    """

    def __init__(self, sampler: Any, size: int) -> None:
        if isinstance(sampler, LengthGroupedSampler):
            # The rows of a whole step are of similar length, as in a single process.
            sampler.batch_size *= processes.world_size()
        self.sampler, self.size = sampler, size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.fromiter(self.sampler, dtype=np.int64)
        order *= processes.is_main()
        yield from processes.all_reduce(order).tolist()
        yield from range(len(order), self.size)


def same_order(sampler: Any, size: int) -> Any:
    """Wrap the sampler of a fit of `size` rows, so that all processes use one order; unchanged in a single process."""
    return SameOrder(sampler, size) if processes.is_distributed() else sampler
