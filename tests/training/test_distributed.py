"""Fits in several processes: padding rows follow the real ones, which are never copied."""

from __future__ import annotations

import pytest

from finsa.data.rows import CHUNK, IGNORE, LazyRows, Row
from finsa.training import distributed


class CountedRows(LazyRows):
    """Rows that count how many of them have been built."""

    def __init__(self, count: int) -> None:
        self.count, self.built = count, 0

    def __len__(self) -> int:
        return self.count

    def row(self, at: int) -> Row:
        self.built += 1
        ids = list(range(at, at + 2 + at % 5))
        return Row(input_ids=ids, labels=[IGNORE, *ids[1:]])


def test_padding_rows_follow_the_real_ones_up_to_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = distributed.pad_rows(CountedRows(11), 4)
    assert len(rows) == 16
    assert list(rows)[:11] == rows[:11] == [Row(**{**row, "weight": 1.0}) for row in CountedRows(11)]
    assert rows[11:] == [Row(input_ids=[0, 1], labels=[IGNORE, 1], weight=0.0)] * 5
    assert rows[-1] == rows[15]
    assert len(distributed.pad_rows(CountedRows(16), 4)) == 16


def test_padding_builds_no_list_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with a million rows would need gigabytes each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = CountedRows(10 * CHUNK + 1)
    rows = distributed.pad_rows(source, 4)
    assert source.built <= CHUNK
    assert rows[10 * CHUNK]["weight"] == 1
    assert rows[10 * CHUNK + 1]["weight"] == 0
    assert source.built <= CHUNK + 2
