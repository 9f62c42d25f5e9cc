"""Rows of a file one after the other, however many there are: what stage=predict reads.

A row that cannot be read is an item with a reason. Formats: csv, tsv, jsonl, txt (a text per line), parquet, and ``-``
for standard input.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from finsa.config import locate
from finsa.data.delimited import records
from finsa.data.encodings import open_text
from finsa.data.readers import Doubled, header_of, json_lines
from finsa.data.texts import normalize
from finsa.errors import DataError, suggest

FORMATS = ("csv", "tsv", "jsonl", "txt", "parquet")
LONGEST = 1 << 24  # characters of a CSV record: a quote that never ends must not take the whole file into memory
PEEKED = 100  # objects whose keys tell the columns of a stream of JSON lines
BATCH = 1024  # rows of a Parquet file read at a time
DELIMITERS = {"csv": ",", "tsv": "\t"}


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
    elif given == "parquet":
        raise DataError("input: a Parquet file cannot be read from a pipe; name the file")
    return given


def open_stream(source: str, form: str | None, column: str) -> Stream:
    """Open a file or standard input.

    Args:
        source: the file, or ``-``.
        form: from `format_of`.
        column: the one with the texts.

    Raises:
        DataError: where there is no such column, or nothing to read.
    """
    if form == "parquet":
        return _parquet(locate(source), column)
    if source == "-":
        text, notes = io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", errors="replace", newline=""), list[str]()
        first = text.readline()
        form, stream = form or _guess(first, column), Stream(iter(()), None)
        opened: Any = chain([first] if first else [], text)
    else:
        opened, notes = open_text(locate(source))
        size = locate(source).stat().st_size
        stream = Stream(iter(()), None, lambda: int(opened.buffer.tell()), size)
    stream.notes = notes
    name = "standard input" if source == "-" else source
    if form == "jsonl":
        stream.items, stream.first_keys = _objects(opened, column, name)
    else:
        stream.items, stream.columns = _lines(opened, str(form), column, name)
    return stream


def keys_of(source: str) -> list[str]:
    """All keys of a file of JSON lines, which a table needs before its first row.

    Raises:
        DataError: for standard input, which can be read once only.
    """
    if source == "-":
        raise DataError("output: JSON lines from a pipe may have any keys; name an output that ends in .jsonl")
    stream, _ = open_text(locate(source))
    with stream:
        objects = (_object(*row) for row in json_lines(stream))
        return list(dict.fromkeys(key for item in objects if item.fault is None for key in item.values))


def _guess(first: str, column: str) -> str:
    """The format of a pipe from its first line: JSON, a header that names the column, or texts."""
    if first.lstrip().startswith("{"):
        return "jsonl"
    names = {form: [name.strip(' "\r\n') for name in first.split(mark)] for form, mark in DELIMITERS.items()}
    return next((form for form in ("tsv", "csv") if column in names[form]), "txt")


def _lines(stream: TextIO, form: str, column: str, name: str) -> tuple[Iterator[Item], list[str]]:
    if form == "txt":
        return (Item({column: line.rstrip("\r\n")}, number) for number, line in enumerate(stream, 1)), [column]
    rows = records(stream, DELIMITERS[form], LONGEST)
    first, line, fault = next(rows, ([], 1, "it is empty"))
    if fault is not None:
        raise DataError(f"input: {name} has no header in line {line} ({fault})")
    header = header_of(first, name)
    _check(column, header, name)
    return (_fitted(header, *row) for row in rows), header


def _fitted(header: list[str], values: list[Any], line: int, fault: str | None) -> Item:
    if fault is None and len(values) != len(header):
        fault = f"unreadable: {len(values)} fields where the header has {len(header)}"
    if fault is None:
        return Item(dict(zip(header, values, strict=True)), line)
    spare = [f"column {number}" for number in range(len(header) + 1, len(values) + 1)]
    return Item(dict(zip([*header, *spare], values, strict=False)), line, fault)


def _objects(stream: TextIO, column: str, name: str) -> tuple[Iterator[Item], list[str]]:
    found = (_object(*row) for row in json_lines(stream))
    peeked = list(islice(found, PEEKED))
    if not peeked:
        raise DataError(f"input: {name} is empty")
    keys = dict.fromkeys(key for item in peeked for key in item.values)
    if keys:
        _check(column, list(keys), name)
    return chain(peeked, found), list(keys)


def _object(value: Any, line: int, fault: str | None) -> Item:
    if isinstance(value, Doubled):
        return Item(value, line, "unreadable: a key that stands twice")
    if isinstance(value, dict):
        return Item(value, line, fault)
    return Item({}, line, fault or "unreadable: not a JSON object")


def _parquet(file: Path, column: str) -> Stream:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"input: {file} cannot be read: {str(error).splitlines()[0]}") from None
    _check(column, table.schema_arrow.names, file.name)
    done = [0]

    def rows() -> Iterator[Item]:
        for batch in table.iter_batches(batch_size=BATCH):
            for values in batch.to_pylist():
                done[0] += 1
                yield Item(values, done[0])

    return Stream(rows(), table.schema_arrow.names, lambda: done[0], table.metadata.num_rows, schema=table.schema_arrow)


def _check(column: str, columns: list[str], name: str) -> None:
    if column not in columns:
        hint = suggest(column, columns)
        raise DataError(f"input: {name} has no column '{column}'. {hint} Name it with stage.text_column=<column>")


def text_of(item: Item, column: str) -> tuple[str, str | None]:
    """The text of a row as training would have read it, and why it cannot be used; a JSON number is no text here."""
    value = item.values.get(column)
    if item.fault is not None or value is None or not isinstance(value, str):
        kind = "no text" if value is None else f"the text is no text but {type(value).__name__}"
        return "", item.fault or kind
    text = normalize(value)
    if "\x00" in text:
        return "", "unreadable: NUL byte in the text"
    if "\ufffd" in text or not _whole(text):
        return "", "unreadable: damaged characters"
    return text, None if text else "empty text"


def _whole(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON can write and no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
