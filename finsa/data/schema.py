"""The common schema: files and single rows are converted to id, text, target, label and further columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Columns, Data
from finsa.data import conversations, labels, values
from finsa.data.cleaning import mark, normalize
from finsa.data.prompts import with_target
from finsa.data.readers import FATE, LINE, Raw
from finsa.errors import DataError, counted, nearest

FIXED = "fixed"
NO_MATCH = "unreadable: data.extract finds nothing"
_DAMAGED = re.compile("[\ufffd\ud800-\udfff]")  # JSON can write half of a surrogate pair, which no encoding can


def shape(raw: Raw, data: Data, place: str, stem: str) -> pl.DataFrame:
    """Convert the columns of a file to the common schema.

    Args:
        raw: the file; notes on changes and the keys of ``data.label_map`` that occur are added.
        data: configures the columns and how they are read.
        place: name of the file in messages.
        stem: prefix of the ids of rows without one.

    Returns:
        Columns id, text, target, label, rejected (a wrong label), domain, parent, group, rationale, time, ``LINE``,
        ``FATE``, and fixed: the number of the text's leading characters that are never truncated.

    Raises:
        DataError: for a missing column, or a text column that does not contain text.
    """
    columns = data.columns
    if data.source in conversations.USED:
        raw, columns = _render_conversations(raw, data, place)
    nested = raw.nested.get(columns.text, [])
    kind = raw.kinds.get(columns.text) or ("lists or objects" if nested and len(nested) == raw.frame.height else None)
    if kind is not None:
        raise DataError(
            f"data.columns.text: column '{columns.text}' of {place} contains {kind}, not text. Name another"
        )
    frame = mark(raw.frame, pl.col(LINE).is_in(nested), conversations.NOT_TEXT)
    common = ("text", "target", "label", "rejected", "domain", "parent", "group", "rationale", "time")
    selected = [_column(raw, place, columns, name) for name in common]
    numbered = pl.lit(f"{stem}-") + pl.int_range(1, pl.len() + 1).cast(pl.String)
    ids = pl.coalesce(_column(raw, place, columns, "id"), numbered).alias("id")
    fixed = (pl.col("_fixed") if data.source in conversations.USED else pl.lit(0)).alias(FIXED)
    shaped = frame.select(*selected, ids, fixed, LINE, FATE)
    if data.options:
        # A label that names an option is replaced by its text; any other one is unchanged, and later unknown.
        _require(raw, place, data.options, "data.options")
        names = tuple(dict.fromkeys((*data.options, *(data.labels or ()))))
        letter, notes = labels.respell(shaped["label"], names)
        raw.notes += [f"{Path(place).name}: {note}" for note in notes]
        texts = (pl.when(letter == name).then(raw.frame[name].str.strip_chars()) for name in data.options)
        shaped = shaped.with_columns(pl.coalesce(*texts, letter).alias("label"))
    if data.extract:
        # Python's regular expressions, because the configuration was checked with them.
        search = re.compile(data.extract, re.DOTALL).search
        matches = [search(text) if text is not None else None for text in shaped["text"].to_list()]
        found = pl.Series("_found", [match[1] if match else None for match in matches], dtype=pl.String)
        missed = pl.col("_found").is_null() & (pl.col("text").str.strip_chars() != "")
        shaped = mark(shaped.with_columns(found), missed, NO_MATCH)
        shaped = shaped.with_columns(pl.coalesce("_found", "text").alias("text"), pl.lit(0).alias(FIXED))
    if data.task == "multi_label":
        cells, unsplit, used, notes = values.split(shaped["label"], data)
        shaped = mark(shaped.with_columns(cells), unsplit, values.NOT_LABELS)
    elif data.label_map:
        translated, used, notes = labels.translate(shaped["label"], data)
        shaped = shaped.with_columns(translated, labels.translate(shaped["rejected"], data)[0])
    else:
        used, notes = set(), []
    raw.notes += [f"{Path(place).name}: {note}" for note in notes]
    raw.mapped |= used
    return shaped.select("id", *common, LINE, FATE, FIXED)


def has_text(data: Data, columns: Collection[str], answered: bool = True) -> bool:
    """Whether columns of these names contain the texts of a data set.

    Args:
        data: its source and columns.
        columns: names.
        answered: whether instruction rows need their answers, as they do for training.
    """
    if data.source == "alpaca":
        return {*conversations.instruction_fields(data)} <= {*columns} if answered else "instruction" in columns
    if data.source == "messages":
        return conversations.chat_column(data, columns) is not None
    return data.columns.text in columns


def _render_conversations(raw: Raw, data: Data, place: str) -> tuple[Raw, Columns]:
    """Convert instruction rows and chats to columns of text and label; a note lists what is not read."""
    if data.source == "alpaca":
        _require(raw, place, conversations.instruction_fields(data), "data.source=alpaca")
    elif conversations.chat_column(data, raw.columns()) is None:
        _require(raw, place, conversations.CHATS[:1], "data.source=messages")
    wanted = conversations.fields_of(data, raw.columns())
    found = [conversations.render(row, data) for row in raw.frame.select(wanted).iter_rows(named=True)]
    frame = raw.frame.with_columns(
        pl.Series("_text", [row.text for row in found], dtype=pl.String),
        pl.Series("_label", [row.answer for row in found], dtype=pl.String),
        pl.Series("_fixed", [row.fixed for row in found], dtype=pl.Int64),
        pl.Series("_fault", [row.fault for row in found], dtype=pl.String),
    )
    if data.columns.rejected in raw.columns():
        rejected = map(conversations.answer_of, frame[data.columns.rejected])
        frame = frame.with_columns(pl.Series(data.columns.rejected, rejected, dtype=pl.String))
    if data.source == "alpaca":
        lists = [line for name in ("instruction", "input", "output") for line in raw.nested.get(name, [])]
        frame = mark(frame, pl.col(LINE).is_in(lists), conversations.NOT_TEXT)
    frame = mark(frame, pl.col("_fault").is_not_null(), pl.col("_fault"))
    if data.source == "messages":
        frame = mark(
            frame, pl.col("_label").is_null(), "unreadable: the last turn is not an answer, and there is no label"
        )
    counts = Counter(name for row in found if row.fault is None for name in row.unused)
    if counts:
        unused = ", ".join(f"{name} of {counted(rows)}" for name, rows in counts.items())
        last = " (data.turns=last)" if data.turns == "last" else ""
        raw.notes.append(f"{Path(place).name}: not read: {unused}{last}")
    columns = data.columns.model_copy(update={"text": "_text", "label": "_label"})
    return replace(raw, frame=frame.drop("_fault"), nested={}), columns


# ------------------------------------------------------------------------------------------------ columns


def _require(raw: Raw, place: str, wanted: Iterable[str], key: str) -> None:
    missing = [name for name in wanted if name not in raw.columns()]
    if missing:
        raise DataError(
            f"data.files: {place} has no field '{missing[0]}', which {key} needs; it has {', '.join(raw.columns())}"
            f"{_other_source(raw)}"
        )


def _other_source(raw: Raw) -> str:
    """The data set file that reads rows with these fields, unless they are those of a table."""
    form = conversations.form_of(raw.columns())
    kinds = {"messages": "chats", "alpaca": "instruction rows"}
    return f". These are {kinds[form]}, which data={form} data.files=<files> reads" if form else ""


def _column(raw: Raw, place: str, columns: Columns, name: str) -> pl.Expr:
    """A column of the schema.

    Text, label and a configured target are required. The others may be missing, and their empty cells are null, so that
    they do not count as equal.

    Raises:
        DataError: for a missing column.
    """
    wanted, present = getattr(columns, name), raw.columns()
    required = name in ("text", "label") or (name == "target" and wanted is not None)
    if wanted in present:
        value = pl.col(wanted)
        if name not in ("text", "label"):
            value = value.str.strip_chars()
            value = pl.when(value != "").then(value)
        return value.alias(name)
    # A default name may be absent, a name that the user wrote may not; held-out files need no rationales or pairs.
    if not required and (wanted in (None, name) or name in ("rejected", "rationale")):
        return pl.lit(None, dtype=pl.String).alias(name)
    near = nearest(wanted, present)
    hint = f"Did you mean data.columns.{name}={near}?" if near else f"Set data.columns.{name}=<column>."
    if required:
        hint = _other_source(raw).removeprefix(". ") or hint
    hint = _without_header(raw, place) or hint
    raise DataError(f"data.columns.{name}: {place} has no column '{wanted}'; it has {', '.join(present)}. {hint}")


def _without_header(raw: Raw, place: str) -> str | None:
    """What to set if the header looks like an ordinary row: it is long, or repeated below."""
    names, frame = raw.columns(), raw.frame
    alike = [name for name in names if len(name) > 40 or (frame[name] == name).sum() > 0]
    if Path(place).suffix.lower() not in (".csv", ".tsv", ".xlsx") or len(names) < 2 or not alike or not frame.height:
        return None
    label = min(names, key=lambda name: frame[name].n_unique())
    text = max(names, key=lambda name: float(frame[name].str.len_chars().mean() or 0))  # type: ignore[arg-type]
    called = {text: "text", label: "label"}
    guess = ",".join(called.get(name, f"column_{number}") for number, name in enumerate(names, 1))
    return f'If its first row is not a header, name the columns: "data.csv.header=[{guess}]"'


# ------------------------------------------------------------------------------------------------ single rows


@dataclass(frozen=True)
class Reading:
    """How the text of a single row is read, in the same way as in training: for prediction and for the service.

    Args:
        column: of plain texts, taken unchanged.
        sections: data sections of the run, all parts of a mixture; a row is read by the first one whose fields it has.
        target: column of the target that the run's prompt asks for; None if it does not ask for one.
    """

    column: str
    sections: tuple[Data, ...] = ()
    target: str | None = None

    @classmethod
    def of(cls, data: Data, column: str | None = None) -> Reading:
        """The reading of a run.

        Args:
            data: of its configuration.
            column: of plain texts, if the user names one; then no other field is read.
        """
        targets = [section.columns.target for section in (*_sections(data), data) if data.asks_for_target]
        target = next(filter(None, targets), None)
        return cls(data.columns.text, tuple(_sections(data)), target) if column is None else cls(column, (), target)

    @property
    def fields(self) -> list[str]:
        """Names of the fields that are read besides a column of plain texts, for messages."""
        names = {"alpaca": "instruction, input", "messages": " or ".join(conversations.CHATS)}
        found = [names[data.source] for data in self.sections if data.source in names]
        return [*dict.fromkeys(found), *([f"{self.column} and {self.target}"] if self.target else [])]

    def section(self, columns: Collection[str]) -> Data | None:
        """The section that reads rows with these columns."""
        return next((data for data in self.sections if has_text(data, columns, answered=False)), None)

    def fits(self, columns: Collection[str]) -> bool:
        """Whether rows with these columns have a text."""
        return self.column in columns or self.section(columns) is not None

    def text_of(self, values: Mapping[str, Any]) -> tuple[str, int, str | None]:
        """Read a row.

        Returns:
            The text, with its target if the run's prompt asks for one; the number of its leading characters that are
            never truncated; and why it cannot be used.
        """
        text, fixed, fault = self._plain_text(values)
        if self.target is None or fault is not None:
            return text, fixed, fault
        target = values.get(self.target)
        if not isinstance(target, str) or not target.strip():
            missing = target is None or isinstance(target, str)
            kind = "no target" if missing else f"the target is not a string but {type(target).__name__}"
            return "", 0, f"{kind} in the field '{self.target}'"
        if "\x00" in target or _DAMAGED.search(target):
            return "", 0, "unreadable: damaged characters in the target"
        return with_target(target, text), fixed + len(with_target(target, "")), None

    def _plain_text(self, values: Mapping[str, Any]) -> tuple[str, int, str | None]:
        data, fixed, fault = self.section(values), 0, None
        if data is not None and data.source in conversations.USED:
            found = conversations.render(values, data)
            value: Any = found.text
            fixed, fault = found.fixed, found.fault
        else:
            value = values.get(self.column if data is None else data.columns.text)
            if value is None:
                fault = "no text"
            elif not isinstance(value, str):
                fault = f"the text is not a string but {type(value).__name__}"  # a JSON number is not text here
        if fault is not None:
            return "", 0, fault
        if data is not None and data.extract and str(value).strip():
            match = self._patterns[data.extract].search(value)
            if match is None or match[1] is None:
                return "", 0, NO_MATCH
            value, fixed = match[1], 0
        text = normalize(str(value))
        if "\x00" in text:
            return "", 0, "unreadable: NUL byte in the text"
        if _DAMAGED.search(text):
            return "", 0, "unreadable: damaged characters"
        return text, fixed, None if text else "empty text"

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {data.extract: re.compile(data.extract, re.DOTALL) for data in self.sections if data.extract}


def _sections(data: Data) -> list[Data]:
    if data.source == "mixture":
        return [section for part in (data.parts or {}).values() for section in _sections(part)]
    plain = ("table", "hub")  # sources whose text is one column
    return [data] if data.generator is None and data.source in (*plain, *conversations.USED) else []
