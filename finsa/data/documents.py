"""Documents for pre-training, generated or read from files, packed into blocks of one length."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Corpus, Data
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
    """Documents to learn from, held out ones, and what became of every row read."""

    learn: list[str]
    held: list[str]
    ledger: Ledger


def load(data: Data, heldout: float) -> Documents:
    """Draw or read the documents of ``data.corpus``.

    Args:
        data: where ``files`` names a labelled set, no document contains a text of its validation or test split.
        heldout: share of documents whose loss is watched, where no file is named after the validation split.

    Raises:
        DataError: for files that cannot be read or hold no document.
    """
    assert data.corpus is not None
    if data.corpus.files is not None:
        return _read(data, data.corpus, heldout)
    assert data.corpus.documents is not None
    number, seed, role = data.corpus.documents, data.corpus.seed, data.corpus.role
    held = protected(data)
    made = generator.corpus(number, seed, held, role)
    ledger = Ledger(Counter(generator=len(made)), Counter({USED: len(made)}))
    return Documents(*_parted(made, data.corpus.seed, heldout), ledger)


def protected(data: Data) -> list[str]:
    """Texts that no document may contain."""
    if data.files is None:
        return []
    held = dataset.load(data)
    return [text for split in ("validation", "test") for text in held.splits[split]["text"].to_list()]


def _parted(documents: list[str], seed: int, heldout: float) -> tuple[list[str], list[str]]:
    random.Random(seed).shuffle(documents)
    kept = max(1, int(heldout * len(documents)))
    return documents[kept:], documents[:kept]


def _read(data: Data, corpus: Corpus, heldout: float) -> Documents:
    found = discovery.find(data.model_copy(update={"files": corpus.files}))
    parts, notes = [], found.notes
    for file, split in found.splits.items():
        raw = readers.read(file, data.csv, lambda columns: corpus.column in columns)
        notes += raw.notes
        place = pl.lit(str(file)).alias("file"), pl.lit(split, dtype=pl.String).alias("split")
        parts.append(raw.frame.select(_text(raw.frame, file, corpus.column), FATE).with_columns(*place))
    frame = mark(_cleaned(pl.concat(parts)), pl.col("split") == "test", "filtered: test split")
    ledger = Ledger(Counter(dict(frame.group_by("file", maintain_order=True).len().iter_rows())), notes=notes)
    ledger.buckets.update(dict(frame.filter(~OPEN).group_by(FATE, maintain_order=True).len().iter_rows()))
    used = frame.filter(OPEN)
    held = used.filter(pl.col("split") == "validation")["text"].to_list()
    learn = used.filter(pl.col("split").is_null() | (pl.col("split") == "train"))["text"].to_list()
    if not held:
        learn, held = _parted(learn, corpus.seed, heldout)
    surplus = 0 if corpus.documents is None else max(0, len(learn) - corpus.documents)
    learn = learn[: corpus.documents]
    if not learn:
        raise DataError(f"data.corpus.files: no document to learn from; rows: {dict(ledger.buckets)}")
    ledger.buckets.update({USED: len(learn) + len(held), **({LIMITED: surplus} if surplus else {})})
    ledger.balance()
    return Documents(learn, held, ledger)


def _text(frame: pl.DataFrame, file: Path, column: str) -> pl.Expr:
    if column not in frame.columns:
        near = nearest(column, frame.columns)
        hint = f" Did you mean data.corpus.column={near}?" if near else ""
        raise DataError(
            f"data.corpus.column: {file} has no column '{column}'; it has {', '.join(frame.columns)}.{hint}"
        )
    return pl.col(column).str.strip_chars().alias("text")


def _cleaned(frame: pl.DataFrame) -> pl.DataFrame:
    """Give empty and damaged documents and later copies their fate; a held-out document keeps its place."""
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
