"""Fit a model to rows: the trainer's arguments, the checkpoint to go on from, the best one at the end."""

from __future__ import annotations

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

from finsa.config import Train
from finsa.data.rows import CHUNK, Row
from finsa.errors import ConfigError, Problem
from finsa.runs import processes, signals
from finsa.training import (
    checkpoints,
    compiling,
    distributed,
    packing,
    prefix,
    progress,
    schedule,
)
from finsa.training import objective as objectives
from finsa.training.batching import Cutter, Step
from finsa.training.collate import Collator, Packer
from finsa.training.objective import Objective
from finsa.training.recovery import Recovery
from finsa.training.trainer import FinsaTrainer, Validate
from finsa.training.watchdog import Watch


@dataclass(frozen=True)
class Fitted:
    """What came of a fit.

    Args:
        steps: optimiser steps made.
        best: the best validation score, by the measure that selects.
        best_validation: number of the validation that the weights are of, among those of this sitting; None: of an
            earlier one, or there was none.
        seconds: wall time of the training, validation included.
        tokens: real tokens seen by all processes, padding not counted.
        rows: rows seen by all processes.
        batching: how micro-batches were made.
        throughput: figures of the training time of all processes, validation and saving left out; see `Meter.facts`.
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
        """What the run's record keeps."""
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
    validate: Validate,
    train: Train,
    seed: int,
    folder: Path,
    record: Callable[[int, dict[str, float]], None],
    callbacks: Sequence[TrainerCallback] = (),
    objective: Objective | None = None,
    lr_ratio: float = 1.0,
    log: Path | None = None,
    watch: Watch | None = None,
    identify: Callable[[int], str] = str,
) -> Fitted:
    """Train a model and leave it at its best checkpoint.

    Args:
        model: with the parameters that learn marked.
        tokenizer: its pad id fills batches.
        rows: finished rows; their tokens are trained on as they are.
        validate: gives the numbers that choose the checkpoint; train: the schedule; seed: of order and dropout.
        folder: where checkpoints go; a checkpoint there is gone on from.
        callbacks: further ones; objective: what is made small, None: the cross-entropy of labelled tokens.
        lr_ratio: learning rate of LoRA's B over that of A.
        record: takes log records; log: the file that it appends to; what stands in it behind the checkpoint is cut off.
        watch: of the run: heartbeat and progress; None: of this fit, its heartbeat in the folder above `folder`.
        identify: gives the id of a row by its number, for a message.

    Raises:
        FinsaError: for a loss that is no number, or a checkpoint that cannot be written; `Stopped` after a signal.
    """
    resumed, watch = _resumed(folder, log), watch or Watch(train, folder.parent)
    objective = objective or objectives.tokens()
    dataset, cut, batching = _prepared(rows, model, tokenizer.pad_token_id, train, objective)
    shown = progress.ProgressCallback(lambda: trainer.meter, record, watch.display)
    shown.console.print(f"  {_told(batching)}", highlight=False)
    with signals.deferred() as stopped, watch.watching(), watch.stepping(), shown.closing():
        trainer = FinsaTrainer(
            model=model,
            args=_arguments(train, _most(train, len(rows)), seed, folder, **distributed.arguments(train, model)),
            train_dataset=dataset,
            eval_dataset=dataset.select([0]),  # the validation split is read by `validate`; the trainer wants one
            data_collator=Step,
            processing_class=tokenizer,
            callbacks=[watch, shown, *_patience(train), *callbacks],
            validate=watch.pausing(validate),
            saving=watch.pause,
            objective=objective,
            lr_ratio=lr_ratio,
            recovery=_recovery(cut, train, shown, record),
            rows=len(rows),
            log=log,
            resumed=resumed,
            stopped=lambda: processes.any_of(stopped()),
            identify=identify,
        )
        _train(trainer, resumed, train.compile)
    return _fitted(trainer, train, len(rows), batching, shown)


def _patience(train: Train) -> list[TrainerCallback]:
    return [EarlyStoppingCallback(train.patience)] if train.patience else []


def _fitted(
    trainer: FinsaTrainer, train: Train, rows: int, batching: dict[str, Any], shown: progress.ProgressCallback
) -> Fitted:
    if train.compile:
        batching["first_step_seconds"] = trainer.first_step
        if trainer.first_step is not None:
            done = trainer.meter.done
            shown.console.print(f"  {compiling.told(trainer.first_step, done.steps, done.seconds)}", highlight=False)
    state, validated = trainer.state, trainer.validated
    seen = round(min(state.epoch or 0, train.epochs) * rows)
    return Fitted(
        steps=state.global_step,
        best=state.best_metric,
        best_validation=validated.index(step) if (step := state.best_global_step) in validated else None,
        seconds=trainer.seconds,
        tokens=_tokens(trainer),
        rows=seen,
        batching={**batching, **trainer.recovery.facts()},
        throughput=trainer.meter.facts(),
    )


