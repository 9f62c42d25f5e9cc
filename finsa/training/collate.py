"""Rows to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finsa.data.rows import IGNORE


class Collator:
    """Pads rows on the right to the longest of the batch; no mask is needed there for a causal model.

    Args:
        pad: the id that fills; never learnt, never seen by a real token.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch: ``input_ids`` and ``labels``, both (b, s), and the number of real tokens, ``lengths`` (b,)."""
        lengths = [len(row["input_ids"]) for row in rows]
        ids = torch.full((len(rows), max(lengths)), self.pad)
        labels = torch.full_like(ids, IGNORE)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[number, :length] = torch.as_tensor(row["input_ids"])
            labels[number, :length] = torch.as_tensor(row["labels"])
        return {"input_ids": ids, "labels": labels, "lengths": torch.tensor(lengths)}
