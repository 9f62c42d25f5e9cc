"""The classes of a task: their order, fixed once for every array in the project, and the words that stand for them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from finsa.config import Data

# A leading zero makes a code of digits ("007"), which is no number.
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,17})(?:\.\d{0,18})?(?:e[+-]?\d{1,2})?")


def number(label: str) -> str | None:
    """A label that is a number in its shortest form: 1 for "1.0", "+1" and "１"; None for any other label."""
    written = unicodedata.normalize("NFKC", label).strip().lower().replace("\u2212", "-")
    if not _NUMBER.fullmatch(written):
        return None
    shortest = format(Decimal(written).normalize(), "f")
    return "0" if shortest == "-0" else shortest


@dataclass(frozen=True)
class LabelSpace:
    """Classes in their fixed order.

    Args:
        names: as the table writes them.
        words: as the model answers them; the same length.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, data: Data, found: Iterable[str]) -> LabelSpace:
        """Take the configured labels; without any, the distinct ones found, sorted; numbers are sorted by value."""
        if isinstance(data.labels, dict):
            return cls(tuple(data.labels), tuple(data.labels.values()))
        names = data.labels or tuple(_sorted(set(found)))
        return cls(names, names)


def _sorted(labels: set[str]) -> list[str]:
    numbers = {label: number(label) for label in labels}
    if all(value is not None for value in numbers.values()):
        return sorted(labels, key=lambda label: Decimal(str(numbers[label])))
    return sorted(labels)
