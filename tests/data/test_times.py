"""Times are read without guesses, and a split by time is forward: no row is later than the next split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import RunConfig
from finsa.data import dataset, times
from finsa.data.splits import SPLITS, by_time
from finsa.errors import ConfigError, DataError

Configure = Callable[..., RunConfig]
START = datetime(2024, 1, 1)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("2024-03-05", "2024-03-05T00:00:00"),
        (" 2024/3/5 ", "2024-03-05T00:00:00"),
        ("2024.03.05 15:30", "2024-03-05T15:30:00"),
        ("20240305", "2024-03-05T00:00:00"),
        ("2024-03", "2024-03-01T00:00:00"),
        ("2024年3月5日", "2024-03-05T00:00:00"),
        ("2024年3月5日 15:30:01", "2024-03-05T15:30:01"),
        ("2024-03-05T15:30:00+08:00", "2024-03-05T07:30:00"),
        ("2024-03-05 15:30:00 +0800", "2024-03-05T07:30:00"),
        ("2024-03-05T15:30:00.250Z", "2024-03-05T15:30:00.250000"),
        ("1709654400", "2024-03-05T16:00:00"),
        ("1709654400000", "2024-03-05T16:00:00"),
        ("31/03/2024", "2024-03-31T00:00:00"),
        ("3/31/2024 9:05", "2024-03-31T09:05:00"),
        ("05/05/2024", "2024-05-05T00:00:00"),
        ("5 Mar 2024", "2024-03-05T00:00:00"),
        ("March 5, 2024", "2024-03-05T00:00:00"),
        ("Tue Mar 05 15:30:00 +0000 2024", "2024-03-05T15:30:00"),
        ("Tue, 05 Mar 2024 15:30:00 +0800", "2024-03-05T07:30:00"),
        ("03/04/2024", None),
        ("2024-13-05", None),
        ("2023-02-29", None),
        ("yesterday", None),
    ],
)
def test_formats(cell: str, expected: str | None) -> None:
    (time,) = times.read(pl.Series([cell]))
    assert (None if time is None else time.isoformat()) == expected


def test_the_order_of_day_and_month_follows_from_the_column() -> None:
    column = ["03.04.2024", "25.04.2024", None]
    assert times.read(pl.Series(column)) == [datetime(2024, 4, 3), datetime(2024, 4, 25), None]
    assert times.read(pl.Series(["03/04/2024", "04/25/2024"])) == [datetime(2024, 3, 4), datetime(2024, 4, 25)]
    assert times.read(pl.Series(["03/04/2024", "25/04/2024", "04/25/2024"]))[0] is None  # the column contradicts itself


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=30, max_size=120),
    st.floats(0.05, 0.4),
    st.floats(0.05, 0.4),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_a_split_by_time_is_forward(days: list[int], validation: float, test: float, purge: int, embargo: int) -> None:
    moments = [START + timedelta(days=day) for day in days]
    try:
        assigned = by_time(moments, validation, test, purge, embargo)
    except DataError:  # the gaps are too wide
        return
    plain = by_time(moments, validation, test, 0, 0)
    parts = {name: [day for day, one in zip(days, assigned, strict=True) if one == name] for name in SPLITS}
    begins = {name: min(day for day, one in zip(days, plain, strict=True) if one == name) for name in SPLITS}
    for earlier, later in pairwise(SPLITS):
        assert max(parts[earlier]) < begins[later]
        assert not purge or max(parts[earlier]) < begins[later] - purge
        assert min(parts[later]) >= begins[later] + embargo
    assert len(set(plain)) == 3
    assert all(
        one == before or one.startswith(("purge", "embargo")) for one, before in zip(assigned, plain, strict=True)
    )


def test_sizes_without_ties() -> None:
    moments = [START + timedelta(days=day) for day in range(100)]
    assert Counter(by_time(moments[::-1], 0.1, 0.2, 0, 0)) == {"train": 70, "validation": 10, "test": 20}
    assert by_time(moments, 0.1, 0.2, 0, 0) == ["train"] * 70 + ["validation"] * 10 + ["test"] * 20


def test_rows_of_the_same_time_are_in_the_same_split() -> None:
    moments = [START + timedelta(days=day) for day in [0] * 5 + [1] * 5 + [2] * 10]
    assert by_time(moments, 0.2, 0.2, 0, 0) == ["train"] * 5 + ["validation"] * 5 + ["test"] * 10


def _write(folder: Path, cells: list[str], name: str = "rows.csv") -> str:
    rows = [(f"第{n}条", "ab"[n % 2], cell) for n, cell in enumerate(cells)]
    pl.DataFrame(rows, ["text", "label", "when"], orient="row").write_csv(folder / name)
    return f"data.files={folder / name}"


DAYS = [f"{START + timedelta(days=day):%Y-%m-%d}" for day in range(100)]
WORDS = ("data=table", "data.columns.time=when", "data.split.rule=time")


def test_every_row_that_is_removed_is_in_the_ledger(config: Configure, tmp_path: Path) -> None:
    gaps = ("data.split.purge=3", "data.split.embargo=2", "data.split.test=0.2")
    data = dataset.load(config(*WORDS, _write(tmp_path, [*DAYS, ""]), *gaps).data)
    assert data.ledger.buckets == {
        "used": 90,
        "filtered: no time": 1,
        "filtered: purge, 3 days before the next split": 6,
        "filtered: embargo, the first 2 days of validation": 2,
        "filtered: embargo, the first 2 days of test": 2,
    }
    assert data.ledger.rows == {"train": 67, "validation": 5, "test": 18}
    assert data.splits["test"]["time"].min() == "2024-03-23T00:00:00"


@pytest.mark.parametrize(
    ("cells", "words", "message"),
    [
        (
            [*DAYS, "12-2024-5"],
            (),
            r"data.columns.time: 1 row of column 'when' .* such as '12-2024-5' \(.*rows.csv:102\)",
        ),
        ([""] * 20, (), "no row has a time in the column 'when'"),
        (DAYS[:1] * 20, (), "no row is left for the train split"),
        (DAYS, ("data.split.embargo=50",), "no row is left for the validation split, .* data.split.embargo=50 days"),
    ],
)
def test_times_that_cannot_divide_the_rows(
    config: Configure, tmp_path: Path, cells: list[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        dataset.load(config(*WORDS, _write(tmp_path, cells), *words).data)


def test_a_split_by_time_needs_a_column_and_no_test_file(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split.rule=time needs columns.time"):
        config("data=table", "data.files=x", "data.split.rule=time")
    _write(tmp_path, DAYS, "train.csv")
    _write(tmp_path, DAYS, "test.csv")
    with pytest.raises(DataError, match="the files give the test split"):
        dataset.load(config(*WORDS, f"data.files={tmp_path}").data)


def test_times_change_neither_rows_nor_fingerprints_of_data_without_them(config: Configure, tmp_path: Path) -> None:
    files = _write(tmp_path, DAYS)
    plain, timed = (dataset.load(config("data=table", files, *more).data) for more in ((), ("data.columns.time=when",)))
    assert plain.splits["test"]["time"].null_count() == plain.splits["test"].height
    assert plain.splits["test"].drop("time").equals(timed.splits["test"].drop("time"))
    assert plain.fingerprint != timed.fingerprint


def test_periods_are_the_shortest_of_which_there_are_twelve() -> None:
    for days, expected in ((300, "2024-01"), (1000, "2024-Q1"), (3000, "2024")):
        assert times.periods([START + timedelta(days=day) for day in range(days)])[0] == expected
    assert times.periods([None, datetime(2024, 12, 31)]) == [None, "2024-12"]


def test_a_family_is_only_in_its_latest_split(config: Configure, tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "id": [str(day) for day in range(100)],
            "text": [f"text {day}" for day in range(100)],
            "label": ["a", "b"] * 50,
            "when": DAYS,
            "parent": [*[None] * 95, "3", "4", "93", None, None],
            "team": [*["x"] * 2, *[None] * 83, "x", *[None] * 14],
        }
    )
    table.write_csv(tmp_path / "rows.csv")
    words = (f"data.files={tmp_path / 'rows.csv'}", "data.columns.group=team")
    data = dataset.load(config(*WORDS, *words).data)
    assert data.ledger.buckets == {"used": 96, "filtered: a row of its family or group is in a later split": 4}
    assert set(data.dropped["id"]) == {"0", "1", "3", "4"}  # 93 is in the test split, as its variant
