"""An epoch and seconds to macro-F1 on the embedded default: finsa, stock transformers Trainer, stock trl SFTTrainer.

    python benchmarks/epoch.py            four epochs, three turns (minutes)
    python benchmarks/epoch.py --quick    64 rows, one epoch, one turn; nothing is written

Held equal: base weights, LoRA (rank, alpha, targets, dropout of method=lora_response), finished token ids and labels
(answer and end token), batch size, epochs, learning rate, cosine schedule with 10 % warm-up, seed; after every epoch
all are scored by finsa's scorer on the same validation rows, which is not timed. The target is the lowest of the arms'
best macro-F1: every arm reaches it. Seconds are CPU seconds of this process on a CPU, else wall seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finsa.runs.processes import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import kept
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from finsa.config import RunConfig, compose
from finsa.data import dataset, tokenized
from finsa.evaluation import run_results, tables
from finsa.inference.scoring import LabelScorer
from finsa.models import base, factory, hardware, tokenizers
from finsa.training import fit

TRANSFORMERS, TRL, OURS = "transformers Trainer", "trl SFTTrainer, completion only", "finsa"
Epochs = list[tuple[float, float]]  # seconds so far and validation macro-F1, at the end of each epoch


def clock() -> float:
    """Seconds: of the wall on a GPU; of this process on a CPU, which it may share with others."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes training seconds and macro-F1 at the end of every epoch."""

    def __init__(self, judge: Callable[[Any], float]) -> None:
        self.judge, self.epochs, self.seconds, self.timed = judge, [], 0.0, True

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += clock() - self.started

    def on_epoch_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Score."""
        self.epochs.append((self.seconds, self.judge(model)))


def composed(epochs: int, *further: str) -> RunConfig:
    """The embedded default, without early stopping."""
    words = ["train.patience=null", "train.select_by=macro_f1", f"train.epochs={epochs}", *further]
    return compose.build(*compose.compose_values(words), words)


def arms(cfg: RunConfig, job: tokenized.TokenizedDataset, rows: list[Any]) -> dict[str, Callable[[], Epochs]]:
    """The arms, each a function that trains from scratch."""
    prompts = job.prompts("validation")

    def judge(model: Any) -> float:
        scores = LabelScorer(model, job.renderer, cfg.train.score_tokens).score(prompts)
        return run_results.validation(job, scores)["macro_f1"]

    def fresh() -> Any:
        return factory.build(cfg, base.load_base(cfg.model, cfg.seed), job.renderer)

    def ours(folder: str) -> Epochs:
        watch, model = Watch(judge), fresh()
        fit.fit(
            model=model,
            tokenizer=job.renderer.tokenizer,
            rows=rows,
            validate=lambda _: {"loss": 0.0, "macro_f1": 0.0},
            train=cfg.train,
            seed=cfg.seed,
            folder=Path(folder),
            record=lambda step, values: None,
            callbacks=[watch],
        )
        return watch.epochs

    def stock(folder: str, ships: type) -> Epochs:
        watch = Watch(judge)
        trainer = (sft if ships is SFTTrainer else plain)(cfg, job.renderer.tokenizer, rows, fresh(), folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.train()
        return watch.epochs

    def within(run: Callable[..., Epochs], *words: Any) -> Callable[[], Epochs]:
        def one() -> Epochs:
            with tempfile.TemporaryDirectory() as folder:
                return run(folder, *words)

        return one

    return {TRANSFORMERS: within(stock, Trainer), TRL: within(stock, SFTTrainer), OURS: within(ours)}


def settings(cfg: RunConfig, folder: str) -> dict[str, Any]:
    """What both stock trainers are told."""
    return {
        "output_dir": folder,
        "num_train_epochs": cfg.train.epochs,
        "per_device_train_batch_size": cfg.train.batch_size,
        "learning_rate": cfg.train.learning_rate,
        "lr_scheduler_type": cfg.train.schedule,
        "warmup_steps": cfg.train.warmup,
        "seed": cfg.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "use_cpu": not torch.cuda.is_available(),
    }


def plain(cfg: RunConfig, tokenizer: Any, rows: list[Any], model: Any, folder: str) -> Trainer:
    """Stock transformers: logits at all positions, random batches padded to their longest row."""
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    return Trainer(model, TrainingArguments(**settings(cfg, folder)), data_collator=collator, train_dataset=data)


def sft(cfg: RunConfig, tokenizer: Any, rows: list[Any], model: Any, folder: str) -> SFTTrainer:
    """Stock trl; in float32 where bfloat16 is only emulated, else as it ships."""
    data = Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
            for row in rows
        ]
    )
    emulated = {} if base.dtype(cfg.model) == torch.bfloat16 else {"bf16": False}
    config = SFTConfig(**settings(cfg, folder), completion_only_loss=True, **emulated)
    return SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)


def main() -> None:
    """Run the arms in turns, print the table, write ``results/epoch.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--epochs", type=int, default=4, help="fewer of them make another target")
    options.add_argument("overrides", nargs="*", help="of the configuration")
    given = options.parse_args()
    cfg = composed(1 if given.quick else given.epochs, *given.overrides)
    hardware.prepare(cfg.train)
    job = tokenized.build(cfg, dataset.load(cfg.data), tokenizers.load_tokenizer(cfg.model))
    rows = [dict(row) for row in job.training_rows(cfg)[: 64 if given.quick else None]]
    passes, found = arms(cfg, job, rows), {}
    for turn in range(1 if given.quick else given.turns):
        for name, one in passes.items():
            found.setdefault(name, []).append(one())
            print(f"turn {turn + 1}: {name}: {found[name][-1]}", flush=True)
    target = min(max(score for _, score in turn) for turns in found.values() for turn in turns)
    report = {"rows": len(rows), "device": hardware.describe(base.dtype(cfg.model)), "target_macro_f1": target}
    report["arms"] = {name: summary(turns, target) for name, turns in found.items()}
    first = report["arms"][TRANSFORMERS]
    for arm in report["arms"].values():
        arm["ratio"] = round(first["epoch_seconds"] / arm["epoch_seconds"], 2)
    shown = {
        name: f"{arm['epoch_seconds']:8.2f} s per epoch   {arm['ratio']:.2f}x   {arm['seconds_to_target']:8.2f} s to "
        f"macro-F1 {target:.4f}   best {arm['best_macro_f1']}"
        for name, arm in report["arms"].items()
    }
    tables.show_plan(f"embedded default, {len(rows)} rows, {report['device']}", shown)
    if not given.quick:
        kept.write("epoch", report)


def summary(turns: list[Epochs], target: float) -> dict[str, Any]:
    """Medians over the turns."""
    return {
        "epoch_seconds": round(statistics.median(turn[-1][0] / len(turn) for turn in turns), 3),
        "seconds_to_target": round(
            statistics.median(next(at for at, score in turn if score >= target) for turn in turns), 3
        ),
        "best_macro_f1": [round(max(score for _, score in turn), 4) for turn in turns],
        "turns": turns,
    }


if __name__ == "__main__":
    main()
