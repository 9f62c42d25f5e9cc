"""Training speed against stock trl, as ratios in one run.

    python benchmarks/training_step.py            the true Qwen2.5-0.5B shape, random weights (minutes)
    python benchmarks/training_step.py --quick    the embedded shape, to see that it runs

Held equal in all arms: architecture and weights, LoRA (rank 8 on query and value, alpha 16), token ids, labels (a
two-token answer and the end token), batch size, optimiser and learning rate. Lengths are log-normal with median 90, as
headlines and posts are. Arms take turns, so that a machine that slows down slows all of them; medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finsa.launch import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from finsa import composition, provenance
from finsa.config import RunConfig
from finsa.data.rows import IGNORE, Row
from finsa.evaluation import tables
from finsa.modeling import adapters, base, hardware, tokenizers
from finsa.training import fit
from finsa.training.loss import labelled_loss

RESULTS = Path(__file__).resolve().parent / "results"
ANSWER = 3  # two answer tokens and the end token
SHIPS = "trl SFTTrainer as it ships (bf16 autocast, checkpointing)"


def main() -> None:
    """Run the arms, print the table, write ``results/training_step.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="the embedded shape instead of 0.5B; nothing is written")
    options.add_argument("--rows", type=int, default=8, help="examples per pass")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--emulate", action="store_true", help="run the bf16 arm even where bf16 is only emulated")
    given = options.parse_args()
    cfg = composed("tiny" if given.quick else "qwen05b", given.batch)
    hardware.prepare(cfg.train)
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    rows = examples(given.rows, base.architecture(cfg.model).vocab_size)
    equal = compare_gradients(cfg, tokenizer, rows[: given.batch])
    passes = arms(cfg, tokenizer, rows)
    if base.dtype(cfg.model) != torch.bfloat16 and not (given.quick or given.emulate):
        print(
            "bf16 is only emulated here, so trl as it ships (bf16 autocast) is left out; --emulate runs it, very slowly"
        )
        del passes[SHIPS]
    seconds = take_turns(passes, given.turns)
    report = summary(cfg, rows, seconds, equal)
    show(report)
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "training_step.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def composed(model: str, batch: int) -> RunConfig:
    """The configuration of finsa's own arm."""
    overrides = [f"model={model}", "model.weights=random", "method=lora_response", "method.adapter.dropout=0.0"]
    overrides += [
        f"train.batch_size={batch}",
        f"train.micro_batch_size={batch}",
        "train.epochs=1",
        "train.log_every=100",
    ]
    overrides += ["train.warmup=0.0", "train.schedule=constant", "train.learning_rate=1e-4", "train.patience=null"]
    values, choices = composition.compose_values(overrides)
    return composition.build(values, choices, overrides)


def examples(n: int, vocabulary: int) -> list[Row]:
    """Rows of random tokens with log-normal lengths: median 90, at most 400."""
    rng = random.Random(0)
    rows = []
    for _ in range(n):
        length = max(24, min(400, round(math.exp(rng.gauss(math.log(90), 0.5))))) + ANSWER
        ids = [rng.randrange(3, min(vocabulary, 100_000)) for _ in range(length)]
        rows.append(Row(input_ids=ids, labels=[IGNORE] * (length - ANSWER) + ids[-ANSWER:]))
    return rows


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times optimiser steps only: no start-up, no saving."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds += time.perf_counter() - self.started


def arms(cfg: RunConfig, tokenizer: Any, rows: list[Row]) -> dict[str, Callable[[], float]]:
    """The arms, each a function that makes one pass and returns the seconds of its steps."""
    return {
        SHIPS: lambda: stock(cfg, tokenizer, rows, ships=True),
        "trl SFTTrainer, float32, no checkpointing": lambda: stock(cfg, tokenizer, rows, ships=False),
        f"finsa as it ships ({base.dtype(cfg.model)}, length groups)": lambda: ours(cfg, tokenizer, rows),
    }


def adapted(cfg: RunConfig, dtype: torch.dtype) -> Any:
    """The model with a fresh adapter; the same weights at every call."""
    section = cfg.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    assert cfg.method.adapter is not None
    names = adapters.targets(cfg.model, cfg.method.adapter)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    return get_peft_model(base.load_base(section, 0, keep=False), config)


