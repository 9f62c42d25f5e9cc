"""Batches of rows of token ids: rows of similar length side by side, padded to one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length into batches of at most `batch_tokens` padded tokens.

    Yields:
        Row numbers; longest first, so that a memory problem shows at once. A longer row makes a batch of its own.
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
    """Put rows of ids into one tensor (b, s), zeros on the right."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids
