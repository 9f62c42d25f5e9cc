"""The memory plan against the measured peak of real training steps, each in a fresh process.

    python benchmarks/memory_plan.py            three real shapes, random weights (an hour on two cores)
    python benchmarks/memory_plan.py --models smollm2_135m --arms lora --dtype bfloat16
    python benchmarks/memory_plan.py --quick    the embedded default's shape at large micro-batches; nothing is written

Every arm makes two optimizer steps of `fit.fit`, on rows of random tokens that are all of one length. Measured on a
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

from finsa.runs.processes import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import kept
import torch
from transformers import AutoTokenizer, TrainerCallback

from finsa.config import ROOT, RunConfig, compose
from finsa.data.rows import IGNORE, Row
from finsa.evaluation import tables
from finsa.models import base, factory, hardware, memory
from finsa.training import fit
from finsa.training.objective import labeled_loss

ANSWER = 3
# Architectures by name; qwen05b and tiny are those of conf/model. None of the values needs a download.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2_135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "gemma3_270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
}
ARMS: dict[str, tuple[str, ...]] = {
    "lora": ("method=lora_response",),
    "lora, loss on all tokens": ("method=lora",),
    "lora, all linears": ("method=lora_all",),
    "lora, gradient checkpointing": ("method=lora_response", "train.gradient_checkpointing=true"),
    "qlora": ("method=qlora",),
    "full": ("method=full",),
}


def composed(model: str, arm: str, rows: int, dtype: str) -> RunConfig:
    """The configuration of an arm: two steps of one micro-batch."""
    overrides = [f"model={'qwen05b' if model in SHAPES else model}", "model.weights=random", f"model.dtype={dtype}"]
    overrides += [*ARMS[arm], f"train.batch_size={rows}", f"train.micro_batch_size={rows}", "train.epochs=1"]
    overrides += ["train.max_steps=2", "train.patience=null"]
    values, choices = compose.compose_values(overrides)
    cfg = compose.build(values, choices, overrides)
    if model not in SHAPES:
        return cfg
    section = cfg.model.model_copy(update={"name": model, "architecture": SHAPES[model]})
    return cfg.model_copy(update={"model": section})


def estimated(cfg: RunConfig, rows: int, length: int) -> memory.PeakMemory:
    """What the plan says."""
    model: Any = factory.on_meta(cfg, None)
    if cfg.train.gradient_checkpointing is True:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.empty(rows, length, dtype=torch.long, device="meta")
    read = ids[:, : length - 1 if cfg.method.loss_on == "all" else ANSWER]
    return memory.estimate_training(cfg, model, lambda: labeled_loss(model, ids, ids, read=read), accumulated=False)


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


def measure(
    model: str, arm: str, rows: int, length: int, dtype: str, loaded: Any = None, checkpointing: bool | None = None
) -> dict[str, Any]:
    """Make two real steps in this process.

    Args:
        model: its name.
        arm: one of `ARMS`.
        rows: of a micro-batch.
        length: tokens of every row.
        dtype: of the weights.
        loaded: the base; None: it is loaded here. It is given back as it was.
        checkpointing: of the layers; None: as the arm says.

    Returns:
        Measured and estimated bytes, and what they are of.
    """
    cfg, before = composed(model, arm, rows, dtype), resident("VmRSS")
    if checkpointing is not None:
        train = cfg.train.model_copy(update={"gradient_checkpointing": checkpointing})
        cfg = cfg.model_copy(update={"train": train})
    hardware.prepare(cfg.train)
    need = estimated(cfg, rows, length)
    if loaded is None:
        loaded = base.load_base(cfg.model, 0, quantization=cfg.method.quantization)
    learned = factory.build(cfg, loaded, None)
    ids = torch.randint(3, 5000, (2 * rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    learned_from = 0 if cfg.method.loss_on == "all" else length - ANSWER
    examples = [Row(input_ids=row, labels=[IGNORE] * learned_from + row[learned_from:]) for row in ids]
    peak = Peak()
    try:
        with tempfile.TemporaryDirectory() as folder:
            fitted = fit.fit(
                model=learned,
                tokenizer=AutoTokenizer.from_pretrained(ROOT / "data" / "tiny"),
                rows=examples,
                validate=lambda _: {"loss": 0.0, "macro_f1": 0.0},
                train=cfg.train,
                seed=0,
                folder=Path(folder),
                record=lambda step, values: None,
                callbacks=[peak],
            )
    finally:
        factory.detach(learned)
    return {
        "model": model,
        "arm": arm,
        "dtype": str(base.dtype(cfg.model)).removeprefix("torch."),
        "fused_attention": torch.backends.cuda.flash_sdp_enabled(),
        "rows": rows,
        "tokens": length,
        "measured": peak.bytes,
        "estimated": need.total(),
        "ratio": round(need.total() / peak.bytes, 3),
        "parts": vars(need),
        "imports": before,
        "before_steps": peak.before,
        "gradient_checkpointing": cfg.train.gradient_checkpointing is True,
        "seconds_per_step": round(fitted.throughput["seconds"] / fitted.steps, 4),
        "mfu": fitted.throughput["mfu"],
        "micro_batch_halved": fitted.batching["micro_batch_halved"],
    }


def main() -> None:
    """Measure all arms, print the table, write ``results/memory_plan.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--models", nargs="+", choices=[*SHAPES, "qwen05b", "tiny"], default=[*SHAPES, "qwen05b"])
    options.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options.add_argument("--rows", type=int, default=None, help="of a micro-batch")
    options.add_argument("--tokens", type=int, default=128, help="of every row")
    options.add_argument("--dtype", default="auto", help="of the weights")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    models, rows = (["tiny"], given.rows or 64) if given.quick else (given.models, given.rows or 4)
    if given.one:
        print(json.dumps(measure(models[0], given.one, rows, given.tokens, given.dtype)))
        return
    found = []
    for model in models:
        for arm in given.arms:
            words = ["--models", model, "--one", arm, "--rows", str(rows), "--tokens", str(given.tokens)]
            words += ["--dtype", given.dtype, *(["--quick"] * given.quick)]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{model}, {arm}: {found[-1]['ratio']:.3f}", flush=True)
    tables.show_plan("memory", {title(one): told(one) for one in found})
    if not given.quick:
        kept.write("memory_plan", {"runs": found})


def title(one: dict[str, Any]) -> str:
    """Name a measurement."""
    return f"{one['model']}, {one['arm']}, {one['rows']} x {one['tokens']} tokens, {one['dtype']}"


def told(one: dict[str, Any]) -> str:
    """A measurement in words."""
    measured, estimated = (one[name] / 2**30 for name in ("measured", "estimated"))
    return f"{measured:.2f} GiB, estimated {estimated:.2f} ({one['ratio']:.2f})"


if __name__ == "__main__":
    main()
