"""Micro-batches of an optimiser step: rows padded side by side, or packed into one sequence.

What a step has to know about a batch is computed here, on the CPU: reading it from the device would make the host wait.

Letters: b rows of a micro-batch, s tokens, p tokens of a shared prefix, k labelled positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finsa.data.rows import IGNORE

Batch = dict[str, torch.Tensor]

# Optional fields of a row: the batch's name for each, and its type.
FIELDS = {
    "weight": ("weights", torch.float32),
    "target": ("targets", torch.long),
    "text_span": ("text_span", torch.long),
    "domain": ("domains", torch.long),
}


class Collator:
    """Pads rows on the right to the longest of the batch; a causal model needs no attention mask for that.

    Args:
        pad: the padding id; no real token attends to it, and it has no label.
        suffix: ids appended to every row and not counted in its length: the label tree, where labels are scored.
        prefix: number of tokens that all rows begin with; they are taken off and stand in the batch once.
    """

    def __init__(self, pad: int, suffix: Sequence[int] = (), prefix: int = 0) -> None:
        self.pad, self.suffix, self.prefix = pad, np.asarray(suffix, np.int64), prefix

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Make a batch.

        Returns:
            ``input_ids`` and ``labels``, both (b, s); the number of real tokens, ``lengths`` (b,); the positions that
            predict a labelled token, ``read`` (b, k), filled up with others. Where rows have them, ``weights`` (b,),
            ``targets`` (b,), ``text_span`` (b, 2) and ``domains`` (b,). With a prefix, all of these are without it,
            ``prefix`` (p,) has its ids, and ``prefix_labels`` (p,) what its positions predict if they are labelled.
        """
        p = self.prefix
        bodies = [row["input_ids"][p:] for row in rows]
        ids = np.full((len(rows), max(map(len, bodies)) + len(self.suffix)), self.pad)
        labels = np.full_like(ids, IGNORE)
        for number, (row, tokens) in enumerate(zip(rows, bodies, strict=True)):
            ids[number, : len(tokens)] = tokens
            ids[number, len(tokens) : len(tokens) + len(self.suffix)] = self.suffix
            labels[number, : len(tokens)] = row["labels"][p:]
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        batch |= {"lengths": torch.tensor([len(tokens) for tokens in bodies]), "read": read_positions(batch["labels"])}
        for field, (name, kind) in FIELDS.items():
            if field in rows[0]:
                batch[name] = torch.tensor([row[field] for row in rows], dtype=kind)
        if p:
            batch["prefix"] = torch.tensor(rows[0]["input_ids"][:p])
            prefix_labels = rows[0]["labels"][1 : p + 1]
            if any(label != IGNORE for label in prefix_labels):
                batch["prefix_labels"] = torch.tensor(prefix_labels)
            if "text_span" in batch:
                batch["text_span"] -= p
        return batch


class Packer:
    """Packs the rows of a micro-batch into one sequence without padding; attention does not cross their boundaries.

    Args:
        prefix: number of tokens that all rows begin with; the sequence begins with them, and every row attends to them.
    """

    def __init__(self, prefix: int = 0) -> None:
        self.prefix = prefix

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Make a batch of one sequence, the longest row first.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, all (1, s), positions starting anew with each row;
            ``lengths`` (b,) of the rows without the prefix; ``read`` (1, k) as the collator has it; ``weights`` (1, k)
            of these where rows have weights, or where the prefix is labelled, which counts once for each row.
        """
        p = self.prefix
        ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
        ids, labels = list(ordered[0]["input_ids"][:p]), list(ordered[0]["labels"][:p])
        positions, weights = list(range(p)), [sum(row.get("weight", 1.0) for row in rows)] * p
        for row in ordered:
            ids += row["input_ids"][p:]
            labels += [IGNORE, *row["labels"][p + 1 :]]  # the row before does not predict its first token
            positions += range(p, len(row["input_ids"]))
            weights += [row.get("weight", 1.0)] * (len(row["input_ids"]) - p)
        if p:
            labels[p] = ordered[0]["labels"][p]  # the prefix predicts it, the same for all rows
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        batch |= {"position_ids": torch.tensor([positions]), "read": read_positions(batch["labels"])}
        batch["lengths"] = torch.tensor([len(row["input_ids"]) - p for row in ordered])
        if "weight" in rows[0] or any(label != IGNORE for label in labels[1 : p + 1]):
            batch["weights"] = torch.tensor([weights], dtype=torch.float32).gather(1, batch["read"])
        return batch


def read_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose next token is labelled, (b, k) with k the most that a row has; filled up with unlabelled ones."""
    labelled = labels[:, 1:] != IGNORE
    most = int(labelled.sum(1).max()) if len(labelled) else 0
    return (~labelled).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


@dataclass(frozen=True, eq=False)
class Step:
    """Rows of an optimiser step on this process; an object, so that no library walks through its lists."""

    rows: Sequence[dict[str, Any]]


@dataclass
class StepSplitter:
    """Splits the rows of a step into micro-batches of similar length.

    The rows of a step are drawn before it is split, and the loss is a mean over the whole step. So the split changes
    neither the order of training nor what is learnt, and may differ between the parts of a resumed training.

    Args:
        collate: makes the tensors.
        rows: most rows of a micro-batch.
    """

    collate: Collator | Packer
    rows: int

    def __call__(self, step: Step) -> list[Batch]:
        """Make the micro-batches, the longest first."""
        groups = self.groups([len(row["input_ids"]) for row in step.rows])
        return [self.collate([step.rows[row] for row in group]) for group in groups]

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of the rows of each micro-batch, given the lengths of the step's rows."""
        if len(lengths) <= self.rows:
            return [list(range(len(lengths)))]
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        return [order[at : at + self.rows] for at in range(0, len(order), self.rows)]
