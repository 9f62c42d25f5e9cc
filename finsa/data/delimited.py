"""Records of CSV and TSV files, with the line each begins at, whatever is wrong with the lines around it."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import Any

csv.field_size_limit(2**31 - 1)
Record = tuple[list[Any], int, str | None]  # values, line, what is wrong with it


class _Lines:
    """Lines of a stream; those of the record being read can be given back.

    Args:
        stream: of text.
        most: characters of a record; None: as many as it takes.
    """

    def __init__(self, stream: Iterator[str], most: int | None = None) -> None:
        self._stream, self._again, self._most = stream, deque[str](), most
        self._taken: list[str] = []
        self._characters = 0
        self.before = 0  # lines before the record

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._stream)
        self._taken.append(line)
        self._characters += len(line)
        if self._most is not None and self._characters > self._most and len(self._taken) > 1:
            raise csv.Error(f"a quote that does not end within {self._most:,} characters")
        return line

    def give_back(self) -> None:
        """All lines of the record but its first are read again."""
        self._again.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]

    def end_record(self) -> None:
        """The next line begins a record."""
        self.before += len(self._taken)
        self._taken.clear()
        self._characters = 0


def records(stream: Iterator[str], delimiter: str, most: int | None = None, quoted: bool = True) -> Iterator[Record]:
    """Records of a CSV file with the line each begins at; an unreadable one has no values but a reason.

    Args:
        stream: lines of text.
        delimiter: between the fields.
        most: characters of a record of several lines, where memory has to be bounded.
        quoted: whether double quotes enclose fields; otherwise they are text.
    """
    lines = _Lines(stream, most)
    reader = csv.reader(
        lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.give_back()  # a stray quote must not take the rows behind it along
            yield [], lines.before + 1, f"unreadable: {error}"
        else:
            if len(values) > 1 or "".join(values).strip():  # else a blank line
                yield values, lines.before + 1, None
        lines.end_record()
