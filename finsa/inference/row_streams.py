"""Rows of a file one after the other, however many there are: what stage=predict reads.

A row that cannot be read is an item with a reason. Formats: csv, tsv, jsonl, txt (a text per line), parquet, and ``-``
for standard input, of which a part is in memory at a time; json, xlsx, arrow and feather, which are read whole.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import polars as pl

from finsa.config import Csv, locate
from finsa.data.delimited import DELIMITERS, SAMPLE_LINES, open_delimited
from finsa.data.encodings import open_text
from finsa.data.readers import LINE, PLAIN, Doubled, first_line, ipc, json_lines, json_rows, read
from finsa.data.reading import Reading
from finsa.errors import DataError, suggest

WHOLE = ("json", "xlsx", "arrow", "feather")  # formats that have to be in memory whole, and cannot be piped
FORMATS = ("csv", "tsv", "jsonl", "txt", "parquet", *WHOLE)
LONGEST = 1 << 24  # characters of a CSV record: a quote that never ends must not take the whole file into memory
PEEKED = 100  # objects whose keys tell the columns of a stream of JSON lines
BATCH = 1024  # rows of a Parquet file read at a time
USUAL = {"csv": ",", "tsv": "\t"}  # delimiters
PIPE = "standard input"


@dataclass(frozen=True)
class Item:
    """A row.

    Args:
        values: by column.
        line: where it begins; in a Parquet file its number.
        fault: why it cannot be used; None: it can.
    """

    values: dict[str, Any]
    line: int
    fault: str | None = None


@dataclass
class Stream:
    """Rows that are read as they are asked for.

    Args:
        items: the rows.
        columns: their columns; None: they may differ from row to row.
        position: how far reading has come, in bytes (Parquet: rows); None for standard input.
        total: of the same; None where it is not known.
        notes: what the user should know about the file.
        schema: of a Parquet file, pyarrow's.
        first_keys: columns of the first rows, where they may differ from row to row.
    """

    items: Iterator[Item]
    columns: list[str] | None
    position: Callable[[], int] | None = None
    total: int | None = None
    notes: list[str] = field(default_factory=list)
    schema: Any = None
    first_keys: list[str] = field(default_factory=list)


def format_of(source: str, given: str | None) -> str | None:
    """The format that a user names, else a file's ending; None for standard input, which is looked at.

    Raises:
        DataError: for a missing file, or an unknown format.
    """
    if source != "-":
        file = locate(source)
        if not file.is_file():
            near = [other.name for other in file.parent.iterdir() if other.is_file()] if file.parent.is_dir() else []
            raise DataError(f"input: there is no file {file}. {suggest(file.name, near, show=5)}".rstrip())
        if given is None:
            given = file.suffix.lower().removeprefix(".")
            if given not in FORMATS:
                raise DataError(f"input: {file.name} is of no known format. Choose from: {', '.join(FORMATS)}.")
    elif given == "parquet" or given in WHOLE:
        raise DataError(f"input: {given} cannot be read from a pipe; name the file")
    return given


def open_stream(source: str, form: str | None, reading: Reading, csv: Csv = PLAIN) -> Stream:
    """Open a file or standard input.

    Args:
        source: the file, or ``-``.
        form: from `format_of`.
        reading: finds the text of a row.
        csv: how it is written, where that is configured.

    Raises:
        DataError: where no column has a text, or there is nothing to read.
    """
    if form == "parquet":
        return _parquet(locate(source), reading)
    if form in WHOLE:
        return _whole(locate(source), form, reading, csv)
    if source == "-":
        text, notes = _piped(csv.encoding), list[str]()
        first = text.readline()
        form, stream = form or _guess(first, reading, csv), Stream(iter(()), None)
        opened: Any = chain([first] if first else [], text)
    else:
        opened, notes = open_text(locate(source), csv.encoding)
        size = locate(source).stat().st_size
        stream = Stream(iter(()), None, lambda: int(opened.buffer.tell()), size)
    stream.notes = notes
    name = PIPE if source == "-" else source
    if form == "jsonl":
        stream.items, stream.first_keys = _objects(opened, reading, name)
    else:
        _lines(stream, opened, str(form), reading, csv, name)
    return stream


def _piped(codec: str | None) -> TextIO:
    return io.TextIOWrapper(sys.stdin.buffer, codec or "utf-8-sig", errors="replace", newline="")


def keys_of(source: str, codec: str | None = None) -> list[str]:
    """All keys of a file of JSON lines, which a table needs before its first row.

    Args:
        source: the file.
        codec: how it is encoded; None: detected.

    Raises:
        DataError: for standard input, which can be read once only.
    """
    if source == "-":
        raise DataError("output: JSON lines from a pipe may have any keys; name an output that ends in .jsonl")
    stream, _ = open_text(locate(source), codec)
    with stream:
        objects = (_object(*row) for row in json_lines(stream))
        return list(dict.fromkeys(key for item in objects if item.fault is None for key in item.values))


def _guess(first: str, reading: Reading, csv: Csv) -> str:
    """The format of a pipe from its first line: JSON, a header that names the column, or texts."""
    if first.lstrip().startswith("{"):
        return "jsonl"
    if csv.delimiter is not None or csv.header is not None:
        return "csv"
    marks = {"tsv": "\t", "csv": ",", **{f"csv {mark}": mark for mark in DELIMITERS.values()}}
    names = {form: [name.strip(' "\r\n') for name in first.split(mark)] for form, mark in marks.items()}
    return next((form.split()[0] for form in names if reading.fits(names[form])), "txt")


def _lines(stream: Stream, lines: Iterator[str], form: str, reading: Reading, csv: Csv, name: str) -> None:
    """Read lines of text, or of a table, into a stream."""
    if form == "txt":
        rows = enumerate(lines, 1)
        stream.items = (Item({reading.column: line.rstrip("\r\n")}, number) for number, line in rows)
        stream.columns = [reading.column]
        return
    sample = PEEKED if name == PIPE else SAMPLE_LINES
    try:
        table = open_delimited(lines, USUAL[form], csv, reading.fits, Path(name).name, LONGEST, sample)
    except DataError as error:
        raise DataError(str(error).replace("data.files:", "input:", 1)) from None
    _check(reading, table.header, name)
    stream.items = (_fitted(table.header, *row) for row in table.rows)
    stream.columns = table.header
    stream.notes += table.notes


def _fitted(header: list[str], values: list[Any], line: int, fault: str | None) -> Item:
    if fault is None and len(values) != len(header):
        fault = f"unreadable: {len(values)} fields where the header has {len(header)}"
    if fault is None:
        return Item(dict(zip(header, values, strict=True)), line)
    spare = [f"column {number}" for number in range(len(header) + 1, len(values) + 1)]
    return Item(dict(zip([*header, *spare], values, strict=False)), line, fault)


def _objects(stream: TextIO, reading: Reading, name: str) -> tuple[Iterator[Item], list[str]]:
    found = (_object(*row) for row in json_lines(stream))
    peeked = list(islice(found, PEEKED))
    if not peeked:
        raise DataError(f"input: {name} is empty")
    keys = dict.fromkeys(key for item in peeked for key in item.values)
    if keys:
        _check(reading, list(keys), name)
    return chain(peeked, found), list(keys)


def _object(value: Any, line: int, fault: str | None) -> Item:
    if isinstance(value, Doubled):
        return Item(value, line, "unreadable: duplicate key")
    if isinstance(value, dict):
        return Item(value, line, fault)
    return Item({}, line, fault or "unreadable: not a JSON object")


def _parquet(file: Path, reading: Reading) -> Stream:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"input: {file} cannot be read: {str(error).splitlines()[0]}") from None
    _check(reading, table.schema_arrow.names, file.name)
    done = [0]

    def rows() -> Iterator[Item]:
        for batch in table.iter_batches(batch_size=BATCH):
            for values in batch.to_pylist():
                done[0] += 1
                yield Item(values, done[0])

    return Stream(rows(), table.schema_arrow.names, lambda: done[0], table.metadata.num_rows, schema=table.schema_arrow)


def _whole(file: Path, form: str, reading: Reading, csv: Csv) -> Stream:
    """A file that is read as training reads it, at once."""
    schema, notes = None, list[str]()
    try:
        if form == "json":
            content, notes = json_rows(file, csv.encoding)
            items = [_object(value, number, None) for number, value in enumerate(content, 1)]
            columns = list(dict.fromkeys(key for item in items if item.fault is None for key in item.values))
        elif form == "xlsx":
            raw = read(file, csv, reading.fits)
            columns, notes = raw.columns(), raw.notes
            rows = raw.frame.select(*columns, LINE).iter_rows()
            items = [Item(dict(zip(columns, row[:-1], strict=True)), row[-1]) for row in rows]
        else:
            table = ipc(file)
            schema, columns = table.to_arrow(compat_level=pl.CompatLevel.oldest()).schema, table.columns
            items = [Item(row, number) for number, row in enumerate(table.iter_rows(named=True), 1)]
    except DataError as error:
        raise DataError(str(error).replace("data.files:", "input:", 1)) from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"input: {file} cannot be read: {first_line(error)}") from None
    if not items:
        raise DataError(f"input: {file.name} holds no row")
    if columns:
        _check(reading, columns, file.name)
    done = [0]

    def counted() -> Iterator[Item]:
        for item in items:
            done[0] += 1
            yield item

    return Stream(counted(), columns, lambda: done[0], len(items), notes, schema)


def _check(reading: Reading, columns: list[str], name: str) -> None:
    if not reading.fits(columns):
        hint = suggest(reading.column, columns)
        fields = "".join(f"the fields {fields}, nor " for fields in reading.fields)
        has = f"neither {fields}a" if fields else "no"
        raise DataError(
            f"input: {name} has {has} column '{reading.column}'. {hint} Name it with stage.text_column=<column>"
        )
