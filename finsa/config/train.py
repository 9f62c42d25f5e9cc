"""The section ``train``: schedule, batches, checkpoints and monitoring of a training run."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import TypeAdapter, field_validator, model_validator
from pydantic.types import ByteSize, NonNegativeFloat, PositiveFloat, PositiveInt

from finsa.config.base import Measure, Name, Section, Toggle, ValueMeasure

_BYTES: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


class Train(Section):
    """Schedule, batches, checkpoints and monitoring of a training run.

    Batch sizes count sequences; gradient accumulation is batch_size / micro_batch_size / number of processes.

    Args:
        strategy: for several processes: ``ddp``: each has the whole model; ``fsdp``: each has a shard of every layer
            (FSDP2, Zhao et al. 2023); ``deepspeed``: ZeRO (Rajbhandari et al. 2020).
        micro_batch_size: maximum number of sequences per forward pass and process; if it does not divide batch_size,
            the largest size that does is used, unless that is less than half of it.
        memory: memory budget per process, such as 16GiB; the micro-batch is the largest one estimated to fit. null:
            the configured micro-batch is used.
        calibrate: fit a temperature on the validation rows that the log-probabilities are divided by wherever
            probabilities are reported: by the run, prediction, service and exports; predicted labels do not change.
    """

    name: Name
    strategy: Literal["single", "ddp", "fsdp", "deepspeed"]
    process_timeout: PositiveFloat
    deepspeed: dict[str, Any]
    epochs: PositiveFloat
    max_steps: PositiveInt | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    learning_rate: PositiveFloat
    schedule: Literal["cosine", "linear", "constant"]
    warmup: NonNegativeFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat
    group_by_length: bool
    shared_prefix: Toggle
    packing: Toggle
    gradient_checkpointing: Toggle
    memory: str | None
    validate_every: PositiveInt | None
    validation_rows: PositiveInt | None
    select_by: Literal["loss", "macro_f1", "weighted_f1", "accuracy", "cost", "least_cost"] | Measure | ValueMeasure
    patience: PositiveInt | None
    keep_checkpoints: PositiveInt
    log_every: PositiveInt
    score_tokens: PositiveInt
    calibrate: bool
    progress_seconds: PositiveFloat | None
    heartbeat_seconds: PositiveFloat | None
    stall_seconds: PositiveFloat | None
    stall_ends: bool
    threads: PositiveInt | None
    matmul_precision: Literal["auto", "highest", "high", "medium"]

    def memory_bytes(self) -> int | None:
        """The memory budget in bytes: 1 GiB is 2^30, 1 GB is 10^9."""
        return None if self.memory is None else int(_BYTES.validate_python(self.memory))

    @field_validator("memory", mode="before")
    @classmethod
    def _check_memory(cls, memory: Any) -> Any:
        if memory is not None and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", str(memory)):
            raise ValueError("needs a number and a unit, such as 16GiB or 800MiB")
        return memory

    @model_validator(mode="before")
    @classmethod
    def _fit_micro_batch(cls, values: Any) -> Any:
        batch, most = (values.get("batch_size"), values.get("micro_batch_size")) if isinstance(values, dict) else (0, 0)
        if type(batch) is int and type(most) is int and batch > 0 and most > 0:
            return {**values, "micro_batch_size": divisor(batch, most)}
        return values

    @model_validator(mode="after")
    def _check(self) -> Train:
        if self.batch_size % self.micro_batch_size:
            near = [
                next((size for size in sizes if size % divisor(size, self.micro_batch_size) == 0), None)
                for sizes in (range(self.batch_size - 1, 0, -1), range(self.batch_size + 1, 2 * self.batch_size))
            ]
            raise ValueError(
                f"batch_size {self.batch_size} cannot be divided into micro-batches of about micro_batch_size "
                f"{self.micro_batch_size}; the nearest that can are {near[0]} and {near[1]}"
            )
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup {self.warmup} is neither a fraction below 1 nor a whole number of steps")
        return self


def divisor(batch: int, at_most: int) -> int:
    """The largest micro-batch size that divides a batch: at most the given size, and at least half of it.

    Returns:
        The whole batch if it is no larger than the given size; the given size if nothing in this range divides it.
    """
    if batch <= at_most:
        return batch
    return next((size for size in range(at_most, (at_most - 1) // 2, -1) if batch % size == 0), at_most)