def stock_trainer(cfg: RunConfig, tokenizer: Any, rows: list[Row], ships: bool, folder: str) -> SFTTrainer:
    """The trl trainer of an arm: completion-only loss on finished token ids."""
    dataset = Dataset.from_dict(
        {
            "input_ids": [row["input_ids"] for row in rows],
            "completion_mask": [[int(label != IGNORE) for label in row["labels"]] for row in rows],
        }
    )
    plain = {} if ships else {"bf16": False, "gradient_checkpointing": False}
    config = SFTConfig(
        output_dir=folder,
        completion_only_loss=True,
        per_device_train_batch_size=cfg.train.micro_batch_size,
        learning_rate=cfg.train.learning_rate,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **plain,
    )
    trainer = SFTTrainer(adapted(cfg, torch.float32), args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def stock(cfg: RunConfig, tokenizer: Any, rows: list[Row], ships: bool) -> float:
    """One pass of stock trl."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = stock_trainer(cfg, tokenizer, rows, ships, folder)
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds


def ours(cfg: RunConfig, tokenizer: Any, rows: list[Row]) -> float:
    """One pass of finsa's trainer, on the type that `model.dtype=auto` resolves to here."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        fit.fit(
            model=adapted(cfg, base.dtype(cfg.model)),
            tokenizer=tokenizer,
            rows=rows,
            validate=lambda _: {"loss": 0.0, "macro_f1": 0.0},
            train=cfg.train,
            seed=0,
            folder=Path(folder),
            record=lambda step, values: None,
            callbacks=[clock],
        )
    return clock.seconds


def compare_gradients(cfg: RunConfig, tokenizer: Any, rows: list[Row]) -> dict[str, float]:
    """Loss and gradients of one batch in float32: finsa's against trl's. Relative differences."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = stock_trainer(cfg, tokenizer, rows, ships=False, folder=folder)
        batch = next(iter(trainer.get_train_dataloader()))
        model = trainer.model.train()
        with torch.no_grad():  # a fresh adapter's B is zero, which would hide the gradient of A
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
        theirs = trainer.compute_loss(model, dict(batch))
        reference = gradients(model, theirs)
        labelled = (batch["labels"][:, 1:] != IGNORE).sum()
        mine = labelled_loss(model, batch["input_ids"], batch["labels"]) / labelled
        found = gradients(model, mine)
    norm = torch.stack([g.norm() for g in reference.values()]).norm()
    difference = torch.stack([(found[name] - g).norm() for name, g in reference.items()]).norm()
    return {
        "loss_trl": theirs.item(),
        "loss_finsa": mine.item(),
        "gradient_relative_difference": float(difference / norm),
    }


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss, by parameter."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def take_turns(passes: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Run every arm once per turn."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(turns):
        for name, one_pass in passes.items():
            seconds[name].append(one_pass())
            print(f"turn {turn + 1}/{turns}  {seconds[name][-1]:8.1f} s  {name}", flush=True)
    return seconds


def summary(
    cfg: RunConfig, rows: list[Row], seconds: dict[str, list[float]], equal: dict[str, float]
) -> dict[str, Any]:
    """Everything that is reported, with machine, versions and commit."""
    first = statistics.median(next(iter(seconds.values())))
    return {
        "model": cfg.model.name,
        "rows": len(rows),
        "batch": cfg.train.micro_batch_size,
        "mean_tokens": round(statistics.mean(len(row["input_ids"]) for row in rows), 1),
        "device": hardware.describe(base.dtype(cfg.model)),
        "provenance": {key: provenance.of(cfg)[key] for key in ("machine", "git_commit", "versions", "started")},
        "arms": {
            name: {
                "seconds": [round(value, 2) for value in values],
                "samples_per_second": round(len(rows) / statistics.median(values), 3),
                "ratio": round(first / statistics.median(values), 2),
            }
            for name, values in seconds.items()
        },
        "float32_equality": equal,
    }


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    values = {
        name: f"{arm['samples_per_second']:8.3f} samples/s   {arm['ratio']:.2f}x   {arm['seconds']} s"
        for name, arm in report["arms"].items()
    }
    equal = report["float32_equality"]
    values["float32, one batch"] = (
        f"loss {equal['loss_finsa']:.6f} (trl {equal['loss_trl']:.6f}), "
        f"gradients differ by {equal['gradient_relative_difference']:.1e} (relative)"
    )
    head = (
        f"{report['model']} shape, random weights, {report['rows']} rows of {report['mean_tokens']} tokens on average"
    )
    tables.show_plan(f"{head}, batch {report['batch']}, {report['device']}", values)


if __name__ == "__main__":
    main()
