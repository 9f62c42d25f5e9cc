"""Times of rows: read from the formats that tables have, without guessing between day and month."""

from __future__ import annotations

import re
from collections.abc import Set
from contextlib import suppress
from datetime import UTC, datetime

import polars as pl

from finsa.config import Data
from finsa.data.readers import LINE
from finsa.errors import DataError, counted

# Besides ISO 8601: English months, as in mail and on Twitter.
FORMATS = (
    "%d %b %Y",
    "%d %B %Y",
    "%b %d, %Y",
    "%B %d, %Y",
    "%b %d %Y",
    "%a, %d %b %Y %H:%M:%S %z",
    "%a %b %d %H:%M:%S %z %Y",
)
_CHINESE = re.compile(r"(\d{4})年(\d{1,2})月(?:(\d{1,2})日)?")
_YEAR_FIRST = re.compile(r"(\d{4})[-/.](\d{1,2})(?:[-/.](\d{1,2}))?(?!\d)(.*)", re.DOTALL)
_YEAR_LAST = re.compile(r"(\d{1,2})[-/.](\d{1,2})[-/.](\d{4})(?!\d)(.*)", re.DOTALL)
_EPOCH = re.compile(r"\d{10}(\d{3})?(?:\.\d+)?")  # seconds or milliseconds since 1970
PERIODS = {"month": "%Y-%m", "quarter": "%Y-Q", "year": "%Y"}
MOST_PERIODS = 12


def read(column: pl.Series) -> list[datetime | None]:
    """The time of each cell, (n,), in UTC if it states its zone; null where there is none, or it cannot be read.

    Whether the day or the month comes first in 03.04.2024 follows from other cells of the column, or it is not read.
    """
    cells = {cell: cell.strip() for cell in column.drop_nulls().unique().to_list()}
    ambiguous = [match for cell in cells.values() if (match := _YEAR_LAST.fullmatch(cell))]
    day_first = any(int(match[1]) > 12 for match in ambiguous)
    month_first = any(int(match[2]) > 12 for match in ambiguous)
    order = None if day_first == month_first else day_first
    known = {cell: _time(text, order) for cell, text in cells.items()}
    return [known.get(cell) for cell in column]


def _time(text: str, day_first: bool | None) -> datetime | None:
    text = _CHINESE.sub(lambda match: f"{match[1]}-{match[2]}-{match[3] or 1}", text)
    text = re.sub(r"(?<!\d)(\d:\d\d)", r"0\1", text)  # 9:05
    if match := _YEAR_LAST.fullmatch(text):
        if day_first is None and match[1] != match[2]:
            return None
        day, month = (match[1], match[2]) if day_first else (match[2], match[1])
        text = f"{match[3]}-{month}-{day}{match[4]}"
    if match := _YEAR_FIRST.fullmatch(text):
        text = f"{match[1]}-{match[2]:0>2}-{match[3] or '1':0>2}{match[4]}"
    with suppress(ValueError, OverflowError, OSError):
        if match := _EPOCH.fullmatch(text):
            return datetime.fromtimestamp(float(text) / (1000 if match[1] else 1), UTC).replace(tzinfo=None)
        return _naive(datetime.fromisoformat(re.sub(r"(?<=\d) +(?=[+-]\d|Z$)", "", text)))
    for form in FORMATS:
        with suppress(ValueError):
            return _naive(datetime.strptime(text, form))
    return None


def _naive(time: datetime) -> datetime:
    return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)


def clean(frame: pl.DataFrame, data: Data, declared: Set[str]) -> pl.DataFrame:
    """Write the times of the rows in ISO 8601, and check that they may divide the rows.

    Raises:
        DataError: with a file, a line and a value that cannot be read as a time.
    """
    if data.split.rule == "time" and "test" in declared:
        raise DataError(
            "data.split.rule=time: the files give the test split, so there is nothing to divide by time. Give one "
            "file, or files whose names state no split"
        )
    if data.columns.time is None:
        return frame
    moments = read(frame["time"])
    unread = frame.filter(
        pl.col("time").is_not_null() & pl.Series([time is None for time in moments], dtype=pl.Boolean)
    )
    if unread.height:
        file, line, value = unread.select("file", LINE, "time").row(0)
        raise DataError(
            f"data.columns.time: {counted(unread.height)} of column '{data.columns.time}' cannot be read as a time, "
            f"such as '{value}' ({file}:{line}). Write them as 2024-03-31 or 2024-03-31 15:00; in 03/04/2024, day and "
            "month are not known unless another row shows the order"
        )
    if data.split.rule == "time" and not any(moments):
        raise DataError(f"data.split.rule=time: no row has a time in the column '{data.columns.time}'")
    written = [None if time is None else time.isoformat() for time in moments]
    return frame.with_columns(pl.Series("time", written, dtype=pl.String))


def periods(times: list[datetime | None]) -> list[str | None]:
    """The month, quarter or year of each row, (n,): the shortest of them of which there are at most 12."""
    known = {time for time in times if time is not None}
    for kind in PERIODS:
        if len({_period(time, kind) for time in known}) <= MOST_PERIODS:
            break
    return [None if time is None else _period(time, kind) for time in times]


def _period(time: datetime, kind: str) -> str:
    return f"{time:{PERIODS[kind]}}" + (str((time.month + 2) // 3) if kind == "quarter" else "")
