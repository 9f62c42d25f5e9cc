"""Row files for prediction over inputs of any size: read row by row, written chunk by chunk.

A row that cannot be read keeps its position, with the reason. csv, tsv, jsonl, txt (one text per line), parquet and
``-`` (standard input) are streamed; json, xlsx, arrow and feather are read into memory.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Csv, locate
from finsa.data.delimited import DELIMITERS, SAMPLE_LINES, open_delimited
from finsa.data.encodings import open_text
from finsa.data.readers import LINE, PLAIN, Doubled, as_text, first_line, ipc, json_lines, json_rows, read
from finsa.data.schema import Reading
from finsa.errors import DataError, suggest

WHOLE = ("json", "xlsx", "arrow", "feather")  # formats that are read into memory, and cannot be piped
INPUTS = ("csv", "tsv", "jsonl", "txt", "parquet", *WHOLE)
OUTPUTS = ("csv", "tsv", "jsonl", "parquet")
LONGEST = 1 << 24  # characters of a CSV record: a quote that is never closed must not read the whole file into memory
PEEKED = 100  # objects whose keys determine the columns of a stream of JSON lines
BATCH = 1024  # rows of a Parquet file read at a time
USUAL = {"csv": ",", "tsv": "\t"}  # delimiters
PIPE = "standard input"


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Row:
    """A row of an input.

    Args:
        values: cell values by column.
        line: line on which it begins; in a Parquet file, the row number.
        fault: the reason why it cannot be used; None if it can.
    """

    values: dict[str, Any]
    line: int
    fault: str | None = None


@dataclass
class Stream:
    """Rows that are read on demand.

    Args:
        rows: the rows.
        columns: column names; None: they may differ from row to row.
        total: size of the input, in bytes if `tell` is given, otherwise in rows; None if unknown.
        tell: returns the number of bytes read so far; None: rows are counted.
        notes: notes on the file for the user.
        schema: the pyarrow schema of a columnar file.
        first_columns: columns of the first rows, if they may differ from row to row.
    """

    rows: Iterator[Row]
    columns: list[str] | None
    total: int | None = None
    tell: Callable[[], int] | None = None
    notes: list[str] = field(default_factory=list)
    schema: Any = None
    first_columns: list[str] = field(default_factory=list)
    count: int = 0

    def chunks(self, size: int) -> Iterator[list[Row]]:
        """Yield the rows in lists of `size`."""
        while chunk := list(islice(self.rows, size)):
            self.count += len(chunk)
            yield chunk

    @property
    def position(self) -> int:
        """The part of `total` that has been read."""
        return self.count if self.tell is None else self.tell()


def input_format(source: str, form: str | None) -> str | None:
    """The configured format, otherwise the file extension; None for standard input, detected from its first line.

    Raises:
        DataError: for a missing file, or an unknown format.
    """
    if source != "-":
        file = locate(source)
        if not file.is_file():
            near = [other.name for other in file.parent.iterdir() if other.is_file()] if file.parent.is_dir() else []
            raise DataError(f"input: there is no file {file}. {suggest(file.name, near, show=5)}".rstrip())
        form = form or file.suffix.lower().removeprefix(".")
        if form not in INPUTS:
            raise DataError(f"input: {file.name} has no known format. Choose from: {', '.join(INPUTS)}.")
    elif form == "parquet" or form in WHOLE:
        raise DataError(f"input: {form} cannot be read from a pipe; name the file")
    return form


def open_stream(source: str, form: str | None, reading: Reading, csv: Csv = PLAIN) -> Stream:
    """Open a file or standard input.

    Args:
        source: the file, or ``-``.
        form: from `input_format`.
        reading: extracts the text of a row.
        csv: CSV settings.

    Raises:
        DataError: if no column contains a text, or the input is empty.
    """
    if form == "parquet":
        return _open_parquet(locate(source), reading)
    if form in WHOLE:
        return _open_whole(locate(source), form, reading, csv)
    if source == "-":
        name, notes, total, tell = PIPE, list[str](), None, None
        text = io.TextIOWrapper(sys.stdin.buffer, csv.encoding or "utf-8-sig", errors="replace", newline="")
        first = text.readline()
        form = form or _guess_format(first, reading, csv)
        lines: Any = chain([first] if first else [], text)
    else:
        lines, notes = open_text(locate(source), csv.encoding)
        name, total, tell = source, locate(source).stat().st_size, lambda: int(lines.buffer.tell())
    if form == "jsonl":
        objects = (_object(*found) for found in json_lines(lines))
        peeked = list(islice(objects, PEEKED))
        if not peeked:
            raise DataError(f"input: {name} is empty")
        keys = list(dict.fromkeys(key for row in peeked for key in row.values))
        if keys:
            _require_text(reading, keys, name)
        return Stream(chain(peeked, objects), None, total, tell, notes, first_columns=keys)
    if form == "txt":
        _require_text(reading, [reading.column], name)  # of a target there is no column
        rows = (Row({reading.column: line.rstrip("\r\n")}, number) for number, line in enumerate(lines, 1))
        return Stream(rows, [reading.column], total, tell, notes)
    sample = PEEKED if name == PIPE else SAMPLE_LINES
    with _as_input_error():
        table = open_delimited(lines, USUAL[str(form)], csv, reading.fits, Path(name).name, LONGEST, sample)
    _require_text(reading, table.header, name)
    rows = (_record(table.header, *found) for found in table.rows)
    return Stream(rows, table.header, total, tell, notes + table.notes)


def keys_of(source: str, codec: str | None = None) -> list[str]:
    """All keys of a JSON lines file, which a table needs before its first row.

    Args:
        source: the file.
        codec: encoding; None: detect it.

    Raises:
        DataError: for standard input, which can be read only once.
    """
    if source == "-":
        raise DataError("output: JSON lines from a pipe may have any keys; name an output that ends in .jsonl")
    stream, _ = open_text(locate(source), codec)
    with stream:
        rows = (_object(*found) for found in json_lines(stream))
        return list(dict.fromkeys(key for row in rows if row.fault is None for key in row.values))


def _guess_format(first: str, reading: Reading, csv: Csv) -> str:
    """Guess the format of a pipe from its first line: JSON, a header with the text column, or plain texts."""
    if first.lstrip().startswith("{"):
        return "jsonl"
    if csv.delimiter is not None or csv.header is not None:
        return "csv"
    marks = {"tsv": "\t", "csv": ",", **{f"csv {mark}": mark for mark in DELIMITERS.values()}}
    names = {form: [name.strip(' "\r\n') for name in first.split(mark)] for form, mark in marks.items()}
    return next((form.split()[0] for form in names if reading.fits(names[form])), "txt")


def _record(header: list[str], values: list[Any], line: int, fault: str | None) -> Row:
    """Convert a record of a CSV file to a row."""
    if fault is None and len(values) != len(header):
        fault = f"unreadable: {len(values)} fields, but the header has {len(header)}"
    surplus = [f"column {number}" for number in range(len(header) + 1, len(values) + 1)]
    return Row(dict(zip([*header, *surplus], values, strict=False)), line, fault)


def _object(value: Any, line: int, fault: str | None) -> Row:
    """Convert a value of a JSON file to a row."""
    if isinstance(value, Doubled):
        return Row(value, line, "unreadable: duplicate key")
    if isinstance(value, dict):
        return Row(value, line, fault)
    return Row({}, line, fault or "unreadable: not a JSON object")


def _open_parquet(file: Path, reading: Reading) -> Stream:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"input: {file} cannot be read: {str(error).splitlines()[0]}") from None
    schema = table.schema_arrow
    _require_text(reading, schema.names, file.name)
    values = (row for batch in table.iter_batches(batch_size=BATCH) for row in batch.to_pylist())
    rows = (Row(row, number) for number, row in enumerate(values, 1))
    return Stream(rows, schema.names, table.metadata.num_rows, schema=schema)


def _open_whole(file: Path, form: str, reading: Reading, csv: Csv) -> Stream:
    """Read a file into memory, as training does."""
    schema, notes = None, list[str]()
    try:
        with _as_input_error():
            if form == "json":
                content, notes = json_rows(file, csv.encoding)
                rows = [_object(value, number, None) for number, value in enumerate(content, 1)]
                columns = list(dict.fromkeys(key for row in rows if row.fault is None for key in row.values))
            elif form == "xlsx":
                raw = read(file, csv, reading.fits)
                columns, notes = raw.columns(), raw.notes
                cells = raw.frame.select(*columns, LINE).iter_rows()
                rows = [Row(dict(zip(columns, row[:-1], strict=True)), row[-1]) for row in cells]
            else:
                table = ipc(file)
                schema, columns = table.to_arrow(compat_level=pl.CompatLevel.oldest()).schema, table.columns
                rows = [Row(row, number) for number, row in enumerate(table.iter_rows(named=True), 1)]
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"input: {file} cannot be read: {first_line(error)}") from None
    if not rows:
        raise DataError(f"input: {file.name} contains no rows")
    if columns:
        _require_text(reading, columns, file.name)
    return Stream(iter(rows), columns, len(rows), notes=notes, schema=schema)


@contextmanager
def _as_input_error() -> Iterator[None]:
    """Make errors of the training data readers refer to ``input``."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("data.files:", "input:", 1)) from None


