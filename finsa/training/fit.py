"""Fit a model to rows: the trainer's arguments, the checkpoint to go on from, the best one at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from finsa.config import Train
from finsa.data.rows import CHUNK, Row
from finsa.training import objective as objectives
from finsa.training import progress, recovery, schedule
from finsa.training.collate import Collator
from finsa.training.objective import Objective
from finsa.training.recovery import Recovery
from finsa.training.trainer import FinsaTrainer, Validate


@dataclass(frozen=True)
class Fitted:
    """What came of a fit.

    Args:
        steps: optimiser steps made.
        best: the best validation score, by the measure that selects.
        seconds: wall time of the training, validation included.
        tokens: real tokens seen by this process, padding not counted.
        rows: rows seen by this process.
        throughput: figures of the training time alone, validation and saving left out; see `Meter.facts`.
        batches: sizes of micro-batch and accumulation at the end.
    """

    steps: int
    best: float | None
    seconds: float
    tokens: int
    rows: int
    throughput: dict[str, float]
    batches: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """What the run's record keeps."""
        return {
            "steps": self.steps,
            "best_validation": self.best,
            "training_seconds": round(self.seconds, 2),
            "training_tokens": self.tokens,
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
            "rows_per_second": round(self.rows / max(self.seconds, 1e-9), 2),
            "throughput": self.throughput,
            **self.batches,
        }


def processes() -> int:
    """Number of training processes: as the launcher says, because they find each other only when training starts."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def fit(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    validate: Validate,
    train: Train,
    seed: int,
    folder: Path,
    record: Callable[[int, dict[str, float]], None],
    callbacks: Sequence[TrainerCallback] = (),
    objective: Objective | None = None,
    lr_ratio: float = 1.0,
) -> Fitted:
    """Train a model and leave it at its best checkpoint.

    Args:
        model: with the parameters that learn marked.
        tokenizer: its pad id fills batches.
        rows: finished rows; their tokens are trained on as they are.
        validate: gives the numbers that choose the checkpoint.
        train: the schedule.
        seed: of order and dropout.
        folder: where checkpoints go; a checkpoint there is gone on from.
        record: takes log records.
        callbacks: further ones of transformers' kind.
        objective: what is made small; None: the cross-entropy of labelled tokens.
        lr_ratio: learning rate of LoRA's B over that of A.
    """
    objective = objective or objectives.tokens()
    dataset = _dataset(rows)
    shown = progress.ProgressCallback(lambda: trainer.meter, record)

    smaller = _recovery(train, len(objective.suffix), shown, lambda: int(trainer.state.global_step))
    stopping = [EarlyStoppingCallback(train.patience)] if train.patience else []
    trainer = FinsaTrainer(
        model=model,
        args=_arguments(train, seed, folder),
        train_dataset=dataset,
        eval_dataset=dataset.select([0]),  # the validation split is read by `validate`; the trainer wants to see one
        data_collator=Collator(tokenizer.pad_token_id, objective.suffix),
        processing_class=tokenizer,
        callbacks=[shown, *stopping, *callbacks],
        validate=validate,
        objective=objective,
        lr_ratio=lr_ratio,
        recovery=smaller,
    )
    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    finally:
        shown.bar.stop()
    return _fitted(trainer, train, len(rows), time.monotonic() - started)


def _fitted(trainer: FinsaTrainer, train: Train, rows: int, seconds: float) -> Fitted:
    state = trainer.state
    return Fitted(
        steps=state.global_step,
        best=state.best_metric,
        seconds=seconds,
        tokens=int(trainer.meter.done.tokens),
        rows=round(min(state.epoch or 0, train.epochs) * rows),
        throughput=trainer.meter.facts(),
        batches=recovery.facts(trainer.recovery),
    )


def _recovery(train: Train, suffix: int, shown: progress.ProgressCallback, step: Callable[[], int]) -> Recovery:
    """What makes micro-batches smaller, and says so on the terminal and in the log."""

    def tell(sizes: dict[str, float]) -> None:
        told = "out of memory: micro-batch {micro_batch_size}, accumulation {accumulation} from here on".format(**sizes)
        shown.console.print(f"  step {step() + 1}: {told}", highlight=False)
        shown.record(step(), {"out_of_memory": 1, **sizes})

    accumulated = schedule.accumulation(train, processes())
    return Recovery(train.micro_batch_size, accumulated, suffix, tell, alone=processes() == 1)


def _dataset(rows: Sequence[Row]) -> Dataset:
    """Put rows into an Arrow table, a chunk at a time: as Python lists, millions of them would not fit."""
    kinds = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32()}
    further = {"weight": pa.float32(), "target": pa.int32(), "text_span": pa.list_(pa.int32()), "domain": pa.int32()}
    schema = pa.schema(kinds | {name: kind for name, kind in further.items() if name in rows[0]})
    parts = []
    for start in range(0, len(rows), CHUNK):
        chunk = [{**row, "length": len(row["input_ids"])} for row in rows[start : start + CHUNK]]
        parts.append(pa.Table.from_pylist(chunk, schema=schema))
    return Dataset(pa.concat_tables(parts))


def _arguments(train: Train, seed: int, folder: Path) -> SFTConfig:
    every = {"eval_steps": train.validate_every, "save_steps": train.validate_every} if train.validate_every else {}
    strategy = "steps" if train.validate_every else "epoch"
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=schedule.accumulation(train, processes()),
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup,  # transformers 5: below 1 it is a share of all steps
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        length_column_name="length",
        gradient_checkpointing=train.gradient_checkpointing is True,  # a plan has settled `auto` where there is one
        bf16=False,  # the weights have their type already; autocast would copy them at every step
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy=strategy,
        save_strategy=strategy,
        save_total_limit=train.keep_checkpoints,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{train.select_by}",
        greater_is_better=train.select_by != "loss",
        logging_steps=train.log_every,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **every,
    )
