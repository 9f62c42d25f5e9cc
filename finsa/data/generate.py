"""Generated data: the knobs of ``data.generator`` turned into rows."""

from __future__ import annotations

import polars as pl

from finsa.config import Data
from finsa.data import splits, synthetic


def generate(data: Data) -> pl.DataFrame:
    """Draw rows and divide them.

    Returns:
        Columns id, text, label, domain, split, file, as a table read from files has them.
    """
    knobs = data.generator
    assert knobs is not None
    rows = synthetic.generate(knobs.rows, knobs.seed, knobs.domains, knobs.imbalance, knobs.noise)
    strata = [f"{domain}-{label}" for domain, label in rows.select("domain", "label").iter_rows()]
    assigned = splits.by_class(strata, data.split.validation, data.split.test, data.split.seed)
    return rows.select("id", "text", "label", "domain").with_columns(
        pl.Series("split", assigned, dtype=pl.String), pl.lit(f"generator seed {knobs.seed}").alias("file")
    )
