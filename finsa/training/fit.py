"""Fit a model to rows: dataset, layout of the batches, training arguments, training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig

from finsa.config import LOWER_IS_BETTER, Train
from finsa.data.rows import CHUNK, Row
from finsa.errors import Stopped
from finsa.runs import processes, signals
from finsa.training import checkpoints, distributed, layout, preflight, progress
from finsa.training import objective as objectives
from finsa.training.batches import Collator, Packer, Step, StepSplitter
from finsa.training.objective import Objective
from finsa.training.trainer import FinsaTrainer
from finsa.training.watchdog import Watch

Record = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

    Args:
        steps: number of optimizer steps.
        best: the best validation score, of the metric that selects the checkpoint.
        best_validation: number of the validation with the best score, among those of this process; None: it was an
            earlier one, or there was none.
        seconds: wall time of the training, validation included.
        tokens: real tokens seen by all processes, padding not counted.
        rows: rows seen by all processes.
        batching: how rows were grouped into micro-batches.
        throughput: of all processes, without validation and saving; see `Meter.facts`.
    """

    steps: int
    best: float | None
    best_validation: int | None
    seconds: float
    tokens: int
    rows: int
    batching: dict[str, Any]
    throughput: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """The entries of ``run.json``."""
        return {
            "steps": self.steps,
            "best_validation": self.best,
            "training_seconds": round(self.seconds, 2),
            "training_tokens": self.tokens,
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
            "rows_per_second": round(self.rows / max(self.seconds, 1e-9), 2),
            "batching": self.batching,
            "throughput": self.throughput,
        }


