"""Files to frames of text: every line of a file becomes a row, readable or not, with the reason where it is not.

A frame has the file's own columns as text, ``LINE`` (where the record begins; its number in formats without lines) and
``FATE`` (null, or why the row is unreadable). Nothing is guessed in silence: an encoding other than UTF-8 is noted, a
broken line is a counted row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import polars as pl

from finsa.config import Csv
from finsa.data.delimited import Record
from finsa.data.dialects import HEADER_ROWS, Fits, header_of, header_row, open_sheet
from finsa.data.encodings import open_text
from finsa.errors import DataError

LINE, FATE = "_line", "_fate"  # a table's own columns may be called line and fate
CHUNK = 50_000  # rows held as Python objects at a time


@dataclass
class Raw:
    """A file as read.

    Args:
        frame: columns of text, ``LINE`` and ``FATE``.
        notes: what the user should know about the file.
        kinds: what a whole column held before it was written as text, where that was something else.
        nested: lines where a column of a JSON file holds a list or an object.
        mapped: keys of ``data.label_map`` that are labels here.
    """

    frame: pl.DataFrame
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    nested: dict[str, list[int]] = field(default_factory=dict)
    mapped: set[str] = field(default_factory=set)

    def columns(self) -> list[str]:
        """Names of the file's own columns."""
        return [name for name in self.frame.columns if name not in (LINE, FATE)]


PLAIN = Csv(delimiter=None, encoding=None, header=None, quotes=None)


def read(file: Path, csv: Csv = PLAIN, fits: Fits | None = None) -> Raw:
    """Read a file by its ending.

    Args:
        file: the file.
        csv: how it is written, where that is configured.
        fits: tells by names of columns whether they are the header that is looked for; None: any are.

    Raises:
        DataError: for an unknown format, an empty file, or one that cannot be read at all.
    """
    if file.suffix.lower() not in READERS:
        raise DataError(f"data.files: {file} is not read. Choose from: {', '.join(sorted(READERS))}.")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"data.files: {file} is empty")
        raw = READERS[file.suffix.lower()](file, csv, fits or bool)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        raise DataError(f"data.files: {file} cannot be read: {first_line(error)}") from None
    if not raw.columns():
        reason = raw.frame[FATE].drop_nulls()
        raise DataError(f"data.files: {file} holds no row{f' ({reason[0]})' if len(reason) else ''}")
    return raw


def first_line(error: BaseException) -> str:
    """What an error says, without what follows."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------ CSV and TSV


def _csv(file: Path, csv: Csv, fits: Fits, delimiter: str = ",") -> Raw:
    stream, notes = open_text(file, csv.encoding)
    with stream:
        sheet = open_sheet(stream, delimiter, csv, fits, file.name)
        header = sheet.header
        return Raw(_frame(header, (_fitted(record, len(header)) for record in sheet.rows)), notes + sheet.notes)


def _fitted(record: Record, width: int) -> Record:
    values, line, fate = record
    if fate is None and len(values) != width:
        fate = f"unreadable: {'more' if len(values) > width else 'fewer'} fields than the header"
    return [*values[:width], *[""] * (width - len(values))], line, fate


def _frame(header: list[str], rows: Iterable[Record]) -> pl.DataFrame:
    """Make a frame of records, in chunks, so that Python objects of only one of them are alive."""
    schema = dict.fromkeys(header, pl.String()) | {LINE: pl.Int64(), FATE: pl.String()}
    parts, iterator = [pl.DataFrame(schema=schema)], iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        columns = [list(values) for values in zip(*(values for values, _, _ in chunk), strict=True)]
        columns += [[line for _, line, _ in chunk], [fate for _, _, fate in chunk]]
        parts.append(pl.DataFrame(columns, schema=schema, orient="col"))
    return pl.concat(parts)


# ------------------------------------------------------------------------------------------------ JSON

Found = tuple[Any, int, str | None]  # what was parsed, its line, why it could not be


class Doubled(dict[str, Any]):
    """A JSON object in which a key stands twice, or that holds such an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    return Doubled(record) if len(record) < len(pairs) or any(map(_is_doubled, record.values())) else record


def _is_doubled(value: Any) -> bool:
    return isinstance(value, Doubled) or (isinstance(value, list) and any(map(_is_doubled, value)))


def _jsonl(file: Path, csv: Csv, _: Fits) -> Raw:
    stream, notes = open_text(file, csv.encoding)
    with stream:
        return _objects(json_lines(stream), notes)


