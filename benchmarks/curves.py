"""What a training step costs over prompt length, batch, classes and experts: one axis at a time.

    python benchmarks/curves.py            the embedded shape, medians over the turns
    python benchmarks/curves.py --quick    two points per axis, one turn; nothing is written

Held equal on every axis: architecture, weights, LoRA rank 8 on query and value (experts: rank 4 on query, value and
down projection), and of the other axes 128 tokens, 8 rows, 3 classes of one token, one adapter. Classes cost by the
label tree, so that axis trains the choice among all labels, each of two tokens. Points take turns; CPU seconds of this
process where there is no GPU.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from finsa.runs.processes import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import kept
import torch
from peft import LoraConfig, get_peft_model

from finsa.config import MoeJointStage, RunConfig, compose
from finsa.evaluation import tables
from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import label_log_probs
from finsa.models import base, hardware
from finsa.models.moe import experts
from finsa.models.moe.mixture import Mixture
from finsa.training.objective import labeled_loss

AXES = {"prompt tokens": (32, 128, 512), "rows": (1, 8, 32), "classes": (2, 8, 32), "experts": (1, 2, 4)}
Step = Callable[[], None]


def clock() -> float:
    """Seconds: of the wall on a GPU; of this process on a CPU, which it may share with others."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def batch(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (rows, tokens); the last two learned."""
    ids = torch.randint(10, 4000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return ids.to(base.device()), labels.to(base.device())


def lora(cfg: RunConfig, rank: int = 8, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Any:
    """A fresh model with an adapter."""
    settings = LoraConfig(r=rank, target_modules=list(targets), task_type="CAUSAL_LM")
    return get_peft_model(base.load_base(cfg.model, 0), settings)


def learned(model: Any, rows: int, tokens: int, **inputs: torch.Tensor) -> Step:
    """A step on labeled tokens."""
    ids, labels = batch(rows, tokens)

    def one() -> None:
        labeled_loss(model, ids, labels, **inputs).backward()
        model.zero_grad()

    return one


def chosen(model: Any, classes: int) -> Step:
    """A step on the choice among labels of two tokens, whose first ones differ."""
    tree = LabelTree.of([(20 + number, 500 + number) for number in range(classes)])
    ids, _ = batch(8, 128)
    ids = torch.cat([ids, torch.tensor([tree.tokens] * 8, device=ids.device)], dim=1)
    lengths = torch.full((8,), 128, device=ids.device)

    def one() -> None:
        label_log_probs(model, ids, lengths, tree)[:, 0].sum().backward()
        model.zero_grad()

    return one


def mixed(cfg: RunConfig, number: int, folder: Path) -> Step:
    """A step of a mixture; one expert is an ordinary adapter."""
    single = lora(cfg, 4, ("q_proj", "v_proj", "down_proj"))
    if number == 1:
        return learned(single, 8, 128)
    single.save_pretrained(str(folder))
    stage = cfg.stage
    assert isinstance(stage, MoeJointStage)
    found = experts.read({f"expert{n}": folder for n in range(number)})
    model = Mixture(base.load_base(cfg.model, 0), found, stage, None, 0.0, 0)
    model.set_trainable(experts=True)
    return learned(model.train(), 8, 128, text_span=torch.tensor([[8, 120]] * 8, device=base.device()))


def points(cfg: RunConfig, axis: str, values: tuple[int, ...]) -> dict[int, Step]:
    """The steps of an axis."""
    if axis == "prompt tokens":
        return {value: learned(lora(cfg).train(), 8, value) for value in values}
    if axis == "rows":
        return {value: learned(lora(cfg).train(), value, 128) for value in values}
    if axis == "classes":
        return {value: chosen(lora(cfg).train(), value) for value in values}
    with tempfile.TemporaryDirectory() as folder:
        return {value: mixed(cfg, value, Path(folder) / str(value)) for value in values}


def measure(steps: dict[int, Step], turns: int) -> dict[str, float]:
    """Median seconds of every point; they take turns, after one round that is not measured."""
    seconds: dict[int, list[float]] = {at: [] for at in steps}
    for turn in range(turns + 1):
        for at, one in steps.items():
            started = clock()
            one()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[at].append(clock() - started)
    return {str(at): round(statistics.median(values), 5) for at, values in seconds.items()}


def main() -> None:
    """Measure all axes, print, write ``results/curves.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--turns", type=int, default=5)
    given = options.parse_args()
    words = ["model=tiny", "model.weights=random", "stage=moe_joint"]
    cfg = compose.build(*compose.compose_values(words), words)
    hardware.prepare(cfg.train)
    curves: dict[str, Any] = {}
    for axis, values in AXES.items():
        seconds = measure(points(cfg, axis, values[:2] if given.quick else values), 1 if given.quick else given.turns)
        curves[axis] = {"per": "step", "equal": "all but this axis", "seconds": seconds}
        tables.show_plan(f"a step over {axis}", {at: f"{1000 * value:.1f} ms" for at, value in seconds.items()})
    report = {"model": "tiny", "device": hardware.describe(base.dtype(cfg.model)), "curves": curves}
    if not given.quick:
        kept.write("curves", report)


if __name__ == "__main__":
    main()
