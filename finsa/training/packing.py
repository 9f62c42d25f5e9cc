"""Whether rows are packed: what steps cost in packs, against side by side.

The costs are operations, so that the same rows and model give the same answer on every machine. Padding is what a pack
saves. What it costs is its mask: fused attention without one computes half of a line's square, with one all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from finsa import processes
from finsa.config import Train
from finsa.errors import ConfigError, Problem
from finsa.modeling import flops, masks
from finsa.training.batching import Cutter
from finsa.training.collate import first_fit, width_of

LINES = (64, 128, 256, 512)  # tokens of a line to choose from where a mask keeps its rows apart
# Steps that are looked at, and what `auto` asks for: times as cheap as side by side (measured, docs/performance.md).
STEPS, PAYS = 64, 1.1


@dataclass(frozen=True)
class Packing:
    """What is done about padding.

    Args:
        used: whether rows are packed.
        line: most tokens of a line, unless a single row is longer; None: all rows of a micro-batch make one.
        saves: operations of rows side by side over those of packs, above 1 where packs are cheaper; None: not asked.
        reason: why that.
    """

    used: bool
    line: int | None
    saves: float | None
    reason: str


def plan(lengths: Any, model: torch.nn.Module, train: Train, cut: Cutter, packs: bool) -> Packing:
    """Decide about packs.

    Args:
        lengths: tokens of all training rows, (n,).
        model: the one that learns.
        train: its ``packing`` says auto, true or false.
        cut: how a step is cut where rows stand side by side.
        packs: whether what is made small is defined on a pack.

    Raises:
        ConfigError: where packs are asked for and are not defined.
    """
    wanted = f"train.packing={str(train.packing).lower()}"
    undefined = _undefined(model, packs)
    if train.packing is True and undefined:
        raise ConfigError([Problem("train.packing", f"{undefined}. Set it to false")])
    refused = undefined or _unwanted(model, cut)
    if train.packing is False or (train.packing == "auto" and refused):
        return Packing(False, None, None, refused or wanted)
    costs = flops.of(model, train.gradient_checkpointing is True)
    groups = [[step[row] for row in group] for step in _steps(lengths, train) for group in cut.cuts(step)]
    side = sum(_cost(costs, len(own), max(own), seen=0.5) for own in groups)
    packed = {line: sum(_packed(costs, own, line) for own in groups) for line in LINES}
    line = min(LINES, key=lambda line: packed[line])
    saves = round(side / packed[line], 3)
    if train.packing is True:
        return Packing(True, None if masks.maskless(model) else line, saves, wanted)
    return Packing(saves >= PAYS, line, saves, f"{wanted}: pays from {PAYS}x")


def _undefined(model: Any, packs: bool) -> str | None:
    """Why a pack would not mean the same as its rows; None: it does."""
    if not packs:
        return "packs are of a loss on tokens; a choice among labels and a mixture read each row by itself"
    return None if masks.keeps_everything(model) else "layers keep something other than all keys and values"


def _unwanted(model: Any, cut: Cutter) -> str | None:
    """Why `auto` does not pack here, whatever it would save; None: it may."""
    if cut.collate.prefix:
        return f"a shared prefix of {cut.collate.prefix} tokens"
    return "flash-attention: lines without a mask have not been measured" if masks.maskless(model) else None


def _steps(lengths: Any, train: Train) -> Iterator[list[int]]:
    """Lengths of the rows of some steps, as the trainer's sampler would put them together."""
    size, draw = train.batch_size // processes.world(), np.random.default_rng(0)
    taken = draw.permutation(lengths)[: 4 * STEPS * size].tolist()
    if train.group_by_length:
        order = get_length_grouped_indices(taken, size, generator=torch.Generator().manual_seed(0))
        taken = [taken[row] for row in order]
        starts = [int(at) * size for at in draw.permutation(-(-len(taken) // size))]
    else:
        starts = list(range(0, len(taken), size))
    yield from (taken[at : at + size] for at in starts[:STEPS])


def _packed(costs: flops.Costs, lengths: list[int], line: int) -> float:
    lines = first_fit(lengths, max(line, *lengths))
    return _cost(costs, len(lines), width_of(lengths, lines), seen=1.0)


def _cost(costs: flops.Costs, lines: int, width: int, seen: float) -> float:
    """Operations of a micro-batch without those that are the same either way."""
    return costs.total(lines * width, seen * lines * width**2, 0, 0)
