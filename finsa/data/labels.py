"""The classes of a task: their order, fixed once for every array in the project, and the words that stand for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finsa.config import Data


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
        """Take the configured labels; without any, the distinct ones found, sorted."""
        if isinstance(data.labels, dict):
            return cls(tuple(data.labels), tuple(data.labels.values()))
        names = data.labels or tuple(sorted(set(found)))
        return cls(names, names)
