"""Batches of token rows: rows of similar length are grouped and padded to one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scoring with an ONNX graph needs no torch
    import torch


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length into batches of at most `batch_tokens` padded tokens.

    Yields:
        Row numbers, longest rows first, so that running out of memory shows at once. A row of more tokens is a batch
        by itself.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Stack rows of token ids in one tensor (b, s), padded with zeros on the right."""
    import torch

    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids
