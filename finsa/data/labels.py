"""The classes of a data set, in an order fixed once for every array of the project, and how labels are written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

import polars as pl

from finsa.config import Data, Policy
from finsa.config.data import finite_number
from finsa.data.cleaning import OPEN, decide, folded, keep_domain, mark
from finsa.data.readers import FATE
from finsa.errors import DataError, counted, nearest, suggest

MANY_LABELS = 50  # number of distinct labels above which each needs several rows
ROWS_PER_LABEL = 4
# A leading zero makes a code of digits ("007"), which is not a number.
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,17})(?:\.\d{0,18})?(?:e[+-]?\d{1,2})?")


def number(label: str) -> str | None:
    """A label that is a number in its shortest form: 1 for "1.0", "+1" and "１"; None for any other label."""
    written = unicodedata.normalize("NFKC", label).strip().lower().replace("\u2212", "-")
    if not _NUMBER.fullmatch(written):
        return None
    shortest = format(Decimal(written).normalize(), "f")
    return "0" if shortest == "-0" else shortest


@dataclass(frozen=True)
class LabelSpace:
    """Classes in their fixed order.

    Args:
        names: as the table writes them; for regression, the numbers of the anchors.
        words: as the model answers them; the same length.
        task: of the data set.
        yes_no: templates of the two answers for each label of ``multi_label``; empty for other tasks.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    task: str = "classification"
    yes_no: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts whose probabilities are compared: the words, or yes and no for each label."""
        if not self.yes_no:
            return self.words
        return tuple(answer.replace("{label}", word) for word in self.words for answer in self.yes_no)

    @property
    def numbers(self) -> list[float]:
        """The numbers of the anchors of ``regression``."""
        return [float(finite_number(name) or 0) for name in self.names]

    @property
    def outputs(self) -> int:
        """Number of outputs of a head: one per class, or the predicted number."""
        return 1 if self.task == "regression" else len(self)

    @classmethod
    def of(cls, data: Data, found: Iterable[str]) -> LabelSpace:
        """Take the configured labels; without any, the distinct ones found, sorted; numbers are sorted by value."""
        if data.labels is not None:
            words = data.labels.values() if isinstance(data.labels, dict) else data.labels
            return cls(tuple(data.labels), tuple(words), data.task, data.answers or ())
        numbers = {label: number(label) for label in sorted(set(found))}
        numeric = all(value is not None for value in numbers.values())
        names = tuple(sorted(numbers, key=lambda label: Decimal(str(numbers[label]))) if numeric else numbers)
        return cls(names, names)


def find_labels(frame: pl.DataFrame, data: Data, least: int = 2) -> LabelSpace:
    """The classes: as configured, or the distinct labels of the training split, sorted.

    Spellings that differ only in case, width or white space are one class, under the most frequent spelling. So are
    equal numbers; a whole number is written as one, whatever the most frequent spelling.

    Args:
        frame: the rows; only those without a fate count.
        data: its ``labels``.
        least: how many there must be.

    Raises:
        DataError: for fewer, or for so many that it is not a label column.
    """
    label = pl.col("label").str.strip_chars()
    rows = keep_domain(frame, data).filter(OPEN).select(label, "split").filter(pl.col("label").fill_null("") != "")
    if "train" in rows["split"]:
        rows = rows.filter(pl.col("split") == "train")
    spellings = rows.group_by("label").len().sort(["len", "label"], descending=[True, False])["label"].to_list()
    distinct = dict(zip(reversed(_folds(spellings)), reversed(spellings), strict=True))  # the most frequent wins
    labels = LabelSpace.of(data, map(_without_zeros, distinct.values()))
    numbers = [value for value in map(number, labels.names) if value is not None]
    if len(set(numbers)) < len(numbers):
        twice = next(value for value in numbers if numbers.count(value) > 1)
        raise DataError(f"data.labels: the number {twice} is listed more than once: {', '.join(labels.names)}")
    if len(labels) < least:
        lost = dict(frame.filter(~OPEN).group_by(FATE, maintain_order=True).len().iter_rows())
        if frame.height and sum(lost.values()) == frame.height:
            reasons = ", ".join(f"{fate} ({counted(count)})" for fate, count in lost.items())
            raise DataError(f"data.files: no row of data={data.name} can be used: {reasons}")
        raise DataError(
            f"data.labels: at least two labels are needed, found {list(labels.names)} in data={data.name}. "
            f"Name another column by data.columns.label, or list data.labels; dropped rows: {lost or 'none'}"
        )
    if data.labels is None:
        _require_label_column(labels.names, rows.height, data)
    return labels


def _require_label_column(found: Sequence[str], rows: int, data: Data) -> None:
    """Refuse many labels that were found and not listed, unless most of them occur several times, as 77 intents do."""
    if len(found) > MANY_LABELS and rows < ROWS_PER_LABEL * len(found):
        raise DataError(
            f"data.columns.label: column '{data.columns.label}' has {len(found)} distinct values in {counted(rows)}, "
            f"such as {list(found[:3])}; that is not a label column. Name another, or list data.labels"
        )


def with_unlisted(labels: LabelSpace, frame: pl.DataFrame, data: Data) -> LabelSpace:
    """Add the labels that ``on_unknown_label=keep`` let in, as further classes after the listed ones."""
    if data.on_unknown_label != "keep":
        return labels
    found = frame.filter(OPEN)["label"].unique().sort().to_list()
    unlisted = tuple(label for label in found if label not in labels.names)
    _require_label_column(unlisted, frame.filter(OPEN & pl.col("label").is_in(unlisted)).height, data)
    return replace(labels, names=labels.names + unlisted, words=labels.words + unlisted)


# ------------------------------------------------------------------------------------------------ spelling


def respell(labels: pl.Series, names: Sequence[str]) -> tuple[pl.Series, list[str]]:
    """Replace labels that differ from a name only in case, width or white space by that name.

    If names differ from each other only in these respects, only white space around a label is ignored.

    Returns:
        The labels, those that are not a name without surrounding white space; and notes on what was changed.
    """
    by_fold: dict[str, list[str]] = {}
    for name, fold in zip(names, _folds(names), strict=True):
        by_fold.setdefault(fold, []).append(name)
    written = labels.drop_nulls().value_counts(sort=True).to_series(0).to_list()
    respelled = dict[str, str]()
    for label, fold in zip(written, _folds(written), strict=True):
        alike = [label.strip()] if label.strip() in names else by_fold.get(fold, [])
        respelled[label] = label if label in names else alike[0] if len(alike) == 1 else label.strip()
    changed = {old: new for old, new in respelled.items() if old != new and new in names}
    counts = dict(labels.filter(labels.is_in(list(changed))).value_counts().iter_rows())
    notes = [f"label '{old}' ({counted(counts[old])}) is read as '{changed[old]}'" for old in [*changed][:5]]
    if len(changed) > len(notes):
        notes.append(f"{len(changed) - len(notes)} more spellings of labels are read as another")
    return labels.replace(respelled), notes


def _folds(names: Sequence[str]) -> list[str]:
    """Labels as they are compared: numbers by value, words without regard to case, width and white space."""
    words = pl.DataFrame({"name": names}, schema={"name": pl.String}).select(folded("name"))["name"].to_list()
    return [number(name) or word for name, word in zip(names, words, strict=True)]


def _without_zeros(name: str) -> str:
    """Write a whole number without decimals: 1 for 1.0."""
    return number(name) or name if name.partition(".")[2].strip("0") == "" else name


def translate(labels: pl.Series, data: Data) -> tuple[pl.Series, set[str], list[str]]:
    """Translate labels by ``data.label_map``; what it does not list is left unchanged.

    Returns:
        The labels; the map's keys that occur in them; and notes on their spelling.
    """
    translation = data.label_map or {}
    written, notes = respell(labels, tuple(dict.fromkeys((*translation, *(data.labels or ())))))
    used = set(written.drop_nulls().unique().to_list()) & set(translation)
    return written.replace(translation), used, notes


def unused_keys(data: Data, used: set[str], labels: pl.Series) -> list[str]:
    """A note on keys of ``data.label_map`` that are not labels of the data set.

    No note if no label needs the map, as in a copy of the data set that already has the classes.

    Args:
        data: the map.
        used: its keys that occur.
        labels: translated labels.

    Raises:
        DataError: if no key occurs, and no label is what the map translates to.
    """
    translation = data.label_map or {}
    unused = [key for key in translation if key not in used]
    found = labels.drop_nulls().value_counts(sort=True).to_series(0).to_list()
    untranslated = [label for label in found if label not in translation.values()]
    if not unused or not found or not (used or untranslated):
        return []
    near = nearest(unused[0], untranslated)
    hint = f" Did you mean '{near}'?" if near else ""
    listed = ", ".join(f"'{key}'" for key in unused[:5])
    left = f" Not translated: {', '.join(map(repr, untranslated[:5]))}." if untranslated else ""
    text = f"data.label_map: no row has the label {listed}.{hint}{left}"
    if not used and len(untranslated) == len(found):
        raise DataError(f"{text} The map translates no label of data={data.name}; write its keys as the labels are")
    return [text]


def mark_pairs(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    """Replace rejected labels by the names of their classes, and drop or refuse pairs that are none.

    Rows of the training split need a rejected label, and in every pair it differs from the true one.

    Raises:
        DataError: if ``on_unknown_label`` is not drop, or if no row has a rejected label.
    """
    if data.columns.rejected is None:
        return frame, []
    column, notes = respell(frame["rejected"], labels.names)
    if column.null_count() == len(column):
        raise DataError(f"data.columns.rejected: no row has a label in a column '{data.columns.rejected}'")
    frame = frame.with_columns(column)
    rejected, key = pl.col("rejected"), "data.on_unknown_label"
    unknown = rejected.is_not_null() & ~rejected.is_in(list(labels.names))
    listed = ", ".join(f"'{name}'" for name in frame.filter(OPEN & unknown)["rejected"].unique().sort().head(3))
    training = pl.col("split").is_null() | (pl.col("split") == "train")
    faults = {
        "no rejected label": (rejected.is_null() & training, f"have no text in the column '{data.columns.rejected}'"),
        "unknown rejected label": (unknown, f"have a rejected label that is none: {listed}; {', '.join(labels.names)}"),
        "pair of equal labels": (rejected == pl.col("label"), "have the same label as chosen and as rejected"),
    }
    policy: Policy = "error" if data.on_unknown_label == "keep" else data.on_unknown_label
    for fate, (condition, what) in faults.items():
        frame, _ = decide(frame, condition, policy, key, fate, what, keeps=False)
    return frame, notes


def mark_unknown(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    """Replace labels by the names of their classes, and apply ``on_unknown_label`` to the others.

    Raises:
        DataError: if the policy is error.
    """
    column, spelling = respell(frame["label"], labels.names)
    frame = frame.with_columns(column)
    missing = pl.col("label").fill_null("") == ""
    unknown = ~pl.col("label").is_in(list(labels.names)).fill_null(False)
    frame = keep_domain(frame, data, only=unknown)
    if data.on_unknown_label == "keep":
        frame, unknown = mark(frame, missing, "unknown label"), unknown & ~missing
    unlisted = frame.filter(OPEN & unknown).group_by("label").len().sort(["len", "label"], descending=[True, False])
    listed = ", ".join(f"'{label or '(none)'}' ({counted(count)})" for label, count in unlisted.head(5).iter_rows())
    first = next((label for label in unlisted["label"] if label), "")
    advice = f" {suggest(first, labels.names)} List them all in data.labels." if unlisted.height else ""
    if first.lower() in ("yes", "no", "on", "off") and {"true", "false"} & set(labels.names):
        advice = " YAML reads yes, no, on and off as true and false: quote them, as in ['yes', 'no']."
    what = f"have an unknown label: {listed}; known are {', '.join(labels.names)}"
    key = "data.on_unknown_label"
    frame, notes = decide(frame, unknown, data.on_unknown_label, key, "unknown label", what, advice)
    return frame, spelling + notes
