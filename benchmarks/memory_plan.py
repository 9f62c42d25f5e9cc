"""The memory plan against the measured peak of real training steps, each in a fresh process.

    python benchmarks/memory_plan.py            the true Qwen2.5-0.5B shape, random weights (minutes)
    python benchmarks/memory_plan.py --quick    the embedded default's shape at large micro-batches; nothing is written

Every arm makes two optimiser steps of `fit.fit`, on rows of random tokens that are all of one length. Measured on a
CPU: the most that was resident during the steps (Linux, VmHWM, set back once the model is loaded); on a GPU: the most
that torch has allocated. Besides, what a process holds that has only imported what training imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finsa.launch import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import kept
import torch
from transformers import AutoTokenizer, TrainerCallback

from finsa import composition
from finsa.config import ROOT, RunConfig
from finsa.data.rows import IGNORE, Row
from finsa.evaluation import tables
from finsa.modeling import base, hardware, learner, memory
from finsa.training import fit

ANSWER = 3
ARMS: dict[str, tuple[str, ...]] = {
    "lora": ("method=lora_response",),
    "lora, loss on all tokens": ("method=lora",),
    "lora, all linears": ("method=lora_all",),
    "lora, gradient checkpointing": ("method=lora_response", "train.gradient_checkpointing=true"),
    "qlora": ("method=qlora",),
    "full": ("method=full",),
}


def composed(model: str, arm: str, rows: int) -> RunConfig:
    """The configuration of an arm: two steps of one micro-batch."""
    overrides = [f"model={model}", "model.weights=random", *ARMS[arm], f"train.batch_size={rows}"]
    overrides += [f"train.micro_batch_size={rows}", "train.epochs=1", "train.max_steps=2", "train.patience=null"]
    values, choices = composition.compose_values(overrides)
    return composition.build(values, choices, overrides)


def estimated(cfg: RunConfig, rows: int, length: int) -> memory.Need:
    """What the plan says."""
    shapes = memory.shapes(cfg, learner.on_meta(cfg, None))  # type: ignore[arg-type]  # read for a head alone
    projected = length if cfg.method.loss_on == "all" else ANSWER
    return memory.training(shapes, rows, length, projected, cfg.train.gradient_checkpointing is True, False)


class Peak(TrainerCallback):  # type: ignore[misc]
    """The most memory of the steps, saving left out."""

    def __init__(self) -> None:
        self.bytes = self.before = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget what loading took."""
        hardware.release_memory()
        self.before = resident("VmRSS")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Read it."""
        self.bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


def resident(field: str) -> int:
    """A figure of this process, in bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(model: str, arm: str, rows: int, length: int) -> dict[str, Any]:
    """Make two real steps in this process; returns measured and estimated bytes."""
    cfg, before = composed(model, arm, rows), resident("VmRSS")
    hardware.prepare(cfg.train)
    need = estimated(cfg, rows, length)
    loaded = base.load_base(cfg.model, 0, keep=False, quantization=cfg.method.quantization)
    learnt = learner.build(cfg, loaded, None)  # type: ignore[arg-type]
    ids = torch.randint(3, 5000, (2 * rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    learnt_from = 0 if cfg.method.loss_on == "all" else length - ANSWER
    examples = [Row(input_ids=row, labels=[IGNORE] * learnt_from + row[learnt_from:]) for row in ids]
    peak = Peak()
    with tempfile.TemporaryDirectory() as folder:
        fit.fit(
            model=learnt,
            tokenizer=AutoTokenizer.from_pretrained(ROOT / "data" / "tiny"),
            rows=examples,
            validate=lambda _: {"loss": 0.0, "macro_f1": 0.0},
            train=cfg.train,
            seed=0,
            folder=Path(folder),
            record=lambda step, values: None,
            callbacks=[peak],
        )
    return {
        "rows": rows,
        "tokens": length,
        "measured": peak.bytes,
        "estimated": need.total(),
        "ratio": round(need.total() / peak.bytes, 3),
        "parts": vars(need),
        "imports": before,
        "before_steps": peak.before,
    }


def main() -> None:
    """Measure all arms, print the table, write ``results/memory_plan.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options.add_argument("--rows", type=int, default=None, help="of a micro-batch")
    options.add_argument("--tokens", type=int, default=128, help="of every row")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    model, rows = ("tiny", given.rows or 64) if given.quick else ("qwen05b", given.rows or 4)
    if given.one:
        print(json.dumps(measure(model, given.one, rows, given.tokens)))
        return
    found = {}
    for arm in given.arms:
        words = ["--one", arm, "--rows", str(rows), "--tokens", str(given.tokens), *(["--quick"] * given.quick)]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found[arm] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{arm}: {found[arm]['ratio']:.3f} of the measured {found[arm]['measured'] / 2**30:.2f} GiB", flush=True)
    cfg = composed(model, given.arms[0], rows)
    report = {
        "model": model,
        "device": hardware.describe(base.dtype(cfg.model)),
        "arms": found,
    }
    words = {
        name: f"{arm['measured'] / 2**30:.2f} GiB measured, {arm['estimated'] / 2**30:.2f} estimated"
        for name, arm in found.items()
    }
    tables.show_plan(f"{model} shape, micro-batch {rows} x {given.tokens} tokens, {report['device']}", words)
    if not given.quick:
        kept.write("memory_plan", report)


if __name__ == "__main__":
    main()
