"""How a CSV or TSV file is written: its delimiter, whether quotes enclose fields, and where its header is.

Configured values are followed. The rest is detected only where it is certain, mostly because one way of reading gives a
header with the column that is wanted; what differs from the plain form is noted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from finsa.config import Csv
from finsa.data.delimited import Record, records
from finsa.errors import DataError

Fits = Callable[[list[str]], bool]  # whether columns of these names have what is wanted
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
HEADER_ROWS = 10  # rows that a header is looked for in, below titles
SAMPLE_LINES, SAMPLE_CHARACTERS = 20_000, 1 << 22
FEW = 200  # lines that decide about the delimiter


class Sheet:
    """Rows behind a header.

    Args:
        header: names of the columns.
        rows: what follows.
        notes: what the user should know.
    """

    def __init__(self, header: list[str], rows: Iterator[Record], notes: list[str]) -> None:
        self.header, self.rows, self.notes = header, rows, notes


def open_sheet(
    lines: Iterator[str],
    usual: str,
    csv: Csv,
    fits: Fits,
    name: str,
    most: int | None = None,
    sample: int = SAMPLE_LINES,
) -> Sheet:
    """Detect how lines are written, and read them.

    Args:
        lines: of the file.
        usual: its delimiter by its ending.
        csv: what is configured.
        fits: tells a header by its names.
        name: of the file, for notes and errors.
        most: characters of a record, see `records`.
        sample: lines that are looked at.

    Raises:
        DataError: where there is no header.
    """
    first = _sample(lines, sample)
    marked = re.fullmatch(r'"?sep=(.)"?\s*', first[0]) if first else None  # as Excel reads and writes it
    skip, notes = int(marked is not None), list[str]()
    delimiter = DELIMITERS.get(csv.delimiter or "", csv.delimiter) or (marked[1] if marked else None)
    few = first[skip : skip + FEW]
    if delimiter is None:
        delimiter = _delimiter(few, usual, csv, fits, name)
        notes += [f"{name}: fields are separated by {_word(delimiter)}"] * (delimiter != usual)
    quoted = csv.quotes if csv.quotes is not None else not _literal(first[skip:], delimiter)
    notes += [f"{name}: double quotes are part of the text"] * (not quoted and csv.quotes is None)
    if type(csv.header) is int:
        skip = csv.header - 1
    elif csv.header is None:
        title = _title_rows(_read(few, delimiter, quoted), fits)
        notes += [f"{name}: the header is line {title + skip}, below {title - 1} lines of title"] * (title > 1)
        skip += max(0, title - 1)
    rest = chain(first, lines)
    for _ in range(skip):
        next(rest, None)
    rows = ((values, line + skip, fate) for values, line, fate in records(rest, delimiter, most, quoted))
    return _headed(rows, csv, name, notes)


def _sample(lines: Iterator[str], most: int) -> list[str]:
    found, characters = list[str](), 0
    for line in islice(lines, most):
        found.append(line)
        characters += len(line)
        if characters > SAMPLE_CHARACTERS:
            break
    return found


def _headed(rows: Iterator[Record], csv: Csv, name: str, notes: list[str]) -> Sheet:
    if isinstance(csv.header, tuple):
        return Sheet(header_of(list(csv.header), name), rows, notes)
    values, line, fate = next(rows, ([], 1, "it is empty"))
    if fate is not None:
        raise DataError(f"data.files: {name} has no header in line {line} ({fate})")
    if csv.header is False:
        return Sheet(header_of([None] * len(values), name), chain([(values, line, fate)], rows), notes)
    return Sheet(header_of(values, name), rows, notes)


def header_of(names: list[Any], file: object) -> list[str]:
    """Column names without white space around; a column without a name is called by its place."""
    header = [str(name or "").strip() or f"column {number}" for number, name in enumerate(names, 1)]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DataError(f"data.files: {file} has the column '{doubled[0]}' more than once; rename one of them")
    return header


def _read(lines: Sequence[str], delimiter: str, quoted: bool = True) -> list[tuple[list[str], int]]:
    """Readable records of a sample, with the line of each."""
    found = records(iter(lines), delimiter, None, quoted)
    return [([str(value).strip() for value in values], line) for values, line, fate in found if fate is None]


def _delimiter(lines: Sequence[str], usual: str, csv: Csv, fits: Fits, name: str) -> str:
    """The usual delimiter, unless another one alone gives the wanted columns, or the same fields in all rows."""
    candidates = list(dict.fromkeys((usual, *DELIMITERS.values())))
    rows = {delimiter: _read(lines, delimiter) for delimiter in candidates}
    if csv.header in (None, True) or type(csv.header) is int:
        near = {delimiter: [values for values, _ in found[:HEADER_ROWS]] for delimiter, found in rows.items()}
        for shown in ({delimiter: found[:1] for delimiter, found in near.items()}, near):
            fitting = [delimiter for delimiter, found in shown.items() if any(map(fits, found))]
            if fitting:
                return fitting[0]
    widths = {delimiter: {len(values) for values, _ in found} for delimiter, found in rows.items()}
    if isinstance(csv.header, tuple):
        even = [delimiter for delimiter in candidates if widths[delimiter] == {len(csv.header)}]
        return even[0] if even else usual
    even = [delimiter for delimiter in candidates if len(widths[delimiter]) == 1 and max(widths[delimiter]) > 1]
    if len(even) > 1:
        words = " or ".join(map(_word, even))
        raise DataError(f"data.files: the fields of {name} may be separated by {words}; set data.csv.delimiter")
    return even[0] if even else usual


def _literal(lines: Sequence[str], delimiter: str) -> bool:
    """Whether quotes are text: all lines of a TSV have the same fields, which they lose if quotes enclose fields."""
    if delimiter != "\t" or not any('"' in line for line in lines):
        return False
    plain = [line for line in lines if line.strip()]
    widths = {line.count("\t") for line in plain}
    if len(widths) != 1 or widths == {0}:
        return False
    found = list(records(iter(lines), delimiter))
    return len(found) != len(plain) or any(fate is not None for _, _, fate in found)


def _title_rows(rows: Sequence[tuple[list[str], int]], fits: Fits) -> int:
    """The line of the header: the first row, or the first that fits below rows with fewer filled cells."""
    if not rows or fits(rows[0][0]):
        return 1
    most = 0
    for values, line in rows[:HEADER_ROWS]:
        filled = sum(map(bool, values))
        if fits(values) and filled > most:
            return line
        most = max(most, filled)
    return 1


def header_row(rows: Sequence[Sequence[Any]], fits: Fits) -> int:
    """The number of the row of a sheet that is its header, from 1."""
    cells = [([str("" if cell is None else cell).strip() for cell in row], n) for n, row in enumerate(rows, 1)]
    return _title_rows(cells, fits)


def _word(delimiter: str) -> str:
    return next((word for word, sign in DELIMITERS.items() if sign == delimiter), repr(delimiter))
