"""From files to splits: every row is read, put into one bucket of the ledger, and assigned to one split."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from finsa.config import Data
from finsa.data import sources, splits
from finsa.data.labels import LabelSpace
from finsa.data.ledger import Ledger
from finsa.errors import DataError, suggest


@dataclass(frozen=True)
class Table:
    """A data set, read and divided.

    Args:
        splits: train, validation and test; columns id, text, domain (text) and label (class number).
        labels: the classes in their order.
        ledger: what became of every row.
        fingerprint: hash over ids, texts, labels and splits.
    """

    splits: dict[str, pl.DataFrame]
    labels: LabelSpace
    ledger: Ledger
    fingerprint: str

    def require(self, *names: str) -> None:
        """Check that splits have rows.

        Raises:
            DataError: naming the first empty one.
        """
        for name in names:
            if not self.splits[name].height:
                counts = ", ".join(f"{split} {table.height}" for split, table in self.splits.items())
                raise DataError(
                    f"the {name} split is empty ({counts}). Give it a file of that name, or more rows to divide; "
                    f"dropped rows: {dict(self.ledger.buckets)}"
                )


_tables: dict[str, Table] = {}


def load(data: Data) -> Table:
    """Read a data set; a second call for the same files and settings gives the same object.

    Raises:
        DataError: for files, columns or labels that cannot be used.
    """
    if data.generator is not None:
        from finsa.data.generate import generate

        key, rows, declared = data.model_dump_json(), partial(generate, data), set(splits.SPLITS)
    else:
        files = sources.find_files(data)
        stamps = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        key, rows = f"{data.model_dump_json()}{stamps}", partial(_read_all, files, data)
        declared = {split for split in files.values() if split is not None}
    if key not in _tables:
        _tables[key] = _make(rows(), data, declared)
    return _tables[key]


def _read_all(files: dict[Path, str | None], data: Data) -> pl.DataFrame:
    parts = [
        sources.read(file, data.columns).with_columns(
            pl.lit(split, dtype=pl.String).alias("split"), pl.lit(str(file)).alias("file")
        )
        for file, split in files.items()
    ]
    return pl.concat(parts)


def _make(rows: pl.DataFrame, data: Data, declared: set[str]) -> Table:
    ledger = Ledger(read=Counter(rows["file"].to_list()))
    rows = rows.with_columns(pl.col("text").str.strip_chars(), pl.col("label").str.strip_chars())
    rows = _keep(rows, pl.col("text").fill_null("") != "", ledger, "empty text")
    if data.domain is not None and rows["domain"].null_count() < rows.height:
        rows = _of_domain(rows, data.domain, ledger)
    labels = _label_space(rows, data)
    rows = _known_labels(rows, labels, data, ledger)
    rows = _divide(rows, data, declared)
    rows = _no_leak(rows, ledger)
    ledger.buckets["used"] += rows.height
    ledger.balance()
    numbers = {name: number for number, name in enumerate(labels.names)}
    rows = rows.with_columns(pl.col("label").replace_strict(numbers, return_dtype=pl.Int64))
    parts = {name: rows.filter(pl.col("split") == name).drop("split", "file") for name in splits.SPLITS}
    for name, part in parts.items():
        counts = Counter(part["label"].to_list())
        ledger.splits[name] = {label: counts[number] for label, number in numbers.items()}
    return Table(parts, labels, ledger, _fingerprint(rows))


def _of_domain(rows: pl.DataFrame, domain: str, ledger: Ledger) -> pl.DataFrame:
    kept = _keep(rows, (pl.col("domain") == domain).fill_null(False), ledger, f"not of domain {domain}")
    if not kept.height:
        hint = suggest(domain, rows["domain"].drop_nulls().unique())
        raise DataError(f"data.domain: no row is of domain '{domain}'. {hint}")
    return kept


def _keep(rows: pl.DataFrame, condition: pl.Expr, ledger: Ledger, bucket: str) -> pl.DataFrame:
    kept = rows.filter(condition)
    if kept.height < rows.height:
        ledger.buckets[bucket] += rows.height - kept.height
    return kept


def _label_space(rows: pl.DataFrame, data: Data) -> LabelSpace:
    labelled = rows.filter(pl.col("label").fill_null("") != "")
    training = labelled.filter(pl.col("split") == "train") if "train" in labelled["split"] else labelled
    labels = LabelSpace.of(data, training["label"].to_list())
    if len(labels) < 2:
        raise DataError(f"data.labels: at least two labels are needed, found {list(labels.names)} in data={data.name}")
    if len(labels) > 50:
        raise DataError(
            f"data.columns.label: column '{data.columns.label}' has {len(labels)} distinct values, such as "
            f"{list(labels.names[:3])}; that is no label column. Name another, or list data.labels"
        )
    return labels


def _known_labels(rows: pl.DataFrame, labels: LabelSpace, data: Data, ledger: Ledger) -> pl.DataFrame:
    known = pl.col("label").is_in(labels.names).fill_null(False)
    strangers = Counter(label or "(none)" for label in rows.filter(~known)["label"].to_list())
    if strangers and data.on_unknown_label == "error":
        listed = ", ".join(f"'{label}' ({count} rows)" for label, count in strangers.most_common(5))
        raise DataError(
            f"data.labels: unknown labels {listed}; known are {', '.join(labels.names)}. "
            f"{suggest(next(iter(strangers)), labels.names)} List them all in data.labels, "
            f"or set data.on_unknown_label=drop"
        )
    return _keep(rows, known, ledger, "unknown label")


def _divide(rows: pl.DataFrame, data: Data, present: set[str]) -> pl.DataFrame:
    """Fill in what the files leave open: all splits, or the missing ones out of the training rows.

    A split that has a file stays what that file says, be it empty in the end.
    """
    if not present:
        assigned = splits.by_class(rows["label"].to_list(), data.split.validation, data.split.test, data.split.seed)
        return rows.with_columns(pl.Series("split", assigned, dtype=pl.String))
    if "train" not in present or present == set(splits.SPLITS):
        return rows
    training, rest = rows.filter(pl.col("split") == "train"), rows.filter(pl.col("split") != "train")
    shares = {name: 0.0 if name in present else getattr(data.split, name) for name in ("validation", "test")}
    assigned = splits.by_class(training["label"].to_list(), shares["validation"], shares["test"], data.split.seed)
    return pl.concat([training.with_columns(pl.Series("split", assigned, dtype=pl.String)), rest])


def _no_leak(rows: pl.DataFrame, ledger: Ledger) -> pl.DataFrame:
    """Take out what is also tested: training copies of test and validation texts, validation copies of test texts."""
    for held, others in (("test", ("train", "validation")), ("validation", ("train",))):
        texts = rows.filter(pl.col("split") == held)["text"].implode()
        for other in others:
            copied = (pl.col("split") == other) & pl.col("text").is_in(texts)
            rows = _keep(rows, ~copied, ledger, f"{'training' if other == 'train' else other} copy of a {held} row")
    return rows


def _fingerprint(rows: pl.DataFrame) -> str:
    digest = hashlib.sha256()
    for row in rows.select("split", "id", "text", "label").iter_rows():
        digest.update("\x1f".join(map(str, row)).encode() + b"\x1e")
    return digest.hexdigest()[:16]
