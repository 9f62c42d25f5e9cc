"""Generated data: the knobs of ``data.generator`` turned into rows."""

from __future__ import annotations

import polars as pl

from finsa.config import Data
from finsa.data import splits
from finsa.data.readers import FATE, LINE
from finsa.synthetic import generator


def generate(data: Data) -> pl.DataFrame:
    """Draw rows and divide them.

    Returns:
        The columns that a table read from files has.
    """
    knobs = data.generator
    assert knobs is not None
    rows = generator.generate(knobs.rows, knobs.seed, knobs.domains, knobs.imbalance, knobs.noise)
    strata = [f"{domain}-{label}" for domain, label in rows.select("domain", "label").iter_rows()]
    assigned = splits.by_class(strata, data.split.validation, data.split.test, data.split.seed)
    empty = [pl.lit(None, dtype=pl.String).alias(name) for name in ("parent", "group", FATE)]
    return rows.select("id", "text", "label", "domain").with_columns(
        *empty,
        pl.Series("split", assigned, dtype=pl.String),
        pl.lit(f"generator seed {knobs.seed}").alias("file"),
        pl.int_range(1, pl.len() + 1).alias(LINE),
    )
