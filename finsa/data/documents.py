"""Documents for pre-training, generated or read from files, packed into blocks of one length."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Data
from finsa.data import dataset, discovery, readers
from finsa.data.cleaning import OPEN, folded, mark
from finsa.data.ledger import USED, Ledger
from finsa.data.readers import FATE
from finsa.data.rows import IGNORE, Row
from finsa.errors import DataError, nearest
from finsa.synthetic import generator

LIMITED = "filtered: more than data.corpus.documents"


@dataclass(frozen=True)
class Documents:
    """Documents to train on, held-out ones, and the fate of every row read."""

    learn: list[str]
    held: list[str]
    ledger: Ledger


def load(data: Data, heldout: float) -> Documents:
    """Generate or read the documents of ``data.corpus``.

    Args:
        data: if ``files`` is a labeled data set, generated documents contain no text of its validation or test split.
        heldout: share of the documents that is held out, if no file is named after the validation split.

    Raises:
        DataError: for files that cannot be read or hold no document.
    """
    corpus = data.corpus
    assert corpus is not None
    if corpus.files is None:
        assert corpus.documents is not None
        generated = generator.corpus(corpus.documents, corpus.seed, protected(data), corpus.role)
        ledger = Ledger(Counter(generator=len(generated)), Counter({USED: len(generated)}))
        return Documents(*_hold_out(generated, corpus.seed, heldout), ledger)
    found = discovery.find(data.model_copy(update={"files": corpus.files}))
    frame, notes = _read(found.splits, data, corpus.column)
    frame = mark(_clean(frame), pl.col("split") == "test", "filtered: test split")
    ledger = Ledger(Counter(dict(frame.group_by("file", maintain_order=True).len().iter_rows())))
    ledger.notes += [*found.notes, *notes]
    ledger.buckets.update(dict(frame.filter(~OPEN).group_by(FATE, maintain_order=True).len().iter_rows()))
    used = frame.filter(OPEN)
    held = used.filter(pl.col("split") == "validation")["text"].to_list()
    learn = used.filter(pl.col("split").is_null() | (pl.col("split") == "train"))["text"].to_list()
    if not held:
        learn, held = _hold_out(learn, corpus.seed, heldout)
    surplus = 0 if corpus.documents is None else max(0, len(learn) - corpus.documents)
    learn = learn[: corpus.documents]
    if not learn:
        raise DataError(f"data.corpus.files: no document to learn from; rows: {dict(ledger.buckets)}")
    ledger.buckets.update({USED: len(learn) + len(held), **({LIMITED: surplus} if surplus else {})})
    ledger.balance()
    return Documents(learn, held, ledger)


def protected(data: Data) -> list[str]:
    """Held-out texts of the labeled data set, which no generated document may contain."""
    if data.files is None:
        return []
    held = dataset.load(data)
    return [text for split in ("validation", "test") for text in held.splits[split]["text"].to_list()]


def _hold_out(documents: list[str], seed: int, heldout: float) -> tuple[list[str], list[str]]:
    random.Random(seed).shuffle(documents)
    size = max(1, int(heldout * len(documents)))
    return documents[size:], documents[:size]


def _read(files: Mapping[Path, str | None], data: Data, column: str) -> tuple[pl.DataFrame, list[str]]:
    """Read all files: rows with text, fate, file and split; and notes."""
    parts, notes = [], list[str]()
    for file, split in files.items():
        raw = readers.read(file, data.csv, lambda columns: column in columns)
        if column not in raw.frame.columns:
            near = nearest(column, raw.frame.columns)
            hint = f" Did you mean data.corpus.column={near}?" if near else ""
            has = ", ".join(raw.frame.columns)
            raise DataError(f"data.corpus.column: {file} has no column '{column}'; it has {has}.{hint}")
        place = pl.lit(str(file)).alias("file"), pl.lit(split, dtype=pl.String).alias("split")
        parts.append(raw.frame.select(pl.col(column).str.strip_chars().alias("text"), FATE).with_columns(*place))
        notes += raw.notes
    return pl.concat(parts), notes


def _clean(frame: pl.DataFrame) -> pl.DataFrame:
    """Mark empty and damaged documents and copies; of two copies the held-out one is kept, or else the first."""
    frame = mark(frame, pl.col("text").fill_null("") == "", "empty text")
    frame = mark(frame, pl.col("text").str.contains("[\x00\ufffd]"), "unreadable: damaged characters")
    rank = pl.col("split").replace_strict({"test": 0, "validation": 1}, default=2, return_dtype=pl.Int8)
    frame = frame.with_columns(folded("text").hash().alias("_key")).with_row_index("_row")
    first = frame.filter(OPEN).sort(rank, "_row").unique("_key", keep="first")["_row"]
    return mark(frame, ~pl.col("_row").is_in(first.implode()), "duplicate").drop("_key", "_row")


def blocks(documents: Sequence[str], tokenizer: Any, length: int) -> list[Row]:
    """Join documents with end tokens and cut the stream into rows of `length` tokens; the short last one is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    cuts = range(0, len(stream) - length + 1, length)
    rows = [stream[at : at + length] for at in cuts]
    return [Row(input_ids=row, labels=[IGNORE, *row[1:]]) for row in rows]
