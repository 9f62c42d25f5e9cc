"""Bring what a file holds into one shape: id, text, label, domain, parent, group, fixed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import polars as pl

from finsa.config import Columns, Data
from finsa.data import cleaning, conversations
from finsa.data.readers import FATE, LINE, Raw
from finsa.errors import DataError, nearest

FIXED = "fixed"


def shape(raw: Raw, data: Data, place: str, stem: str) -> pl.DataFrame:
    """Bring a file's own columns into the common shape.

    Args:
        raw: the file as read; takes notes of what is changed, and the keys of ``data.label_map`` that occur.
        data: says what the columns are called and what is made of them.
        place: named in errors.
        stem: begins the ids of rows that have none.

    Returns:
        Columns id, text, label, domain, parent, group, ``LINE``, ``FATE``, and fixed: the number of the text's leading
        characters that are never truncated.
    """
    raw, columns = _as_table(raw, data, place)
    frame = _checked_text(raw, columns, place)
    picked = [_column(raw, place, columns, name) for name in ("text", "label")]
    picked += [_optional(raw, place, columns, name) for name in ("domain", "parent", "group")]
    numbers = pl.lit(f"{stem}-") + pl.int_range(1, pl.len() + 1).cast(pl.String)
    picked.append(pl.coalesce(_optional(raw, place, columns, "id"), numbers).alias("id"))
    picked.append((pl.col("_fixed") if data.source in conversations.USED else pl.lit(0)).alias(FIXED))
    shaped = frame.select(*picked, LINE, FATE)
    if data.options:
        shaped = _chosen_option(shaped, raw, data, place)
    if data.extract:
        shaped = _extracted(shaped, data.extract)
    if data.label_map:
        labels, used, notes = cleaning.mapped(shaped["label"], data)
        raw.notes += [f"{Path(place).name}: {note}" for note in notes]
        raw.mapped |= used
        shaped = shaped.with_columns(labels)
    return shaped.select("id", "text", "label", "domain", "parent", "group", LINE, FATE, FIXED)


def has_text(data: Data, columns: list[str]) -> bool:
    """Whether columns of these names hold what a data set reads its texts from."""
    if data.source == "alpaca":
        return set(conversations.INSTRUCTION) <= set(columns)
    if data.source == "messages":
        return conversations.chat_column(data, columns) is not None
    return data.columns.text in columns


def _spelt(labels: pl.Series, names: tuple[str, ...], raw: Raw, place: str) -> pl.Series:
    mended, notes = cleaning.spelt(labels, tuple(dict.fromkeys(names)))
    raw.notes += [f"{Path(place).name}: {note}" for note in notes]
    return mended


def _extracted(shaped: pl.DataFrame, pattern: str) -> pl.DataFrame:
    """Take the text out of its wording; Python's own search, because that is what the configuration checks."""
    search = re.compile(pattern, re.DOTALL).search
    matches = [search(text) if text is not None else None for text in shaped["text"].to_list()]
    found = pl.Series("_found", [match[1] if match else None for match in matches], dtype=pl.String)
    shaped = shaped.with_columns(found)
    missed = pl.col("_found").is_null() & (pl.col("text").str.strip_chars() != "")
    shaped = cleaning.mark(shaped, missed, "unreadable: data.extract finds nothing")
    return shaped.with_columns(pl.coalesce("_found", "text").alias("text"), pl.lit(0).alias(FIXED))


def _as_table(raw: Raw, data: Data, place: str) -> tuple[Raw, Columns]:
    """Turn instruction rows and chats into a table of text and label; what of them is not read is noted."""
    if data.source not in conversations.USED:
        return raw, data.columns
    if data.source == "alpaca":
        _require(raw, place, conversations.INSTRUCTION, "data.source=alpaca")
    elif conversations.chat_column(data, raw.columns()) is None:
        _require(raw, place, conversations.CHATS[:1], "data.source=messages")
    wanted = conversations.fields_of(data, raw.columns())
    found = [conversations.read(row, data) for row in raw.frame.select(wanted).iter_rows(named=True)]
    frame = raw.frame.with_columns(
        pl.Series("_text", [row.text for row in found], dtype=pl.String),
        pl.Series("_label", [row.answer for row in found], dtype=pl.String),
        pl.Series("_fixed", [row.fixed for row in found], dtype=pl.Int64),
        pl.Series("_fault", [row.fault for row in found], dtype=pl.String),
    )
    lists = [line for name in ("instruction", "input", "output") for line in raw.nested.get(name, [])]
    if data.source == "alpaca":
        frame = cleaning.mark(frame, pl.col(LINE).is_in(lists), conversations.NOT_TEXT)
    frame = cleaning.mark(frame, pl.col("_fault").is_not_null(), pl.col("_fault"))
    if data.source == "messages":
        unanswered = "unreadable: the last turn is no answer, and there is no label"
        frame = cleaning.mark(frame, pl.col("_label").is_null(), unanswered)
    counts = Counter(name for row in found if row.fault is None for name in row.unused)
    unused = [f"{name} of {rows:,} rows" for name, rows in counts.items()]
    last = " (data.turns=last)" if data.turns == "last" else ""
    raw.notes += [f"{Path(place).name}: not read: {', '.join(unused)}{last}"] * bool(unused)
    columns = data.columns.model_copy(update={"text": "_text", "label": "_label"})
    return replace(raw, frame=frame.drop("_fault"), nested={}), columns


