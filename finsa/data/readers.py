"""Files as frames of text: every record becomes a row; an unreadable one has the reason.

A frame has the file's columns as text, ``LINE`` (where the record begins; its number in formats without lines) and
``FATE`` (null, or why the row is unreadable). Nothing is guessed silently: an encoding other than UTF-8 is noted, and a
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
from finsa.data.delimited import HEADER_ROWS, Fits, Record, column_names, header_row, open_delimited
from finsa.data.encodings import open_text
from finsa.errors import DataError

LINE, FATE = "_line", "_fate"  # underscored because a file may have columns called line and fate
CHUNK = 50_000  # rows held as Python objects at a time
PLAIN = Csv(delimiter=None, encoding=None, header=None, quotes=None)


@dataclass
class Raw:
    """The contents of a file.

    Args:
        frame: columns of text, ``LINE`` and ``FATE``.
        notes: for the user.
        kinds: original types of the columns that were converted to text.
        nested: lines of a JSON file at which a column contains a list or an object.
        mapped: keys of ``data.label_map`` that occur as labels.
    """

    frame: pl.DataFrame
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    nested: dict[str, list[int]] = field(default_factory=dict)
    mapped: set[str] = field(default_factory=set)

    def columns(self) -> list[str]:
        """Names of the file's columns."""
        return [name for name in self.frame.columns if name not in (LINE, FATE)]


def read(file: Path, csv: Csv = PLAIN, fits: Fits | None = None) -> Raw:
    """Read a file in the format of its extension.

    Args:
        file: the file.
        csv: configured format.
        fits: whether names are the header; None: any names.

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
        raise DataError(f"data.files: {file} contains no row{f' ({reason[0]})' if len(reason) else ''}")
    return raw


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------ CSV and TSV


def _csv(file: Path, csv: Csv, fits: Fits, delimiter: str = ",") -> Raw:
    stream, notes = open_text(file, csv.encoding)
    with stream:
        opened = open_delimited(stream, delimiter, csv, fits, file.name)
        width = len(opened.header)

        def rows() -> Iterator[Record]:
            for values, line, fate in opened.rows:
                if fate is None and len(values) != width:
                    fate = f"unreadable: {'more' if len(values) > width else 'fewer'} fields than the header"
                yield [*values[:width], *[""] * (width - len(values))], line, fate

        return Raw(_frame(opened.header, rows()), notes + opened.notes)


def _frame(header: list[str], rows: Iterable[Record]) -> pl.DataFrame:
    """Build a frame from records, chunk by chunk, so that only one chunk of Python objects is in memory."""
    schema = dict.fromkeys(header, pl.String()) | {LINE: pl.Int64(), FATE: pl.String()}
    parts, iterator = [pl.DataFrame(schema=schema)], iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        columns = [list(values) for values in zip(*(values for values, _, _ in chunk), strict=True)]
        columns += [[line for _, line, _ in chunk], [fate for _, _, fate in chunk]]
        parts.append(pl.DataFrame(columns, schema=schema, orient="col"))
    return pl.concat(parts)


# ------------------------------------------------------------------------------------------------ JSON

Parsed = tuple[Any, int, str | None]  # the value, its line, why there is none


class Doubled(dict[str, Any]):
    """A JSON object with a duplicate key, or that contains such an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    def doubled(value: Any) -> bool:
        return isinstance(value, Doubled) or (isinstance(value, list) and any(map(doubled, value)))

    record = dict(pairs)
    return Doubled(record) if len(record) < len(pairs) or any(map(doubled, record.values())) else record


def _jsonl(file: Path, csv: Csv, _: Fits) -> Raw:
    stream, notes = open_text(file, csv.encoding)
    with stream:
        return _objects(json_lines(stream), notes)


