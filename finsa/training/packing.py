"""Whether rows are packed: what steps cost in packs, against side by side.

The costs are operations, so that the same rows and model give the same answer on every machine. Padding is what a pack
saves. Where attention is computed row by row (`finsa/models/packed_attention.py`) that costs nothing else; elsewhere
it costs a mask: fused attention without one computes half of a line's square, with one all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from finsa.config import Train
from finsa.errors import ConfigError, Problem
from finsa.models import flops, masks, packed_attention
from finsa.runs import processes
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
        line: most tokens of a line, unless a single row is longer; None: all rows of a micro-batch make one, behind
            the prefix that they share.
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
    free = row_by_row(model, train)
    refused = undefined or (None if free else _unwanted(model, cut))
    if train.packing is False or (train.packing == "auto" and refused):
        return Packing(False, None, None, refused or wanted)
    costs, prefix = flops.of(model, train.gradient_checkpointing is True), cut.collate.prefix
    own = [[length - prefix for length in step] for step in _steps(lengths, train)]
    groups = [[step[row] for row in group] for step in own for group in cut.cuts(step)]
    side = sum(padded(costs, rows, prefix) for rows in groups)
    if free:
        line, packed = None, sum(one_line(costs, rows, prefix) for rows in groups)
    else:
        of = {line: sum(_packed(costs, rows, line) for rows in groups) for line in LINES}
        line = min(LINES, key=lambda line: of[line])
        packed = of[line]
    saves = round(side / packed, 3)
    if train.packing is True:
        return Packing(True, None if masks.maskless(model) else line, saves, wanted)
    return Packing(saves >= PAYS, line, saves, f"{wanted}: pays from {PAYS}x")


def row_by_row(model: Any, train: Train) -> bool:
    """Whether the rows of a micro-batch can make one line whose attention is computed row by row."""
    whole = train.strategy in ("single", "ddp") and not train.compile and train.gradient_checkpointing is not True
    return whole and packed_attention.possible(model)


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


def padded(costs: flops.Costs, rows: list[int], prefix: int) -> float:
    """Operations of a micro-batch side by side, without those that are the same in any way."""
    tokens, width = len(rows) * max(rows), max(rows)
    seen = prefix + width if prefix else 0.5 * width  # behind a prefix there is a mask
    return costs.total(prefix + tokens, 0.5 * prefix**2 + tokens * seen, 0, 0)


def _packed(costs: flops.Costs, rows: list[int], line: int) -> float:
    """The same in lines with masks."""
    made = first_fit(rows, max(line, *rows))
    width = width_of(rows, made)
    return costs.total(len(made) * width, len(made) * width**2, 0, 0)


def one_line(costs: flops.Costs, rows: list[int], prefix: int) -> float:
    """The same in one line, attention row by row."""
    seen = [prefix + row if prefix else 0.5 * row for row in rows]
    pairs = sum(row * each for row, each in zip(rows, seen, strict=True))
    return costs.total(prefix + sum(rows), 0.5 * prefix**2 + pairs, 0, 0)
