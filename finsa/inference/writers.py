"""Formats that rows are written in, chunk by chunk: each chunk becomes bytes, and chunks become a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from finsa.data.readers import as_text
from finsa.errors import DataError

FORMATS = ("csv", "tsv", "jsonl", "parquet")
Row = Mapping[str, Any]


class Format(Protocol):
    """How rows are written."""

    def chunk(self, rows: Sequence[Row]) -> bytes:
        """Rows as bytes."""

    def join(self, file: Path, chunks: Iterable[bytes]) -> None:
        """Write chunks into a file, header included."""


def open_format(name: str, columns: Sequence[str] | None, schema: Any, added: Mapping[str, type]) -> Format:
    """The format of a name.

    Args:
        name: one of `FORMATS`.
        columns: of the input; None: they differ from row to row, which only JSON lines can have.
        schema: of a Parquet input; None elsewhere.
        added: columns that follow, str or float.
    """
    if name == "jsonl":
        return JsonLines()
    known = list(columns or [])
    return Parquet(known, schema, added) if name == "parquet" else Delimited(name, [*known, *added])


class JsonLines:
    """One JSON object per line."""

    def chunk(self, rows: Sequence[Row]) -> bytes:
        """Rows as bytes."""
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        return "".join(lines).encode("utf-8", "backslashreplace")

    def join(self, file: Path, chunks: Iterable[bytes]) -> None:
        """Write chunks one after the other."""
        _concatenate(file, chunks)


class Delimited:
    """CSV or TSV with a header; lists and objects are written as JSON, null as nothing."""

    def __init__(self, name: str, columns: list[str]) -> None:
        self.columns, self.delimiter = columns, "\t" if name == "tsv" else ","

    def chunk(self, rows: Sequence[Row]) -> bytes:
        """Rows as bytes."""
        return self._lines([_cell(row.get(column)) for column in self.columns] for row in rows)

    def join(self, file: Path, chunks: Iterable[bytes]) -> None:
        """Write the header, then chunks one after the other."""
        _concatenate(file, _headed(self._lines([self.columns]), chunks))

    def _lines(self, rows: Iterable[list[str]]) -> bytes:
        text = io.StringIO()
        plain = csv.writer(text, delimiter=self.delimiter, lineterminator="\n")
        # a lone carriage return ends a row for readers, and Python 3.11 does not quote it
        quoted = csv.writer(text, delimiter=self.delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows:
            (quoted if any("\r" in cell for cell in row) else plain).writerow(row)
        return text.getvalue().encode("utf-8", "backslashreplace")


class Parquet:
    """Parquet, a row group per chunk; until they are joined, chunks are Arrow streams."""

    def __init__(self, columns: list[str], schema: Any, added: Mapping[str, type]) -> None:
        import pyarrow as pa

        own = list(schema) if schema is not None else [pa.field(name, pa.string()) for name in columns]
        kinds = {str: pa.string(), float: pa.float64()}
        self.texts = schema is None
        self.columns = columns
        self.schema = pa.schema([*own, *(pa.field(name, kinds[kind]) for name, kind in added.items())])

    def chunk(self, rows: Sequence[Row]) -> bytes:
        """Rows as bytes."""
        import pyarrow as pa

        if self.texts:
            rows = [{**row, **{name: as_text(row.get(name)) for name in self.columns}} for row in rows]
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, self.schema) as writer:
            writer.write_table(pa.Table.from_pylist(list(rows), schema=self.schema))
        return bytes(stream.getvalue())

    def join(self, file: Path, chunks: Iterable[bytes]) -> None:
        """Write chunks as row groups."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        with ParquetWriter(file, self.schema) as writer:
            for content in filter(None, chunks):  # a chunk may have no row
                writer.write_table(pa.ipc.open_stream(content).read_all())


def require_format(file: Path) -> str:
    """The format of an output, by its ending.

    Raises:
        DataError: for an ending that stands for none.
    """
    name = file.suffix.lower().removeprefix(".")
    if file.name == "-":
        raise DataError(
            "output: - is no file, and answers are not written to a pipe: the output appears whole once all rows are "
            f"answered. Name a file, such as answers.jsonl; formats: {', '.join(FORMATS)}"
        )
    if name not in FORMATS:
        raise DataError(f"output: {file.name} is of no known format. Choose from: {', '.join(FORMATS)}.")
    return name


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return as_text(value) or "" if isinstance(value, bool | int | float | list | dict) else str(value)


def _headed(header: bytes, chunks: Iterable[bytes]) -> Iterator[bytes]:
    yield header
    yield from chunks


def _concatenate(file: Path, chunks: Iterable[bytes]) -> None:
    with file.open("wb") as out:
        for content in chunks:
            out.write(content)
