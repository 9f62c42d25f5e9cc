"""What a fit needs where several processes share it: the strategy's arguments, and an order of rows that all follow."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from importlib import util
from typing import Any

import numpy as np
from accelerate.utils import DistributedType
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from finsa import processes
from finsa.config import Train
from finsa.data.rows import Row
from finsa.errors import ConfigError, Problem
from finsa.modeling.classifier import Classifier, causal


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


def filled(rows: list[Row], each: int) -> list[Row]:
    """Rows for the trainer: with some of weight 0 behind them, so that the last step of an epoch has as many of them
    for every process; accelerate would repeat real ones.

    Args:
        rows: all of them.
        each: rows per optimiser step and process.
    """
    lacking = -len(rows) % (each * processes.world())
    if not lacking:
        return rows
    blank = Row(**{**min(rows, key=lambda row: len(row["input_ids"])), "weight": 0.0})
    return [Row(**{"weight": 1.0, **row}) for row in rows] + [blank] * lacking


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
