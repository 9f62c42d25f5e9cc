"""CSV and TSV files: detection of their format, and their records with the line at which each begins.

Configured values take precedence. Otherwise delimiter, quotes and header are detected, but only if that is certain,
usually because only one way of reading gives a header with the wanted column. Anything unusual is noted.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from finsa.config import Csv
from finsa.errors import DataError

csv.field_size_limit(2**31 - 1)
Record = tuple[list[Any], int, str | None]  # values, line, why it is unreadable
Fits = Callable[[list[str]], bool]  # whether columns of these names include the wanted one
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
HEADER_ROWS = 10  # rows in which a header is looked for, below titles
SAMPLE_LINES, SAMPLE_CHARACTERS = 20_000, 1 << 22
FEW = 200  # lines that decide the delimiter


@dataclass
class DelimitedFile:
    """An opened CSV or TSV file.

    Args:
        header: names of the columns.
        rows: records below the header.
        notes: on unusual formats that were detected.
    """

    header: list[str]
    rows: Iterator[Record]
    notes: list[str] = field(default_factory=list)


def open_delimited(
    lines: Iterator[str],
    usual: str,
    settings: Csv,
    fits: Fits,
    name: str,
    limit: int | None = None,
    sample: int = SAMPLE_LINES,
) -> DelimitedFile:
    """Detect the format of lines, and read their records.

    Args:
        lines: of the file, as text.
        usual: the delimiter that the file extension suggests.
        settings: configured values.
        fits: whether names are a header.
        name: of the file, for notes and errors.
        limit: maximum number of characters per record, see `records`.
        sample: number of lines used for detection.

    Raises:
        DataError: if there is no header.
    """
    first, characters = list[str](), 0
    for text in islice(lines, sample):
        first.append(text)
        characters += len(text)
        if characters > SAMPLE_CHARACTERS:
            break
    marked = re.fullmatch(r'"?sep=(.)"?\s*', first[0]) if first else None  # a line that Excel reads and writes
    skip, notes = int(marked is not None), list[str]()
    delimiter = DELIMITERS.get(settings.delimiter or "", settings.delimiter) or (marked[1] if marked else None)
    few = first[skip : skip + FEW]
    if delimiter is None:
        delimiter = _detect_delimiter(few, usual, settings, fits, name)
        if delimiter != usual:
            notes.append(f"{name}: fields are separated by {_word(delimiter)}")
    quoted = settings.quotes
    if quoted is None:
        quoted = not _quotes_are_text(first[skip:], delimiter)
        notes += [f"{name}: double quotes are part of the text"] * (not quoted)
    if type(settings.header) is int:
        skip = settings.header - 1
    elif settings.header is None:
        at = header_row(_readable(few, delimiter, quoted), fits)
        notes += [f"{name}: the header is line {at + skip}, below {at - 1} lines of title"] * (at > 1)
        skip += at - 1
    rest = chain(first, lines)
    for _ in range(skip):
        next(rest, None)
    rows = ((values, line + skip, fate) for values, line, fate in records(rest, delimiter, limit, quoted))
    if isinstance(settings.header, tuple):
        return DelimitedFile(column_names(list(settings.header), name), _of_width(rows, len(settings.header)), notes)
    values, line, fate = next((row for row in rows if row[0] != [""]), ([], 1, "it is empty"))
    if fate is not None:
        raise DataError(f"data.files: {name} has no header in line {line} ({fate})")
    if settings.header is False:
        first_row: Record = (values, line, fate)
        names = column_names([None] * len(values), name)
        return DelimitedFile(names, chain([first_row], _of_width(rows, len(values))), notes)
    return DelimitedFile(column_names(values, name), _of_width(rows, len(values)), notes)


def _of_width(rows: Iterator[Record], columns: int) -> Iterator[Record]:
    """The records of a file; a line with nothing but `""` is an empty cell of its only column, or a blank line."""
    return rows if columns == 1 else (row for row in rows if row[0] != [""])


def column_names(names: list[Any], file: object) -> list[str]:
    """Column names without surrounding white space; a column without a name is called by its position.

    Raises:
        DataError: for a name that occurs twice.
    """
    header = [str(name or "").strip() or f"column {number}" for number, name in enumerate(names, 1)]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"data.files: {file} has the column '{repeated[0]}' more than once; rename one of them")
    return header


def header_row(rows: Sequence[tuple[list[str], int]], fits: Fits) -> int:
    """The line of the header: the first row, or the first that fits below rows with fewer filled cells.

    Args:
        rows: cells without surrounding white space, each row with its line.
        fits: whether names are a header.
    """
    if not rows or fits(rows[0][0]):
        return 1
    widest = 0
    for values, line in rows[:HEADER_ROWS]:
        filled = sum(map(bool, values))
        if fits(values) and filled > widest:
            return line
        widest = max(widest, filled)
    return 1


def _readable(lines: Sequence[str], delimiter: str, quoted: bool = True) -> list[tuple[list[str], int]]:
    """The readable records of a sample, each with its line."""
    found = (record for record in records(iter(lines), delimiter, None, quoted) if record[0] != [""])
    return [([str(value).strip() for value in values], line) for values, line, fate in found if fate is None]


def _detect_delimiter(lines: Sequence[str], usual: str, settings: Csv, fits: Fits, name: str) -> str:
    """The usual delimiter, unless only a different one gives the wanted columns, or equally many fields in all rows."""
    candidates = list(dict.fromkeys((usual, *DELIMITERS.values())))
    rows = {delimiter: [values for values, _ in _readable(lines, delimiter)] for delimiter in candidates}
    if settings.header in (None, True) or type(settings.header) is int:
        for count in (1, HEADER_ROWS):
            fitting = [delimiter for delimiter in candidates if any(map(fits, rows[delimiter][:count]))]
            if fitting:
                return fitting[0]
    widths = {delimiter: set(map(len, found)) for delimiter, found in rows.items()}
    if isinstance(settings.header, tuple):
        even = [delimiter for delimiter in candidates if widths[delimiter] == {len(settings.header)}]
        return even[0] if even else usual
    even = [delimiter for delimiter in candidates if len(widths[delimiter]) == 1 and max(widths[delimiter]) > 1]
    if len(even) > 1:
        words = " or ".join(map(_word, even))
        raise DataError(f"data.files: the fields of {name} may be separated by {words}; set data.csv.delimiter")
    return even[0] if even else usual


def _quotes_are_text(lines: Sequence[str], delimiter: str) -> bool:
    """Whether all lines of a TSV have equally many fields only if quotes do not enclose fields."""
    if delimiter != "\t" or not any('"' in line for line in lines):
        return False
    plain = [line for line in lines if line.strip()]
    tabs = {line.count("\t") for line in plain}
    if len(tabs) != 1 or tabs == {0}:
        return False
    found = list(records(iter(lines), delimiter))
    return len(found) != len(plain) or any(fate is not None for _, _, fate in found)


def _word(delimiter: str) -> str:
    return next((word for word, sign in DELIMITERS.items() if sign == delimiter), repr(delimiter))


# ------------------------------------------------------------------------------------------------ records


class _Lines:
    """Lines of a stream; all lines of the current record but the first can be put back.

    Args:
        stream: of text.
        limit: maximum number of characters per record; None: unlimited.
    """

    def __init__(self, stream: Iterator[str], limit: int | None = None) -> None:
        self._stream, self._returned, self._limit = stream, deque[str](), limit
        self._record: list[str] = []
        self._characters = 0
        self.before = 0  # lines before the record

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._stream)
        self._record.append(line)
        self._characters += len(line)
        if self._limit is not None and self._characters > self._limit and len(self._record) > 1:
            raise csv.Error(f"a quote that does not end within {self._limit:,} characters")
        return line

    def give_back(self) -> None:
        """Put back all lines of the record but the first."""
        self._returned.extendleft(reversed(self._record[1:]))
        del self._record[1:]

    def end_record(self) -> None:
        """Mark the next line as the beginning of a record."""
        self.before += len(self._record)
        self._record.clear()
        self._characters = 0


def records(stream: Iterator[str], delimiter: str, limit: int | None = None, quoted: bool = True) -> Iterator[Record]:
    """Records of a CSV file, each with the line at which it begins; an unreadable one has a reason instead of values.

    A line with nothing but `""` is a record, which only a file with one column has: elsewhere it is a blank line.

    Args:
        stream: lines of text.
        delimiter: between the fields.
        limit: maximum number of characters of a record with several lines, to bound memory; None: unlimited.
        quoted: whether double quotes enclose fields; otherwise they are text.
    """
    lines = _Lines(stream, limit)
    reader = csv.reader(
        lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.give_back()  # a stray quote must not swallow the rows below it
            yield [], lines.before + 1, f"unreadable: {error}"
        else:
            if len(values) > 1 or values == [""] or "".join(values).strip():  # otherwise a blank line
                yield values, lines.before + 1, None
        lines.end_record()