def _require_text(reading: Reading, columns: list[str], name: str) -> None:
    if not reading.fits(columns):
        hint = suggest(reading.column, columns)
        fields = "".join(f"the fields {fields}, nor " for fields in reading.fields)
        has = f"neither {fields}a" if fields else "no"
        raise DataError(
            f"input: {name} has {has} column '{reading.column}'. {hint} Name it with stage.text_column=<column>"
        )
    if reading.target is not None and reading.target not in columns:
        raise DataError(
            f"input: {name} has no column '{reading.target}', with the targets that the prompt of the run asks for. "
            f"{suggest(reading.target, columns)} Rename the column, or add it"
        )


# ------------------------------------------------------------------------------------------------ writing


def output_format(file: Path) -> str:
    """The format of an output, from its file extension.

    Raises:
        DataError: for an unknown extension, or a pipe.
    """
    name = file.suffix.lower().removeprefix(".")
    if file.name == "-":
        raise DataError(
            "output: predictions cannot be written to a pipe, because the output file is created when all rows are "
            f"done. Name a file, such as predictions.jsonl; formats: {', '.join(OUTPUTS)}"
        )
    if name not in OUTPUTS:
        raise DataError(f"output: {file.name} has no known format. Choose from: {', '.join(OUTPUTS)}.")
    return name


