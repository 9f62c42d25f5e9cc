"""Micro-batches of one optimiser step: its rows sorted by length and cut, by number or by padded tokens.

The step's rows are drawn before they are cut, so a cut changes neither the order of training nor, because the loss is a
mean over the whole step, what is learnt; and a run goes on from a checkpoint wherever it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finsa.models.batches import batches
from finsa.training.collate import Collator, Packer


@dataclass(frozen=True, eq=False)
class Step:
    """Rows of an optimiser step on this process; an object, so that no library walks through its lists."""

    rows: Sequence[dict[str, Any]]


@dataclass
class Cutter:
    """Cuts a step into micro-batches.

    Args:
        collate: makes the tensors.
        rows: most rows of a micro-batch.
        tokens: most padded tokens of a micro-batch, in place of `rows`; a longer row makes one of its own.
    """

    collate: Collator | Packer
    rows: int
    tokens: int | None = None

    def __call__(self, step: Step) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of like lengths, the longest first."""
        return [self.collate([step.rows[row] for row in group]) for group in self.groups(step)]

    def groups(self, step: Step) -> list[list[int]]:
        """The numbers of the step's rows, by micro-batch."""
        around = len(self.collate.suffix) - self.collate.prefix
        return self.cuts([len(row["input_ids"]) + around for row in step.rows])

    def cuts(self, lengths: Sequence[int]) -> list[list[int]]:
        """The same for rows of such lengths."""
        if self.tokens is not None:
            return list(batches(lengths, self.tokens))
        if len(lengths) <= self.rows:
            return [list(range(len(lengths)))]
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        return [order[at : at + self.rows] for at in range(0, len(order), self.rows)]

    def halve(self, most: int) -> None:
        """Cut smaller from now on.

        Args:
            most: rows of a micro-batch that was too large.
        """
        self.rows = -(-most // 2)
        if self.tokens is not None:
            self.tokens = -(-self.tokens // 2)
