"""The ledger: every row that was read ends in exactly one bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finsa.errors import DataError

USED = "used"
TRUNCATED = "used, truncated"


@dataclass
class Ledger:
    """Number of rows per fate.

    Args:
        read: rows per file.
        buckets: rows per fate: ``used``, ``empty text``, ``duplicate``, ``conflicting label``, ``unknown label``,
            ``unreadable``, ``filtered: <reason>``, ``leak: <kind>``.
        splits: used rows per split and label; rows with several labels count for each.
        rows: used rows per split.
        notes: corrections and warnings: encodings, spellings of labels, duplicate ids.
        examples: of each bucket but ``used``, a few rows as ``file:line: beginning of the text``.
    """

    read: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def balance(self) -> None:
        """Check that no row was lost or counted twice.

        Raises:
            DataError: if the buckets do not sum to the rows read.
        """
        if self.read.total() != self.buckets.total():
            raise DataError(f"the ledger does not balance: {self.read.total()} rows read, buckets {dict(self.buckets)}")

    def closed(self, truncated: Mapping[str, int]) -> Counter[str]:
        """Buckets with the used rows divided into whole and truncated ones; `truncated` counts them per split."""
        total = sum(truncated.values())
        buckets = Counter({USED: self.buckets[USED] - total, TRUNCATED: total})
        buckets += Counter({name: count for name, count in self.buckets.items() if name != USED})
        return buckets

    def summary(self, truncated: Mapping[str, int]) -> str:
        """The buckets in one line."""
        return ", ".join(f"{bucket} {count:,}" for bucket, count in self.closed(truncated).items() if count)

    def dropped(self) -> int:
        """Rows that are not used."""
        return self.buckets.total() - self.buckets[USED]

    def as_dict(self, truncated: Mapping[str, int]) -> dict[str, Any]:
        """Plain values for ``ledger.json``; `truncated` counts the truncated rows per split."""
        return {
            "read": dict(self.read),
            "buckets": dict(self.closed(truncated)),
            "splits": self.splits,
            "rows": self.rows,
            "truncated": dict(truncated),
            "notes": self.notes,
            "examples": self.examples,
        }