def fit(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    validate: Callable[[torch.nn.Module], dict[str, float]],
    train: Train,
    seed: int,
    folder: Path,
    record: Record,
    callbacks: Sequence[TrainerCallback] = (),
    objective: Objective | None = None,
    lr_ratio: float = 1.0,
    log: Path | None = None,
    watch: Watch | None = None,
    identify: Callable[[int], str] = str,
) -> Fitted:
    """Train a model, and load its best checkpoint at the end.

    Args:
        model: its trainable parameters require gradients.
        tokenizer: has the padding token id.
        rows: tokenized rows, which are used unchanged.
        validate: computes the metrics that select the checkpoint.
        train: schedule and batches.
        seed: for the order of rows and dropout.
        folder: of the checkpoints; training is resumed from an existing one.
        record: receives log records.
        callbacks: further callbacks.
        objective: None: the cross-entropy of labeled tokens.
        lr_ratio: learning rate of LoRA's B over that of A.
        log: the file that `record` appends to; it is truncated to its length at the checkpoint.
        watch: heartbeat and progress of the run; None: of this fit, with the heartbeat in the parent of `folder`.
        identify: returns the id of a row by its number, for messages.

    Raises:
        FinsaError: for a loss that is not finite, or a checkpoint that cannot be written; `Stopped` after a signal.
    """
    objective, watch = objective or objectives.tokens(), watch or Watch(train, folder.parent)
    resumed = resume_from(folder, log)
    real, accumulation = len(rows), preflight.accumulation_steps(train, processes.world_size())
    if processes.world_size() > 1:
        rows = distributed.pad_rows(rows, train.micro_batch_size * accumulation)

    # Layout of the batches: a common prefix of all rows is shared, and rows of different length are packed.
    common = layout.CommonPrefix()
    dataset = _dataset(rows, common)
    prefix = layout.plan_prefix(common, model, train, len(objective.suffix))
    splitter = StepSplitter(Collator(tokenizer.pad_token_id, objective.suffix, prefix.used), train.micro_batch_size)
    lengths = np.asarray(dataset.data["length"])
    packing = layout.plan_packing(lengths, model, train, splitter, prefix.used, objective.packable)
    if packing.used:
        splitter.collate = Packer(prefix.used)
    bar = progress.ProgressCallback(lambda: trainer.meter, record, watch.display)
    sharing = f"shared prefix of {prefix.used} tokens" if prefix.used else f"no shared prefix ({prefix.reason})"
    packed = "packed" if packing.used else "padded"
    bar.console.print(f"  micro-batches of {splitter.rows} rows, {packed}; {sharing}", highlight=False)
    batching = {
        "micro_batch": {"rows": splitter.rows},
        "shared_prefix": asdict(prefix),
        "packing": asdict(packing),
    }

    def on_smaller(sizes: dict[str, float]) -> None:
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sizes.items())
        bar.console.print(f"  step {bar.step + 1}: out of memory; from here on {words}", highlight=False)
        record(bar.step, {"out_of_memory": 1, **sizes})

    patience = [EarlyStoppingCallback(train.patience)] if train.patience else []
    with signals.deferred() as stopped, watch.watching(), watch.stepping(), bar.closing():
        trainer = FinsaTrainer(
            model=model,
            args=_arguments(train, accumulation, real, seed, folder, **distributed.arguments(train, model)),
            train_dataset=dataset,
            eval_dataset=dataset.select([0]),  # the trainer requires one; `validate` has the validation split
            data_collator=Step,
            processing_class=tokenizer,
            callbacks=[watch, bar, *patience, *callbacks],
            objective=objective,
            splitter=splitter,
            validate=watch.pausing(validate),
            pause=watch.pause,
            rows=real,
            lr_ratio=lr_ratio,
            log_file=log,
            resumed=resumed,
            stopped=lambda: processes.maximum(stopped()),
            identify=identify,
            on_smaller=on_smaller,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
        if (number := trainer.stopped()) is not None:  # a signal after the last step was saved
            raise Stopped(number, f"step {trainer.state.global_step} is saved")
    state, validated = trainer.state, trainer.validated
    return Fitted(
        steps=state.global_step,
        best=state.best_metric if state.best_metric is not None and math.isfinite(state.best_metric) else None,
        best_validation=validated.index(step) if (step := state.best_global_step) in validated else None,
        seconds=trainer.seconds,
        tokens=int(processes.all_reduce(np.array([int(trainer.tokens)]))[0]),
        rows=round(min(state.epoch or 0, train.epochs) * real),
        batching={**batching, **trainer.sizes(), "micro_batch_halved": trainer.halved},
        throughput=trainer.meter.facts(),
    )


def resume_from(folder: Path, log: Path | None) -> checkpoints.Checkpoint | None:
    """The checkpoint to resume from, the same in all processes; the log is truncated to it."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = None
    if processes.is_main():
        checkpoint = checkpoints.newest(folder, lambda text: print(text, flush=True))
        if log is not None:
            checkpoints.rewind(log, folder, checkpoint)
    exists = processes.broadcast(checkpoint is not None)
    if exists and not processes.is_main():
        checkpoint = checkpoints.newest(folder, lambda text: None)
    return checkpoint


def _dataset(rows: Sequence[Row], common: layout.CommonPrefix) -> Dataset:
    """Write rows to an Arrow table, chunk by chunk: as Python lists, millions of them would not fit into memory."""
    kinds = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32(), "row": pa.int64()}
    optional = {"weight": pa.float32(), "target": pa.int32(), "text_span": pa.list_(pa.int32()), "domain": pa.int32()}
    optional |= {"values": pa.list_(pa.float32()), "rejected": pa.int32(), "reference": pa.list_(pa.float32())}
    schema = pa.schema(kinds | {name: kind for name, kind in optional.items() if name in rows[0]})
    parts = []
    for start in range(0, len(rows), CHUNK):
        taken = rows[start : start + CHUNK]
        common.add(taken)
        chunk = [{**row, "length": len(row["input_ids"]), "row": number} for number, row in enumerate(taken, start)]
        parts.append(pa.Table.from_pylist(chunk, schema=schema))
    return Dataset(pa.concat_tables(parts))


def _arguments(train: Train, accumulation: int, rows: int, seed: int, folder: Path, **more: Any) -> SFTConfig:
    return SFTConfig(
        **shared_arguments(train, seed, folder),
        # transformers lets max_steps lengthen a training beyond its epochs; here it only shortens it
        max_steps=preflight.optimizer_steps(train, rows, processes.world_size()) if train.max_steps else -1,
        per_device_train_batch_size=train.micro_batch_size * accumulation,
        gradient_accumulation_steps=1,  # a batch is a whole step, which the trainer splits
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        length_column_name="length",
        fp16=False,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **more,
    )


def shared_arguments(train: Train, seed: int, folder: Path) -> dict[str, Any]:
    """Training arguments of every trainer: schedule, optimizer, validation and checkpoints."""
    every = {"eval_steps": train.validate_every, "save_steps": train.validate_every} if train.validate_every else {}
    strategy = "steps" if train.validate_every else "epoch"
    return {
        "output_dir": str(folder),
        "num_train_epochs": train.epochs,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup,  # transformers 5: below 1 it is a share of all steps
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch_fused",
        "seed": seed,
        "data_seed": seed,
        "activation_checkpointing": train.gradient_checkpointing is True,  # the memory plan has resolved `auto`
        "bf16": False,  # the weights already have their dtype; autocast would cast them at every step
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_strategy": strategy,
        "save_strategy": strategy,
        **every,
        "save_total_limit": train.keep_checkpoints,
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{train.select_by}",
        "greater_is_better": train.select_by not in LOWER_IS_BETTER,
        "logging_steps": train.log_every,
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
    }
