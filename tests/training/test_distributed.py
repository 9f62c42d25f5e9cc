"""What several processes share of a fit: blank rows behind the real ones, which are never copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from finsa.data.rows import CHUNK, IGNORE, Row
from finsa.training import distributed


class Made(Sequence[Row]):
    """Rows that are made when they are asked for, as those of a run are."""

    def __init__(self, count: int) -> None:
        self.count, self.made = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(self.count))]
        at = range(self.count)[at]
        self.made += 1
        ids = list(range(at, at + 2 + at % 5))
        return Row(input_ids=ids, labels=[IGNORE, *ids[1:]])


def test_blank_rows_follow_the_real_ones_up_to_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = distributed.fill_up(Made(11), 4)
    assert len(rows) == 16
    assert list(rows)[:11] == rows[:11] == [Row(**{**row, "weight": 1.0}) for row in Made(11)]
    assert rows[11:] == [Row(input_ids=[0, 1], labels=[IGNORE, 1], weight=0.0)] * 5
    assert rows[-1] == rows[15]
    assert len(distributed.fill_up(Made(16), 4)) == 16


def test_filling_makes_no_list_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with a million rows would hold gigabytes each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = Made(10 * CHUNK + 1)
    rows = distributed.fill_up(source, 4)
    assert source.made <= CHUNK
    assert rows[10 * CHUNK]["weight"] == 1
    assert rows[10 * CHUNK + 1]["weight"] == 0
    assert source.made <= CHUNK + 2
