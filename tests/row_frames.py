"""Small frames of rows in the common schema, as the sources deliver them."""

from __future__ import annotations

from typing import Any

import polars as pl

from finsa.data.readers import FATE, LINE
from finsa.data.sources import Rows


def row_frame(*rows: tuple[str | None, ...], columns: tuple[str, ...] = ("text", "label"), **more: Any) -> pl.DataFrame:
    """Rows given as tuples in the order of `columns`; `more` columns have one value."""
    schema = dict.fromkeys(columns, pl.String())
    numbered = pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.lit("/d/t.csv").alias("file"),
        pl.int_range(2, pl.len() + 2).alias(LINE),
        *(pl.lit(value).alias(name) for name, value in more.items()),
    )
    if "id" not in columns:
        numbered = numbered.with_columns(pl.int_range(pl.len()).cast(pl.String).alias("id"))
    return Rows(numbered, set()).frame


def fates(frame: pl.DataFrame) -> list[str | None]:
    """The fate of every row."""
    return frame[FATE].to_list()
