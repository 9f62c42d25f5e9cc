"""Files to frames of text: every line of a file becomes a row, readable or not, with the reason where it is not.

A frame has the file's own columns as text, ``line`` (where the record begins) and ``fate`` (null, or why the row is
unreadable). Nothing is guessed in silence: an encoding other than UTF-8 is noted, a broken line is a counted row.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import polars as pl

from finsa.errors import DataError

LINE, FATE = "line", "fate"
CHUNK = 50_000  # rows held as Python objects at a time
csv.field_size_limit(sys.maxsize)


@dataclass
class Raw:
    """A file as read.

    Args:
        frame: columns of text, ``line`` and ``fate``.
        notes: what the user should know about the file.
        kinds: what a column held before it was written as text, where that was something else.
    """

    frame: pl.DataFrame
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)


def read(file: Path) -> Raw:
    """Read a file by its ending.

    Raises:
        DataError: for an unknown format, an empty file, or one that cannot be read at all.
    """
    reader = READERS[file.suffix.lower()]
    try:
        if file.stat().st_size == 0:
            raise DataError(f"data.files: {file} is empty")
        raw = reader(file)
    except (pl.exceptions.PolarsError, UnicodeError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data.files: {file} cannot be read: {reason}") from None
    return raw


# ------------------------------------------------------------------------------------------------ encodings

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def encoding(file: Path) -> tuple[str, str | None]:
    """Detect how a text file is encoded: its byte order mark, else strict UTF-8, else strict GB18030 (holds GBK).

    Returns:
        The codec, and a note where it is not plain UTF-8.
    """
    with file.open("rb") as stream:
        start = stream.read(4)
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name, f"{file.name}: begins with a byte order mark, read as {name.removesuffix('-sig').upper()}"
    bad = _first_bad_byte(file, "utf-8")
    if bad is None:
        return "utf-8", None
    if _first_bad_byte(file, "gb18030") is None:
        return "gb18030", f"{file.name}: is not UTF-8 (byte {bad:,}), read as GB18030"
    return "utf-8", f"{file.name}: is neither UTF-8 nor GB18030 (byte {bad:,}); rows with damaged characters are left out"


def _first_bad_byte(file: Path, codec: str) -> int | None:
    decoder, at = codecs.getincrementaldecoder(codec)(), 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return at + error.start
            at += len(block)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return at
    return None


def _open(file: Path) -> tuple[TextIO, list[str]]:
    codec, note = encoding(file)
    return file.open(encoding=codec, errors="replace", newline=""), [note] if note else []


# ------------------------------------------------------------------------------------------------ CSV and TSV


def _csv(file: Path, delimiter: str = ",") -> Raw:
    stream, notes = _open(file)
    with stream:
        records = _records(stream, delimiter)
        header = next((values for values, _, _ in records if values), None)
        if header is None:
            raise DataError(f"data.files: {file} has no header line")
        _check_header(header, file)
        return Raw(_frame(header, (_fitted(record, len(header)) for record in records)), notes)


def _check_header(header: list[str], file: Path) -> None:
    header[:] = [name.strip() for name in header]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DataError(f"data.files: {file} has the column '{doubled[0]}' more than once; rename one of them")


Record = tuple[list[str], int, str | None]  # values, line, what is wrong with it


def _records(stream: TextIO, delimiter: str) -> Iterator[Record]:
    """Records of a CSV file with the line each begins at; an unreadable one has no values but a reason."""
    first = 0
    while True:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        while True:
            line = first + reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield [], line, f"unreadable: {error}"
                if "unexpected end" in str(error):  # a quote that never closes took the rest of the file with it
                    stream.seek(0)
                    _skip(stream, line)
                    first = line
                    break
                continue
            if values:
                yield values, line, None


def _skip(stream: TextIO, lines: int) -> None:
    for _ in islice(stream, lines):
        pass


def _fitted(record: Record, width: int) -> Record:
    values, line, fate = record
    if fate is None and len(values) != width:
        fate = f"unreadable: {len(values)} fields where the header has {width}"
        values = values[:width]
    return values + [""] * (width - len(values)), line, fate


# ------------------------------------------------------------------------------------------------ JSON


def _jsonl(file: Path) -> Raw:
    stream, notes = _open(file)
    with stream:
        return _objects(_json_lines(stream), notes)


def _json_lines(stream: TextIO) -> Iterator[tuple[Any, int]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield json.loads(line), number
            except (ValueError, RecursionError):
                yield None, number


def _json(file: Path) -> Raw:
    stream, notes = _open(file)
    with stream:
        try:
            content = json.load(stream)
        except RecursionError:
            raise DataError(f"data.files: {file} is nested too deeply") from None
    if isinstance(content, dict):  # {"data": [...]} as some exports have it
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise DataError(f"data.files: {file} holds no list of rows; one is needed, [{{...}}, {{...}}]")
    return _objects(((record, number) for number, record in enumerate(content, 1)), notes)


def _objects(records: Iterable[tuple[Any, int]], notes: list[str]) -> Raw:
    """Make a frame of JSON objects; the columns are the keys in the order they are first seen."""
    parts, names, kinds = [], dict[str, None](), dict[str, str]()
    iterator = iter(records)
    while chunk := list(islice(iterator, CHUNK)):
        good = [record if isinstance(record, dict) else {} for record, _ in chunk]
        names |= dict.fromkeys(key for record in good for key in record)
        kinds |= {key: "lists or objects" for record in good for key in record if isinstance(record[key], list | dict)}
        columns = {key: [as_text(record.get(key)) for record in good] for key in names}
        wrong = [None if isinstance(record, dict) else "unreadable: not a JSON object" for record, _ in chunk]
        schema = dict.fromkeys(names, pl.String()) | {LINE: pl.Int64(), FATE: pl.String()}
        parts.append(pl.DataFrame(columns | {LINE: [line for _, line in chunk], FATE: wrong}, schema=schema))
    return Raw(pl.concat(parts, how="diagonal") if parts else _frame([], []), notes, kinds)


def as_text(value: Any) -> str | None:
    """Write a JSON value as text: strings as they are, lists and objects as JSON, null stays null."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _frame(header: list[str], records: Iterable[Record]) -> pl.DataFrame:
    """Make a frame of records, in chunks, so that Python objects of only one of them are alive."""
    schema = dict.fromkeys(header, pl.String()) | {LINE: pl.Int64(), FATE: pl.String()}
    parts, iterator = [pl.DataFrame(schema=schema)], iter(records)
    while chunk := list(islice(iterator, CHUNK)):
        columns = dict(zip(header, map(list, zip(*(values for values, _, _ in chunk), strict=True)), strict=True))
        columns |= {LINE: [line for _, line, _ in chunk], FATE: [fate for _, _, fate in chunk]}  # type: ignore[dict-item]
        parts.append(pl.DataFrame(columns, schema=schema))
    return pl.concat(parts)


