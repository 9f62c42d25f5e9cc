"""Labels that are not one class: a number (task=regression), or any number of labels (task=multi_label)."""

from __future__ import annotations

import ast
import json
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finsa.config import Data
from finsa.config.base import MEASURES
from finsa.config.data import finite_number
from finsa.data.cleaning import OPEN, decide, keep_domain
from finsa.data.labels import LabelSpace, respell, translate
from finsa.errors import DataError, counted, suggest

TASKS = tuple(MEASURES)
VALUES = "values"  # column with a list per row: its number, or a 1 for each label that it has and a 0 for the others
NOT_LABELS = "unreadable: the labels are neither a text nor a list of texts"
KEY = "data.on_unknown_label"


def matrix(rows: pl.DataFrame, width: int) -> NDArray[np.float64]:
    """The values of rows, (n, width)."""
    return np.array(rows[VALUES].to_list(), dtype=np.float64).reshape(rows.height, width)


def split(cells: pl.Series, data: Data) -> tuple[pl.Series, pl.Expr, set[str], list[str]]:
    """Split the cells of a label column into labels, and translate each by ``data.label_map``.

    Returns:
        The labels of each cell, joined by ``data.separator``, empty for a list without labels and null for an empty
        cell; whether a cell cannot be split; the map's keys that occur; and notes on spellings.
    """
    parts = {cell: _labels_of(cell, data.separator) for cell in cells.drop_nulls().unique().to_list()}
    found = pl.Series("label", [label for cell in cells for label in parts.get(cell) or ()], dtype=pl.String)
    translated, used, notes = translate(found, data)
    new = dict(zip(found, translated, strict=True))
    joined = {
        cell: data.separator.join(dict.fromkeys(new[label] for label in labels))
        for cell, labels in parts.items()
        if labels is not None and cell.strip()
    }
    unsplit = pl.lit(pl.Series([cell in parts and parts[cell] is None for cell in cells], dtype=pl.Boolean))
    return pl.Series("label", map(joined.get, cells), dtype=pl.String), unsplit, used, notes


def _labels_of(cell: str, separator: str) -> list[str] | None:
    """The labels in a cell: those of a list, or of a text with separators; None if it is neither.

    A list is written in JSON, or in Python, as pandas writes it into CSV. Its numbers and booleans are read as single
    ones are.
    """
    items: Any = [cell]
    if cell.lstrip().startswith(("[", "{")):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                items = parse(cell)
                break
    if not isinstance(items, list) or not all(isinstance(item, str | int | float) and item == item for item in items):
        return None  # only NaN, an empty entry, differs from itself
    texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
    return [label for text in texts for part in text.split(separator) if (label := part.strip())]