def open_writer(form: str, columns: Sequence[str] | None, schema: Any, added: Mapping[str, type]) -> Writer:
    """Create the writer of a format.

    Args:
        form: one of `OUTPUTS`.
        columns: columns of the input; None: they differ from row to row, which only JSON lines support.
        schema: the pyarrow schema of a columnar input; None for others.
        added: types (str, float or bool) of the additional columns.
    """
    if form == "jsonl":
        return Writer()
    known = list(columns or [])
    return ParquetWriter(known, schema, added) if form == "parquet" else CsvWriter(form, [*known, *added])


class Writer:
    """Writes JSON lines: encodes chunks of rows as bytes and joins them into a file."""

    header = b""

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Encode a chunk of rows."""
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        return "".join(lines).encode("utf-8", "backslashreplace")

    def join(self, file: Path, chunks: Iterable[bytes]) -> None:
        """Write encoded chunks to a file."""
        with file.open("wb") as out:
            out.write(self.header)
            out.writelines(chunks)


class CsvWriter(Writer):
    """Writes CSV or TSV with a header; lists and objects as JSON, null as an empty cell."""

    def __init__(self, form: str, columns: list[str]) -> None:
        self.columns, self.delimiter = columns, USUAL[form]
        self.header = self.encode([dict(zip(columns, columns, strict=True))])

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Encode a chunk of rows."""
        text = io.StringIO()
        plain = csv.writer(text, delimiter=self.delimiter, lineterminator="\n")
        # readers take a lone carriage return as the end of a row, and Python 3.11 does not quote it
        quoted = csv.writer(text, delimiter=self.delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows:
            cells = [_cell(row.get(column)) for column in self.columns]
            (quoted if any("\r" in cell for cell in cells) else plain).writerow(cells)
        return text.getvalue().encode("utf-8", "backslashreplace")


class ParquetWriter(Writer):
    """Writes Parquet with one row group per chunk; unjoined chunks are Arrow streams."""

    def __init__(self, columns: list[str], schema: Any, added: Mapping[str, type]) -> None:
        import pyarrow as pa

        fields = list(schema) if schema is not None else [pa.field(name, pa.string()) for name in columns]
        types = {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
        self.schema = pa.schema([*fields, *(pa.field(name, types[kind]) for name, kind in added.items())])
        self.text_columns = [*(columns if schema is None else []), *(name for name in added if added[name] is str)]

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Encode a chunk of rows."""
        import pyarrow as pa

        rows = [{**row, **{name: as_text(row.get(name)) for name in self.text_columns}} for row in rows]
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, self.schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=self.schema))
        return bytes(stream.getvalue())

    def join(self, file: Path, chunks: Iterable[bytes]) -> None:
        """Write encoded chunks to a file."""
        import pyarrow as pa
        from pyarrow import parquet

        with parquet.ParquetWriter(file, self.schema) as writer:
            for content in filter(None, chunks):  # a chunk may be empty
                writer.write_table(pa.ipc.open_stream(content).read_all())


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return as_text(value) or "" if isinstance(value, bool | int | float | list | dict) else str(value)