# ------------------------------------------------------------------------------------------------ columnar


def _columnar(load: Callable[[Path], pl.DataFrame]) -> Callable[[Path], Raw]:
    def reader(file: Path) -> Raw:
        return columnar(load(file))

    return reader


def columnar(table: pl.DataFrame) -> Raw:
    """Take over a typed table: all columns as text, lists and objects as JSON."""
    kinds = {name: "lists or objects" if kind.is_nested() else str(kind) for name, kind in table.schema.items()}
    kinds = {name: kind for name, kind in kinds.items() if kind not in ("String", "Categorical")}
    nested = [name for name, kind in kinds.items() if kind == "lists or objects"]
    table = table.with_columns(_nested(table, name) for name in nested).cast(pl.String)
    lines = pl.int_range(1, table.height + 1, dtype=pl.Int64).alias(LINE)
    return Raw(table.with_columns(lines, pl.lit(None, dtype=pl.String).alias(FATE)), [], kinds)


def _nested(table: pl.DataFrame, name: str) -> pl.Series:
    return pl.Series(name, [as_text(value) for value in table[name].to_list()], dtype=pl.String)


def _excel(file: Path) -> pl.DataFrame:
    return pl.read_excel(file, engine="openpyxl", infer_schema_length=None)


READERS: dict[str, Callable[[Path], Raw]] = {
    ".csv": _csv,
    ".tsv": lambda file: _csv(file, "\t"),
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _columnar(pl.read_parquet),
    ".arrow": _columnar(lambda file: pl.read_ipc(file, memory_map=False)),
    ".feather": _columnar(lambda file: pl.read_ipc(file, memory_map=False)),
    ".xlsx": _columnar(_excel),
}
