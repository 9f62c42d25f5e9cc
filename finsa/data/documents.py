"""Documents for pre-training, packed into blocks of one length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from finsa.config import Data
from finsa.data import synthetic, table
from finsa.data.rows import IGNORE, Row


def load(data: Data, heldout: float) -> tuple[list[str], list[str]]:
    """Draw the documents of ``data.corpus``.

    Args:
        data: where ``files`` names a labelled set, no document contains a text of its validation or test split.
        heldout: share of documents whose loss is watched.

    Returns:
        Documents to learn from, and held out ones.
    """
    assert data.corpus is not None
    documents = synthetic.corpus(data.corpus.documents, data.corpus.seed, exclude=protected(data))
    random.Random(data.corpus.seed).shuffle(documents)
    kept = max(1, int(heldout * len(documents)))
    return documents[kept:], documents[:kept]


def protected(data: Data) -> list[str]:
    """Texts that no document may contain."""
    if data.files is None:
        return []
    held = table.load(data)
    return [text for split in ("validation", "test") for text in held.splits[split]["text"].to_list()]


def blocks(documents: Sequence[str], tokenizer: Any, length: int) -> list[Row]:
    """Join documents with end tokens and cut the stream into rows of `length` tokens; the short last one is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    cuts = range(0, len(stream) - length + 1, length)
    rows = [stream[at : at + length] for at in cuts]
    return [Row(input_ids=row, labels=[IGNORE, *row[1:]]) for row in rows]