def _recovery(
    cut: Cutter,
    train: Train,
    shown: progress.ProgressCallback,
    record: Callable[[int, dict[str, float]], None],
) -> Recovery:
    def told(sizes: dict[str, float]) -> None:
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sizes.items())
        shown.console.print(f"  step {shown.step + 1}: out of memory; from here on {words}", highlight=False)
        record(shown.step, {"out_of_memory": 1, **sizes})

    per_process = train.batch_size // processes.world()
    return Recovery(cut, per_process, told, alone=processes.world() == 1)


def _prepared(
    rows: Sequence[Row], model: Any, pad: int, train: Train, objective: Objective
) -> tuple[Dataset, Cutter, dict[str, Any]]:
    """The rows as a table, filled up for several processes, and how steps are cut; see `_cutter`."""
    common = prefix.Common()
    if processes.world() > 1:
        rows = distributed.filled(rows, train.micro_batch_size * schedule.accumulation(train, processes.world()))
    dataset = _dataset(rows, common)
    plan = prefix.plan(common, model, train, len(objective.suffix))
    cut, batching = _cutter(pad, plan, train, objective)
    packs = packing.plan(np.asarray(dataset.data["length"]), model, train, cut, objective.packs)
    if packs.used:
        cut.collate = Packer(pad, packs.line, plan.used)
    return dataset, cut, {**batching, "packing": asdict(packs)}


def _resumed(folder: Path, log: Path | None) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from, the same in all processes, with the log cut back to it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = None
    if processes.first():
        found = checkpoints.newest(folder, lambda text: print(text, flush=True))
        if log is not None:
            checkpoints.rewind(log, folder, found)
    there = processes.agreed(found is not None)
    if there and not processes.first():
        found = checkpoints.newest(folder, lambda text: None)
    return found


def _train(trainer: FinsaTrainer, resumed: checkpoints.Checkpoint | None, compiled: bool) -> None:
    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)
    layers = compiling.layers(trainer.model) if compiled else []
    try:
        trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
    finally:
        compiling.undo(layers)


def _tokens(trainer: FinsaTrainer) -> int:
    """Real tokens seen by all processes."""
    return int(processes.total(np.array([int(trainer.tokens)]))[0])


def _cutter(pad: int, plan: prefix.Prefix, train: Train, objective: Objective) -> tuple[Cutter, dict[str, Any]]:
    """How a step is cut and its rows are put together, and what the run's record says about it.

    Raises:
        ConfigError: for ways that do not go with the objective or the launcher.
    """
    if train.batch_tokens is not None and train.strategy in ("fsdp", "deepspeed"):
        text = "processes that share a sharded model need equally many micro-batches; set train.batch_tokens=null"
        raise ConfigError([Problem("train.batch_tokens", text)])
    cut = Cutter(Collator(pad, objective.suffix, plan.used), train.micro_batch_size, train.batch_tokens)
    size = {"rows": cut.rows} if cut.tokens is None else {"padded_tokens": cut.tokens}
    return cut, {"micro_batch": size, "shared_prefix": asdict(plan)}


def _told(batching: dict[str, Any]) -> str:
    """One line for the terminal."""
    size, shared = next(iter(batching["micro_batch"].items())), batching["shared_prefix"]
    used = f"shared prefix of {shared['used']} tokens" if shared["used"] else f"no shared prefix ({shared['reason']})"
    packed = "packed" if batching["packing"]["used"] else "side by side"
    return f"micro-batches of {size[1]} {size[0].replace('_', ' ')}, {packed}; {used}"


def _dataset(rows: Sequence[Row], common: prefix.Common) -> Dataset:
    """Put rows into an Arrow table, a chunk at a time: as Python lists, millions of them would not fit."""
    kinds = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32(), "row": pa.int64()}
    further = {"weight": pa.float32(), "target": pa.int32(), "text_span": pa.list_(pa.int32()), "domain": pa.int32()}
    schema = pa.schema(kinds | {name: kind for name, kind in further.items() if name in rows[0]})
    parts = []
    for start in range(0, len(rows), CHUNK):
        taken = rows[start : start + CHUNK]
        common.add(taken)
        chunk = [{**row, "length": len(row["input_ids"]), "row": number} for number, row in enumerate(taken, start)]
        parts.append(pa.Table.from_pylist(chunk, schema=schema))
    return Dataset(pa.concat_tables(parts))


def _most(train: Train, rows: int) -> int:
    """Steps of a training that is to end before its epochs do; to transformers `max_steps` alone would decide."""
    return schedule.steps_of(train, rows, processes.world()) if train.max_steps else -1


def _arguments(train: Train, max_steps: int, seed: int, folder: Path, **further: Any) -> SFTConfig:
    every = {"eval_steps": train.validate_every, "save_steps": train.validate_every} if train.validate_every else {}
    strategy = "steps" if train.validate_every else "epoch"
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        max_steps=max_steps,
        per_device_train_batch_size=train.micro_batch_size * schedule.accumulation(train, processes.world()),
        gradient_accumulation_steps=1,  # a batch is a whole step; the trainer cuts it
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
        logging_nan_inf_filter=False,  # it asks the device for every step's loss; and a loss that is not a number shows
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **every,
        **further,
    )
