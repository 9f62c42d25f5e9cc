"""Rows to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finsa.data.rows import IGNORE

# Of a row's further fields, those that rows have: the batch's name for each, and its type.
FIELDS = {
    "weight": ("weights", torch.float32),
    "target": ("targets", torch.long),
    "text_span": ("text_span", torch.long),
    "domain": ("domains", torch.long),
}


class Collator:
    """Pads rows on the right to the longest of the batch; no mask is needed there for a causal model.

    Args:
        pad: the id that fills; never learnt, never seen by a real token.
        suffix: ids put behind every row and not counted as its own: the label tree's, where labels are chosen from.
    """

    def __init__(self, pad: int, suffix: Sequence[int] = ()) -> None:
        self.pad, self.suffix = pad, torch.tensor(suffix, dtype=torch.long)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Returns:
            ``input_ids`` and ``labels``, both (b, s), and the number of real tokens, ``lengths`` (b,); where rows have
            them ``weights`` (b,), ``targets`` (b,), ``text_span`` (b, 2) and ``domains`` (b,).
        """
        lengths = [len(row["input_ids"]) for row in rows]
        ids = torch.full((len(rows), max(lengths) + len(self.suffix)), self.pad)
        labels = torch.full_like(ids, IGNORE)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[number, :length] = torch.as_tensor(row["input_ids"])
            ids[number, length : length + len(self.suffix)] = self.suffix
            labels[number, :length] = torch.as_tensor(row["labels"])
        batch = {"input_ids": ids, "labels": labels, "lengths": torch.tensor(lengths)}
        for field, (name, kind) in FIELDS.items():
            if field in rows[0]:
                batch[name] = torch.tensor([row[field] for row in rows], dtype=kind)
        return batch
