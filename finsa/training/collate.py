"""Rows to tensors: padded side by side, behind a prefix they share, or packed behind one another.

All that a step needs to know about a batch is found out here, on the CPU: a question to the device would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from finsa.data.rows import IGNORE

# Of a row's further fields, those that rows have: the batch's name for each, and its type.
FIELDS = {
    "weight": ("weights", torch.float32),
    "target": ("targets", torch.long),
    "text_span": ("text_span", torch.long),
    "domain": ("domains", torch.long),
}

HEAD = -2  # the segment that every row of a line sees


class Collator:
    """Pads rows on the right to the longest of the batch; no mask is needed there for a causal model.

    Args:
        pad: the id that fills; never learnt, never seen by a real token.
        suffix: ids put behind every row and not counted as its own: the label tree's, where labels are chosen from.
        prefix: how many tokens all rows begin with; they are taken off and stand in the batch once.
    """

    def __init__(self, pad: int, suffix: Sequence[int] = (), prefix: int = 0) -> None:
        self.pad, self.suffix, self.prefix = pad, np.asarray(suffix, np.int64), prefix

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Returns:
            ``input_ids`` and ``labels``, both (b, s); the number of real tokens, ``lengths`` (b,); the positions that
            predict a labelled token, ``read`` (b, k), filled up with others. Where rows have them, ``weights`` (b,),
            ``targets`` (b,), ``text_span`` (b, 2) and ``domains`` (b,). With a prefix of p tokens, these all are
            without it, and ``prefix`` (p,) has its ids, ``prefix_labels`` (p,) what its positions predict.
        """
        own = [row["input_ids"][self.prefix :] for row in rows]
        ids = np.full((len(rows), max(map(len, own)) + len(self.suffix)), self.pad)
        labels = np.full_like(ids, IGNORE)
        for number, (row, tokens) in enumerate(zip(rows, own, strict=True)):
            ids[number, : len(tokens)] = tokens
            ids[number, len(tokens) : len(tokens) + len(self.suffix)] = self.suffix
            labels[number, : len(tokens)] = row["labels"][self.prefix :]
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        batch |= {"lengths": torch.tensor([len(tokens) for tokens in own]), "read": read_positions(batch["labels"])}
        for field, (name, kind) in FIELDS.items():
            if field in rows[0]:
                batch[name] = torch.tensor([row[field] for row in rows], dtype=kind)
        return self._behind_prefix(batch, rows[0]) if self.prefix else batch

    def _behind_prefix(self, batch: dict[str, torch.Tensor], row: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Say what stands before the rows; any of them knows it."""
        if "text_span" in batch:
            batch["text_span"] -= self.prefix
        labels = row["labels"][1 : self.prefix + 1]
        if any(label != IGNORE for label in labels):
            batch["prefix_labels"] = torch.tensor(labels)
        return {**batch, "prefix": torch.tensor(row["input_ids"][: self.prefix])}


class Packer:
    """Packs rows behind one another into lines; no row sees another, and positions begin anew with each.

    Args:
        pad: the id that fills the end of a line.
        line: most tokens of a line, unless a single row is longer, because a mask over it costs its square; None: one
            line of all rows, for attention that asks for no mask.
        prefix: how many tokens all rows begin with; they stand at the head of the one line, for all of them.
    """

    suffix = np.zeros(0, np.int64)

    def __init__(self, pad: int, line: int | None, prefix: int = 0) -> None:
        assert line is None or not prefix, "only one line of all rows has a head"
        self.pad, self.line, self.prefix = pad, line, prefix

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of l lines.

        Returns:
            ``input_ids``, ``labels``, ``position_ids`` and ``segments`` (the number of the row in its line, -1 for
            padding, `HEAD` for what all rows see), all (l, s); ``read`` (l, k) as the collator has it; ``weights``
            (l, k) of these where rows have weights, or a head is learnt, which counts for each row. One line of all
            rows also has ``lengths`` (b,), of its rows without the head.
        """
        lengths = [len(row["input_ids"]) - self.prefix for row in rows]
        lines = first_fit(lengths, sum(lengths) if self.line is None else max(self.line, *lengths))
        width = self.prefix + width_of(lengths, lines)
        ids = np.full((len(lines), width), self.pad)
        labels, segments = np.full_like(ids, IGNORE), np.full_like(ids, -1)
        places, weights = np.tile(np.arange(width), (len(lines), 1)), np.zeros(ids.shape, np.float32)
        for number, line in enumerate(lines):
            at = self.prefix
            for count, row in enumerate(line):
                part = (number, slice(at, at + lengths[row]))
                ids[part], labels[part] = (rows[row][name][self.prefix :] for name in ("input_ids", "labels"))
                labels[number, at] = IGNORE  # the row before it does not predict it
                segments[part], places[part] = count, np.arange(self.prefix, self.prefix + lengths[row])
                weights[part] = rows[row].get("weight", 1.0)
                at += lengths[row]
        if self.prefix:
            first = lines[0][0]
            part = (0, slice(self.prefix))
            ids[part], labels[part] = (rows[first][name][: self.prefix] for name in ("input_ids", "labels"))
            labels[0, self.prefix] = rows[first]["labels"][self.prefix]  # the head predicts it, for all rows the same
            segments[part], weights[part] = HEAD, sum(row.get("weight", 1.0) for row in rows)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": places, "segments": segments}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["read"] = read_positions(batch["labels"])
        if self.line is None:
            batch["lengths"] = torch.tensor([lengths[row] for row in lines[0]])
        if "weight" in rows[0] or (self.prefix and (labels[0, 1 : self.prefix + 1] != IGNORE).any()):
            batch["weights"] = torch.from_numpy(weights).gather(1, batch["read"])
        return batch


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows into as few lines of a capacity as first-fit decreasing finds; row numbers by line."""
    lines: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        line = next((line for line, free in enumerate(room) if free >= lengths[row]), len(lines))
        if line == len(lines):
            lines.append([])
            room.append(capacity)
        lines[line].append(row)
        room[line] -= lengths[row]
    return lines


def width_of(lengths: Sequence[int], lines: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest of some lines of rows."""
    return max(sum(lengths[row] for row in line) for line in lines)


def read_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose next token is labelled, (b, k) with k the most that a row has; the rest are unlabelled ones."""
    learnt = labels[:, 1:] != IGNORE
    return (~learnt).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(learnt.sum(1).max()) if len(learnt) else 0]
