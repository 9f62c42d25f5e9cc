"""The peers of the training benchmark: the trainers of transformers and trl as they come, on finished token ids."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import drawn
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from finsa.config import RunConfig
from finsa.data.rows import IGNORE, Row
from finsa.models import adapters, hardware


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times optimizer steps only: no start-up, no saving.

    A GPU works through a queue that the host fills, so no single step can be timed without a wait that slows it down:
    there, the clock runs from the first step that counts to the end of the last one, fetching of rows included.

    Args:
        warmup: steps that do not count.
    """

    def __init__(self, warmup: int = 0) -> None:
        self.seconds, self.steps, self.warmup = 0.0, 0, warmup

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        if not torch.cuda.is_available() or state.global_step == self.warmup:
            hardware.synchronize()
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        if state.global_step <= self.warmup:
            return
        self.steps += 1
        if not torch.cuda.is_available():
            self.seconds += time.perf_counter() - self.started
        elif state.global_step == state.max_steps:
            hardware.synchronize()
            self.seconds = time.perf_counter() - self.started


def transformers(
    cfg: RunConfig, tokenizer: Any, rows: list[Row], dtype: torch.dtype = torch.float32, clock: Clock | None = None
) -> float:
    """One pass of the stock Trainer of transformers: logits at all positions, labels at the completion.

    Args:
        cfg: as for `adapted`.
        tokenizer: pads.
        rows: finished rows.
        dtype: of the weights; products are computed in it.
        clock: times the steps.
    """
    clock = clock or Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            adapted(cfg, dtype),
            TrainingArguments(**common(cfg, folder), bf16=False),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


def common(cfg: RunConfig, folder: str) -> dict[str, Any]:
    """Arguments that all stock trainers get."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": cfg.train.micro_batch_size,
        "learning_rate": cfg.train.learning_rate,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def adapted(cfg: RunConfig, dtype: torch.dtype) -> Any:
    """The model with a fresh adapter; the same weights at every call."""
    assert cfg.method.adapter is not None
    backbone = drawn.on_device(cfg.model, dtype)
    names = adapters.resolve_targets(backbone, cfg.model, cfg.method.adapter)
    torch.manual_seed(0)
    return get_peft_model(backbone, LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM"))


def trl_trainer(
    cfg: RunConfig,
    tokenizer: Any,
    rows: list[Row],
    settings: dict[str, Any],
    folder: str,
    dtype: torch.dtype = torch.float32,
) -> SFTTrainer:
    """The trl trainer of an arm, on finished token ids."""
    dataset = Dataset.from_dict(
        {
            "input_ids": [row["input_ids"] for row in rows],
            "completion_mask": [[int(label != IGNORE) for label in row["labels"]] for row in rows],
            "length": [len(row["input_ids"]) for row in rows],
        }
    )
    config = SFTConfig(**{**common(cfg, folder), "completion_only_loss": True, **settings})
    trainer = SFTTrainer(adapted(cfg, dtype), args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl(
    cfg: RunConfig,
    tokenizer: Any,
    rows: list[Row],
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    clock: Clock | None = None,
) -> float:
    """One pass of stock trl; see `transformers` for the arguments."""
    clock = clock or Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(cfg, tokenizer, rows, settings, folder, dtype)
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds
