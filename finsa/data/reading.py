"""The text of a single row, read as a run's training read its rows: for prediction over files and for the service."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finsa.config import Data
from finsa.data import conversations
from finsa.data.texts import normalize

PLAIN = ("table", "hub")  # sources whose text is one column


@dataclass(frozen=True)
class Reading:
    """How the text of a row is found.

    Args:
        column: of plain texts, taken as they are.
        sections: the data of the run, of a mixture all parts: rows with the fields of one of them are read as it says.
    """

    column: str
    sections: tuple[Data, ...] = ()

    @classmethod
    def of(cls, data: Data, column: str | None = None) -> Reading:
        """The reading of a run.

        Args:
            data: of its configuration.
            column: of plain texts, where the user names one; then nothing else is looked at.
        """
        return cls(data.columns.text, tuple(_sections(data))) if column is None else cls(column)

    @property
    def fields(self) -> list[str]:
        """What rows are read by, besides a column of plain texts: for messages."""
        told = {"alpaca": "instruction, input", "messages": " or ".join(conversations.CHATS)}
        return list(dict.fromkeys(told[data.source] for data in self.sections if data.source in told))

    def section(self, columns: Collection[str]) -> Data | None:
        """The section that reads rows with these columns."""
        return next((data for data in self.sections if _reads(data, columns)), None)

    def fits(self, columns: Collection[str]) -> bool:
        """Whether there is a text in rows with these columns."""
        return self.column in columns or self.section(columns) is not None

    def text_of(self, values: Mapping[str, Any]) -> tuple[str, int, str | None]:
        """Read a row.

        Returns:
            The text, the number of its leading characters that are never truncated, and why it cannot be used.
        """
        data = self.section(values)
        fixed = 0
        if data is not None and data.source in conversations.USED:
            found = conversations.read(values, data)
            value: Any = found.text
            fixed, fault = found.fixed, found.fault
        else:
            value, fault = values.get(self.column if data is None else data.columns.text), None
            if value is None:
                fault = "no text"
            elif not isinstance(value, str):
                fault = f"the text is no text but {type(value).__name__}"  # a JSON number is no text here
        if fault is not None:
            return "", 0, fault
        if data is not None and data.extract and str(value).strip():
            match = self._patterns[data.extract].search(value)
            if match is None or match[1] is None:
                return "", 0, "unreadable: data.extract finds nothing"
            value, fixed = match[1], 0
        text = normalize(str(value))
        if "\x00" in text:
            return "", 0, "unreadable: NUL byte in the text"
        if "\ufffd" in text or not _whole(text):
            return "", 0, "unreadable: damaged characters"
        return text, fixed, None if text else "empty text"

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {data.extract: re.compile(data.extract, re.DOTALL) for data in self.sections if data.extract}


def _sections(data: Data) -> list[Data]:
    if data.source == "mixture":
        return [section for part in (data.parts or {}).values() for section in _sections(part)]
    return [data] if data.generator is None and data.source in (*PLAIN, *conversations.USED) else []


def _reads(data: Data, columns: Collection[str]) -> bool:
    if data.source == "messages":
        return conversations.chat_column(data, columns) is not None
    return ("instruction" if data.source == "alpaca" else data.columns.text) in columns


def _whole(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON can write and no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