def json_lines(stream: TextIO) -> Iterator[Found]:
    """Parse a stream of JSON lines; blank ones are passed over."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield json.loads(line, object_pairs_hook=_object), number, None
            except (ValueError, RecursionError):
                yield None, number, "unreadable: broken JSON"


def load_json(file: Path, codec: str | None = None) -> tuple[Any, list[str]]:
    """Parse a JSON file.

    Args:
        file: the file.
        codec: how it is encoded; None: detected.

    Returns:
        The content, in which objects with a doubled key are `Doubled`; and notes about the encoding.

    Raises:
        DataError: where it is not one JSON value.
    """
    stream, notes = open_text(file, codec)
    with stream:
        try:
            return json.load(stream, object_pairs_hook=_object), notes
        except RecursionError:
            raise DataError(f"data.files: {file} is nested too deeply") from None
        except ValueError as error:
            lines = str(error).startswith("Extra data")
            hint = f". With one object a line it has to be called {file.stem}.jsonl" if lines else ""
            raise DataError(f"data.files: {file} cannot be read: {first_line(error)}{hint}") from None


def _json(file: Path, csv: Csv, _: Fits) -> Raw:
    rows, notes = json_rows(file, csv.encoding)
    return _objects(((record, number, None) for number, record in enumerate(rows, 1)), notes)


def json_rows(file: Path, codec: str | None = None) -> tuple[list[Any], list[str]]:
    """Parse a JSON file that holds a list of rows.

    Args:
        file: the file.
        codec: how it is encoded; None: detected.

    Returns:
        The rows, and notes about the encoding.

    Raises:
        DataError: where it holds something else.
    """
    content, notes = load_json(file, codec)
    if isinstance(content, dict):  # {"data": [...]} as some exports have it
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 and not isinstance(content, Doubled) else None
    if not isinstance(content, list):
        raise DataError(f"data.files: {file} holds no list of rows; one is needed, [{{...}}, {{...}}]")
    return content, notes


def _objects(found: Iterable[Found], notes: list[str]) -> Raw:
    """Make a frame of JSON objects; the columns are the keys in the order they are first seen."""
    parts, names, nested = (
        [pl.DataFrame(schema={LINE: pl.Int64(), FATE: pl.String()})],
        dict[str, None](),
        dict[str, list[int]](),
    )
    iterator = iter(found)
    while chunk := list(islice(iterator, CHUNK)):
        good = [record if isinstance(record, dict) else {} for record, _, _ in chunk]
        names |= dict.fromkeys(key for record in good for key in record)
        for record, (_, line, _) in zip(good, chunk, strict=True):
            for key, value in record.items():
                if isinstance(value, list | dict):
                    nested.setdefault(key, []).append(line)
        columns: dict[str, Any] = {key: [as_text(record.get(key)) for record in good] for key in names}
        columns |= {LINE: [line for _, line, _ in chunk], FATE: [fate or _fault(record) for record, _, fate in chunk]}
        schema = dict.fromkeys(names, pl.String()) | {LINE: pl.Int64(), FATE: pl.String()}
        parts.append(pl.DataFrame(columns, schema=schema))
    return Raw(pl.concat(parts, how="diagonal"), notes, nested=nested)


def _fault(record: Any) -> str | None:
    if isinstance(record, Doubled):
        return "unreadable: a key that stands twice"
    return None if isinstance(record, dict) else "unreadable: not a JSON object"


def as_text(value: Any) -> str | None:
    """Write a value as text: strings as they are, lists and objects as JSON, null stays null and NaN is null."""
    if value is None or value != value:  # NaN alone differs from itself
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as "\ud83d" of an emoji that was cut: a damaged character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ------------------------------------------------------------------------------------------------ columnar


def columnar(table: pl.DataFrame) -> Raw:
    """Take over a typed table: all columns as text, lists and objects as JSON; what has no text form is null."""
    kinds = {name: "lists or objects" if kind.is_nested() else str(kind) for name, kind in table.schema.items()}
    kinds = {
        name: kind for name, kind in kinds.items() if kind.partition("(")[0] not in ("String", "Categorical", "Enum")
    }
    columns = [_as_strings(table[name]) for name in table.columns]
    lines = pl.int_range(1, table.height + 1, dtype=pl.Int64, eager=True).alias(LINE)
    return Raw(pl.DataFrame([*columns, lines, pl.Series(FATE, [None] * table.height, dtype=pl.String)]), [], kinds)


def _as_strings(column: pl.Series) -> pl.Series:
    if column.dtype.is_nested():
        return pl.Series(column.name, [as_text(value) for value in column.to_list()], dtype=pl.String)
    if column.dtype.is_float():
        column = column.fill_nan(None)  # pandas writes missing numbers so
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError:  # bytes, durations
        return pl.Series(column.name, [None] * len(column), dtype=pl.String)


def ipc(file: Path) -> pl.DataFrame:
    """Read an Arrow file."""
    try:
        return pl.read_ipc(file)
    except pl.exceptions.ComputeError:
        return pl.read_ipc_stream(file)  # the form of datasets' save_to_disk


def _excel(file: Path, csv: Csv, fits: Fits) -> Raw:
    try:
        from openpyxl import load_workbook  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"data.files: {file} needs openpyxl (pip install openpyxl), or save it as CSV") from None
    try:
        sheets = load_workbook(file, data_only=True).worksheets
        rows = list(sheets[0].iter_rows(values_only=True))
    except Exception as error:  # a damaged workbook fails in any of openpyxl's ways
        raise DataError(f"data.files: {file} cannot be read: {first_line(error)}") from None
    others = f"{file.name}: has {len(sheets)} sheets; only the first, '{sheets[0].title}', is read"
    notes = [others] if len(sheets) > 1 else []
    at = csv.header if type(csv.header) is int else 1
    if csv.header is None:
        at = header_row(rows[:HEADER_ROWS], fits)
        notes += [f"{file.name}: the header is row {at}"] * (at > 1)
    filled = [(list(row), line) for line, row in enumerate(rows, 1) if line >= at and any(c is not None for c in row)]
    if isinstance(csv.header, tuple):
        header = header_of([*csv.header, *[None] * (sheets[0].max_column - len(csv.header))], file)
    elif csv.header is False:
        header = header_of([None] * sheets[0].max_column, file)
    else:
        header, filled = header_of(filled[0][0] if filled else [], file), filled[1:]
    cells: Iterator[Record] = ((list(map(_cell, row)), line, None) for row, line in filled)
    return Raw(_frame(header, cells), notes)


def _cell(value: Any) -> str | None:
    return as_text(value if isinstance(value, bool | int | float | None) else str(value))


READERS: dict[str, Callable[[Path, Csv, Fits], Raw]] = {
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": lambda file, _, __: columnar(pl.read_parquet(file)),
    ".arrow": lambda file, _, __: columnar(ipc(file)),
    ".feather": lambda file, _, __: columnar(ipc(file)),
    ".xlsx": _excel,
}