def _chosen_option(shaped: pl.DataFrame, raw: Raw, data: Data, place: str) -> pl.DataFrame:
    """Replace a label that names an option by that option's text; a letter that is no option stays, as unknown."""
    options = data.options or ()
    _require(raw, place, options, "data.options")
    letter = _spelt(shaped["label"], (*options, *(data.labels or ())), raw, place)
    chosen = pl.coalesce(
        *(pl.when(letter == option).then(raw.frame[option].str.strip_chars()) for option in options), letter
    )
    return shaped.with_columns(chosen.alias("label"))


def _checked_text(raw: Raw, columns: Columns, place: str) -> pl.DataFrame:
    """Check that the text column holds text; single rows that do not are unreadable.

    Raises:
        DataError: where no row does.
    """
    nested = raw.nested.get(columns.text, [])
    kind = raw.kinds.get(columns.text) or ("lists or objects" if nested and len(nested) == raw.frame.height else None)
    if kind is not None:
        raise DataError(f"data.columns.text: column '{columns.text}' of {place} holds {kind}, not text. Name another")
    return cleaning.mark(raw.frame, pl.col(LINE).is_in(nested), "unreadable: the text is a list or object")


def _require(raw: Raw, place: str, wanted: Iterable[str], key: str) -> None:
    missing = [name for name in wanted if name not in raw.columns()]
    if missing:
        raise DataError(
            f"data.files: {place} has no field '{missing[0]}', which {key} needs; it has {', '.join(raw.columns())}"
            f"{_other_form(raw)}"
        )


def _other_form(raw: Raw) -> str:
    """Which choice of data reads rows with these fields, where it is not a table."""
    form = conversations.form_of(raw.columns())
    kinds = {"messages": "chats", "alpaca": "instruction rows"}
    return f". These are {kinds[form]}, which data={form} data.files=<files> reads" if form else ""


def _column(raw: Raw, place: str, columns: Columns, name: str) -> pl.Expr:
    wanted = str(getattr(columns, name))
    if wanted not in raw.columns():
        raise _missing(raw, place, wanted, name)
    return pl.col(wanted).alias(name)


def _missing(raw: Raw, place: str, wanted: str, name: str) -> DataError:
    near = nearest(wanted, raw.columns())
    hint = f"Did you mean data.columns.{name}={near}?" if near else f"Set data.columns.{name}=<column>."
    if name in ("text", "label"):
        hint = _other_form(raw).removeprefix(". ") or hint
    hint = _no_header(raw, place) or hint
    has = ", ".join(raw.columns())
    return DataError(f"data.columns.{name}: {place} has no column '{wanted}'; it has {has}. {hint}")


def _no_header(raw: Raw, place: str) -> str | None:
    """What to set where the first row of a file looks like the others: it is long, or repeated below."""
    names, frame = raw.columns(), raw.frame
    alike = [name for name in names if len(name) > 40 or (frame[name] == name).sum() > 0]
    if Path(place).suffix.lower() not in (".csv", ".tsv", ".xlsx") or len(names) < 2 or not alike or not frame.height:
        return None
    label = min(names, key=lambda name: frame[name].n_unique())
    text = max(names, key=lambda name: float(frame[name].str.len_chars().mean() or 0))  # type: ignore[arg-type]
    called = {text: "text", label: "label"}
    guess = ",".join(called.get(name, f"column_{number}") for number, name in enumerate(names, 1))
    return f'Where its first row is no header, name the columns: "data.csv.header=[{guess}]"'


def _optional(raw: Raw, place: str, columns: Columns, name: str) -> pl.Expr:
    """A column that a table may lack, and whose cells may be empty: null, so that empty ones are not alike."""
    wanted = getattr(columns, name)
    if wanted not in (None, name, *raw.columns()):  # the default name may be absent, a name the user wrote may not
        raise _missing(raw, place, str(wanted), name)
    if wanted not in raw.columns():
        return pl.lit(None, dtype=pl.String).alias(name)
    given = pl.col(str(wanted)).str.strip_chars()
    return pl.when(given != "").then(given).alias(name)
