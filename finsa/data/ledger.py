"""The ledger: every row that was read ends in exactly one bucket."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from finsa.errors import DataError


@dataclass
class Ledger:
    """Counts of what became of the rows read.

    Args:
        read: rows per file.
        buckets: rows per fate: ``used``, ``empty text``, ``unknown label``, ``training copy of a test row``, …
        splits: used rows per split and label.
    """

    read: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)

    def balance(self) -> None:
        """Check that no row was lost or counted twice.

        Raises:
            DataError: where the buckets do not sum to the rows read.
        """
        if self.read.total() != self.buckets.total():
            raise DataError(f"the ledger does not balance: {self.read.total()} rows read, buckets {dict(self.buckets)}")

    def as_dict(self, truncated: dict[str, int]) -> dict[str, Any]:
        """Return plain values for ``ledger.json``; `truncated` counts the used rows per split whose text was cut."""
        return {
            "read": dict(self.read),
            "buckets": dict(self.buckets),
            "splits": self.splits,
            "truncated": truncated,
        }
