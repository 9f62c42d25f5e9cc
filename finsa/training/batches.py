"""Micro-batches of an optimizer step: rows padded to the same length, or packed into one sequence.

All that a step needs to know about a batch is computed here, on the CPU, so that no step synchronizes with the device.

Letters: b rows of a micro-batch, s tokens, p tokens of a shared prefix, k labeled positions.
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
    "values": ("values", torch.float32),
    "rejected": ("rejected", torch.long),
    "reference": ("reference", torch.float32),
    "text_span": ("text_span", torch.long),
    "domain": ("domains", torch.long),
}


class Collator:
    """Pads rows on the right to the longest one of the batch; a causal model needs no attention mask for that.

    Args:
        pad: the padding token id; no real token attends to it, and it has no label.
        suffix: token ids appended to every row and not counted in its length: the label tree, if labels are scored.
        prefix: number of tokens that all rows begin with; they are removed from the rows and are in the batch once.
    """

    def __init__(self, pad: int, suffix: Sequence[int] = (), prefix: int = 0) -> None:
        self.pad, self.suffix, self.prefix = pad, np.asarray(suffix, np.int64), prefix

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Build a batch.

        Returns:
            ``input_ids`` and ``labels``, both (b, s); the number of real tokens, ``lengths`` (b,); the positions that
            predict a labeled token, ``read`` (b, k), padded with others. If rows have them, ``weights`` (b,),
            ``targets`` (b,), ``values`` (b, m), ``rejected`` (b,), ``reference`` (b, c), ``text_span`` (b, 2) and
            ``domains`` (b,). With a prefix, all of these exclude it, ``prefix`` (p,) has its ids, and ``prefix_labels``
            (p,) the labels of its positions, if they have any.
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
        """Build a batch of one sequence, the longest row first.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, all (1, s), where positions restart with each row;
            ``lengths`` (b,) of the rows without the prefix; ``read`` (1, k) as in `Collator`; ``weights`` (1, k)
            of these positions, if rows have weights or the prefix has labels, which count once for each row.
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
            labels[p] = ordered[0]["labels"][p]  # predicted by the prefix, and the same for all rows
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        batch |= {"position_ids": torch.tensor([positions]), "read": read_positions(batch["labels"])}
        batch["lengths"] = torch.tensor([len(row["input_ids"]) - p for row in ordered])
        if "weight" in rows[0] or any(label != IGNORE for label in labels[1 : p + 1]):
            batch["weights"] = torch.tensor([weights], dtype=torch.float32).gather(1, batch["read"])
        return batch


def read_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose next token is labeled, (b, k), where k is the maximum per row; padded with unlabeled ones."""
    labeled = labels[:, 1:] != IGNORE
    most = int(labeled.sum(1).max()) if len(labeled) else 0
    return (~labeled).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


@dataclass(frozen=True, eq=False)
class Step:
    """Rows of an optimizer step on this process; an object, so that no library recurses into its lists."""

    rows: Sequence[dict[str, Any]]


@dataclass
class StepSplitter:
    """Splits the rows of a step into micro-batches of similar length.

    The rows of a step are sampled before it is split, and the loss is a mean over the whole step. So the split changes
    neither the order of the rows nor the result, and may differ after a training is resumed.

    Args:
        collate: builds the tensors of a micro-batch.
        rows: maximum number of rows per micro-batch.
    """

    collate: Collator | Packer
    rows: int

    def __call__(self, step: Step) -> list[Batch]:
        """Build the micro-batches, those with the longest rows first."""
        groups = self.groups([len(row["input_ids"]) for row in step.rows])
        return [self.collate([step.rows[row] for row in group]) for group in groups]

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Row numbers of each micro-batch, given the lengths of the rows of a step."""
        if len(lengths) <= self.rows:
            return [list(range(len(lengths)))]
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        return [order[at : at + self.rows] for at in range(0, len(order), self.rows)]