def json_lines(stream: TextIO) -> Iterator[Parsed]:
    """Parse a stream of JSON lines; blank ones are skipped."""
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
        The content, in which objects with a duplicate key are `Doubled`; and notes about the encoding.

    Raises:
        DataError: if it is not one JSON value.
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
        DataError: if it contains something else.
    """
    content, notes = load_json(file, codec)
    if isinstance(content, dict):  # {"data": [...]} as some exports have it
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 and not isinstance(content, Doubled) else None
    if not isinstance(content, list):
        raise DataError(f"data.files: {file} contains no list of rows, such as [{{...}}, {{...}}]")
    return content, notes


def _objects(parsed: Iterable[Parsed], notes: list[str]) -> Raw:
    """Build a frame from JSON objects; the columns are the keys in the order of their first occurrence."""
    parts = [pl.DataFrame(schema={LINE: pl.Int64(), FATE: pl.String()})]
    names, nested, iterator = dict[str, None](), dict[str, list[int]](), iter(parsed)
    while chunk := list(islice(iterator, CHUNK)):
        good = [record if isinstance(record, dict) else {} for record, _, _ in chunk]
        names |= dict.fromkeys(key for record in good for key in record)
        for record, (_, line, _) in zip(good, chunk, strict=True):
            for key, value in record.items():
                if isinstance(value, list | dict):
                    nested.setdefault(key, []).append(line)
        columns: dict[str, Any] = {key: [as_text(record.get(key)) for record in good] for key in names}
        columns |= {LINE: [line for _, line, _ in chunk], FATE: [fate or object_fault(one) for one, _, fate in chunk]}
        schema = dict.fromkeys(names, pl.String()) | {LINE: pl.Int64(), FATE: pl.String()}
        parts.append(pl.DataFrame(columns, schema=schema))
    return Raw(pl.concat(parts, how="diagonal"), notes, nested=nested)


def object_fault(record: Any) -> str | None:
    """Why a JSON value is not a row; None if it is one."""
    if isinstance(record, Doubled):
        return "unreadable: duplicate key"
    return None if isinstance(record, dict) else "unreadable: not a JSON object"


def as_text(value: Any) -> str | None:
    """Convert a value to text: strings unchanged, lists and objects as JSON, null and NaN as null."""
    if value is None or value != value:  # only NaN differs from itself
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as "\ud83d" of an emoji that was cut: a damaged character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ------------------------------------------------------------------------------------------------ columnar


def columnar(table: pl.DataFrame) -> Raw:
    """Convert all columns of a typed table to text, lists and objects to JSON; values without a text form are null."""
    columns, kinds = list[pl.Series](), dict[str, str]()
    for column in table.iter_columns():
        name, kind = column.name, column.dtype
        if str(kind).partition("(")[0] not in ("String", "Categorical", "Enum"):
            kinds[name] = "lists or objects" if kind.is_nested() else str(kind)
        if kind.is_nested():
            columns.append(pl.Series(name, map(as_text, column.to_list()), dtype=pl.String))
            continue
        if kind.is_float():
            column = column.fill_nan(None)  # how pandas writes missing numbers
        try:
            columns.append(column.cast(pl.String))
        except pl.exceptions.PolarsError:  # bytes, durations
            columns.append(pl.Series(name, [None] * len(column), dtype=pl.String))
    lines = pl.int_range(1, table.height + 1, dtype=pl.Int64, eager=True).alias(LINE)
    return Raw(pl.DataFrame([*columns, lines, pl.Series(FATE, [None] * table.height, dtype=pl.String)]), [], kinds)


def ipc(file: Path) -> pl.DataFrame:
    """Read an Arrow file."""
    try:
        return pl.read_ipc(file)
    except pl.exceptions.ComputeError:
        return pl.read_ipc_stream(file)  # as datasets' save_to_disk writes it


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
        cells = [["" if cell is None else str(cell).strip() for cell in row] for row in rows[:HEADER_ROWS]]
        at = header_row([(row, number) for number, row in enumerate(cells, 1)], fits)
        notes += [f"{file.name}: the header is row {at}"] * (at > 1)
    filled = [(list(row), line) for line, row in enumerate(rows, 1) if line >= at and any(c is not None for c in row)]
    if isinstance(csv.header, tuple):
        header = column_names([*csv.header, *[None] * (sheets[0].max_column - len(csv.header))], file)
    elif csv.header is False:
        header = column_names([None] * sheets[0].max_column, file)
    else:
        header, filled = column_names(filled[0][0] if filled else [], file), filled[1:]
    texts: Iterator[Record] = (([_cell(value) for value in row], line, None) for row, line in filled)
    return Raw(_frame(header, texts), notes)


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
