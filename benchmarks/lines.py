"""Micro-batches whose rows are padded, or packed into one sequence with attention computed row by row.

    python benchmarks/lines.py            the embedded shape, and Qwen2.5-0.5B's with 8 of its layers
    python benchmarks/lines.py --quick    two cases of the embedded shape, one turn; nothing is written

Each case is one micro-batch: its rows, and tokens that all of them begin with. Held equal: architecture, weights, LoRA
rank 8 on query and value, rows, loss on the last three tokens. A turn is forward and backward; arms take turns, after
one that is not measured; medians. The loss of each arm is that of the first to 1e-5 (in half precision 5e-3), or the
script ends. Ratios are how many times as fast as the first arm. The operations that `train.packing=auto` counts are
beside what was measured.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
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

from finsa.config import compose
from finsa.data.rows import IGNORE
from finsa.evaluation import tables
from finsa.models import base, flops, hardware
from finsa.training import layout, objective
from finsa.training.batches import Collator, Packer

ANSWER = 3
# Rows, their shortest and longest own tokens, and the tokens that all begin with.
CASES = {
    "tiny": (
        (16, 38, 38, 0),
        (16, 20, 60, 0),
        (16, 100, 110, 0),
        (16, 28, 224, 0),
        (16, 20, 60, 16),
        (16, 20, 60, 40),
        (16, 20, 60, 100),
    ),
    "qwen05b": (
        (4, 110, 110, 0),
        (4, 58, 160, 0),
        (8, 28, 224, 0),
        (4, 58, 160, 100),
        (8, 20, 60, 100),
    ),
}
Arms = dict[str, dict[str, torch.Tensor]]


def rows(number: int, shortest: int, longest: int, prefix: int) -> list[dict[str, Any]]:
    """Rows of random tokens, lengths spread evenly between two."""
    draw, made = random.Random(0), []
    shared = [draw.randrange(10, 4000) for _ in range(prefix)]
    for at in range(number):
        length = shortest + round((longest - shortest) * at / max(number - 1, 1))
        ids = [*shared, *(draw.randrange(10, 4000) for _ in range(length))]
        made.append({"input_ids": ids, "labels": [IGNORE] * (len(ids) - ANSWER) + ids[-ANSWER:]})
    return made


def arms(made: list[dict[str, Any]], prefix: int) -> Arms:
    """The micro-batch in each layout."""
    found = {"side by side": Collator(0)(made), "one line": Packer()(made)}
    if prefix:
        found["prefix once, side by side"] = Collator(0, (), prefix)(made)
        found["prefix once, one line"] = Packer(prefix)(made)
    return found


def measure(model: Any, given: Arms, turns: int) -> dict[str, float]:
    """Median seconds of each layout."""
    goal, seconds, losses = objective.tokens(), {name: list[float]() for name in given}, dict[str, float]()
    given = {name: {key: tensor.to(base.device()) for key, tensor in batch.items()} for name, batch in given.items()}
    for turn in range(turns + 1):
        for name, batch in given.items():
            started = time.perf_counter()
            loss = goal.total(model, batch)
            loss.backward()
            losses[name] = loss.item()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            model.zero_grad()
    first = next(iter(losses.values()))
    limit = 1e-5 if flops.compute_dtype(model) == torch.float32 else 5e-3
    off = {name: loss for name, loss in losses.items() if abs(loss - first) > limit * abs(first)}
    if off:
        sys.exit(f"losses differ from {first}: {off}")
    return {name: statistics.median(values) for name, values in seconds.items()}


def case(model: Any, of: tuple[int, int, int, int], turns: int) -> dict[str, Any]:
    """Measure one micro-batch in all layouts."""
    number, shortest, longest, prefix = of
    made = rows(*of)
    seconds = measure(model, arms(made, prefix), turns)
    tokens, first = f"{shortest}" if shortest == longest else f"{shortest} to {longest}", next(iter(seconds.values()))
    costs, lengths = flops.estimate(model), [len(row["input_ids"]) for row in made]
    counted = layout.padded_cost(costs, lengths, 0) / layout.packed_cost(costs, lengths, 0)  # without a prefix
    return {
        "case": f"{number} rows of {tokens} tokens" + (f", {prefix} shared" if prefix else ""),
        "line_by_operations": round(counted, 3),
        "arms": {
            name: {"seconds": round(value, 4), "ratio": round(first / value, 2)} for name, value in seconds.items()
        },
    }


def measured(name: str, cases: tuple[tuple[int, int, int, int], ...], turns: int) -> list[dict[str, Any]]:
    """All cases of a shape, printed."""
    words = [f"model={name}", "model.weights=random"]
    cfg = compose.build(*compose.compose_values(words), words)
    hardware.prepare(cfg.train)
    model = base.load_base(cfg.model, 0)
    if name != "tiny":
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:8], 8
    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    learner = get_peft_model(model, adapter).train()
    found = []
    for of in cases:
        found.append(case(learner, of, turns))
        shown = {arm: f"{one['seconds']:.3f} s   {one['ratio']:.2f}x" for arm, one in found[-1]["arms"].items()}
        shown["one line, by operations"] = f"{found[-1]['line_by_operations']:.2f}x"
        tables.show_plan(f"{name}: {found[-1]['case']}", shown)
    return found


def main() -> None:
    """Measure both shapes, print, write ``results/lines.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--turns", type=int, default=7)
    given = options.parse_args()
    if given.quick:
        measured("tiny", CASES["tiny"][1:5:3], 1)
        return
    shapes = {name: measured(name, cases, given.turns) for name, cases in CASES.items()}
    kept.write("lines", {"held_equal": "weights, LoRA, rows, labels", "shapes": shapes})


if __name__ == "__main__":
    main()