def read(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    """Add the column ``VALUES``, write equal labels equally, and apply ``on_unknown_label`` to labels without a value.

    Raises:
        DataError: if the policy is error; with files and lines.
    """
    return (_numbers if data.task == "regression" else _sets)(frame, data, labels)


def _numbers(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    low, high = labels.numbers[0], labels.numbers[-1]
    known = {text: finite_number(text) for text in frame["label"].drop_nulls().unique().to_list()}
    inside = {text: value for text, value in known.items() if value is not None and low <= value <= high}
    value = pl.col("label").replace_strict(inside, default=None, return_dtype=pl.Float64)
    frame = frame.with_columns(value.alias(VALUES))
    unknown = pl.col(VALUES).is_null()
    frame = keep_domain(frame, data, only=unknown)
    listed = _listed(frame.filter(OPEN & unknown))
    what = f"have a label that is not a number from {low:,.15g} to {high:,.15g}: {listed}"
    advice = " The first and the last of data.labels limit the range."
    fate = "label out of range or not a number"
    frame, notes = decide(frame, unknown, data.on_unknown_label, KEY, fate, what, advice, keeps=False)
    text = pl.when(unknown).then("label").otherwise(pl.col(VALUES).cast(pl.String))
    return frame.with_columns(text.alias("label"), pl.concat_list(VALUES).alias(VALUES)), notes


def _sets(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    missing = pl.col("label").is_null()
    frame = keep_domain(frame, data, only=missing)
    what = "have an empty label cell; a row without labels has the empty list []"
    frame, notes = decide(frame, missing, data.on_unknown_label, KEY, "no label", what, keeps=False)
    distinct = {cell: cell.split(data.separator) if cell else [] for cell in frame["label"].drop_nulls().unique()}
    every = pl.Series(sorted({label for cell in distinct.values() for label in cell}), dtype=pl.String)
    names = dict(zip(every, respell(every, labels.names)[0], strict=True))
    cells = frame.filter(OPEN)["label"].drop_nulls().unique(maintain_order=True)
    used = list(dict.fromkeys(label for cell in cells for label in distinct[cell]))
    if cells.len() and not any(names[label] in labels.names for label in used):
        found = f"they have {', '.join(map(repr, used[:5]))}" if used else "all have the empty list"
        raise DataError(
            f"data.labels: no row has any of {', '.join(labels.names)}; {found}. List the labels of the rows, or check "
            "data.columns.label, data.separator and data.label_map"
        )
    unlisted = [label for label in every if names[label] not in labels.names]
    if unlisted:
        met = pl.col("label").is_in([cell for cell, found in distinct.items() if not set(unlisted).isdisjoint(found)])
        rows = frame.filter(OPEN & met)
        counts = Counter(label for cell in rows["label"] for label in distinct[cell] if label in unlisted)
        listed = ", ".join(f"'{label}' ({counted(count)})" for label, count in counts.most_common(5))
        if data.on_unknown_label == "drop" and counts:
            verb = "is" if len(counts) == 1 else "are"
            what = f"{counted(len(counts), 'unlisted label')} of {counted(rows.height)} {verb} ignored"
            notes.append(f"{what}: {listed}")
        elif counts:
            advice = f" {suggest(next(iter(counts)), labels.names)} data.on_unknown_label=drop ignores these labels."
            decide(frame, met, "error", KEY, "", f"have labels that are not in data.labels: {listed}", advice, False)
    sets = {cell: {names[label] for label in found} for cell, found in distinct.items()}
    text = {cell: data.separator.join(name for name in labels.names if name in has) for cell, has in sets.items()}
    values = {cell: [float(name in has) for name in labels.names] for cell, has in sets.items()}
    column = pl.Series(VALUES, map(values.get, frame["label"]), dtype=pl.List(pl.Float64))
    return frame.with_columns(column, pl.col("label").replace(text)), notes


def with_classes(frame: pl.DataFrame, labels: LabelSpace) -> pl.DataFrame:
    """Replace the labels of usable rows by a class, by which rows are split, sampled and counted.

    The class is the nearest anchor of a number, or the rarest label of a set; rows without labels are a class of their
    own.
    """
    rows = frame.filter(OPEN).select("label", VALUES).unique("label", maintain_order=True)
    if labels.task == "regression":
        nearest = np.abs(matrix(rows, 1) - np.array(labels.numbers)).argmin(axis=1)
        classes = [labels.names[number] for number in nearest]
    else:
        sets, counts = matrix(rows, len(labels)), matrix(frame.filter(OPEN), len(labels)).sum(axis=0)
        rarest = np.where(sets > 0, counts, np.inf).argmin(axis=1)
        classes = [labels.names[number] if has.any() else "" for has, number in zip(sets, rarest, strict=True)]
    label = pl.col("label").replace(dict(zip(rows["label"], classes, strict=True)))
    return frame.with_columns(pl.when(OPEN).then(label).otherwise("label").alias("label"))


def _listed(rows: pl.DataFrame) -> str:
    """The most frequent labels of rows, with their numbers of rows."""
    counts = rows.group_by("label").len().sort(["len", "label"], descending=[True, False]).head(5).iter_rows()
    return ", ".join(f"'{label or '(none)'}' ({counted(count)})" for label, count in counts)
