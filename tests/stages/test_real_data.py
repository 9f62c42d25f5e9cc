"""The main job on public data next to the repository: a few steps, the right rows, all of them scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finsa.config import RunConfig
from finsa.stages import train

ROWS = {"finfe_forum": (9198, 1150, 1150)}


@pytest.mark.real_data
@pytest.mark.parametrize("name", ROWS)
def test_a_real_table_goes_through_the_whole_stage(
    name: str, shared_data: Path, tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    cfg = config(
        *("data=table", f"data.files={shared_data / name}", "tracking=none", f"output_dir={tmp_path}"),
        *("train=smoke", "train.max_steps=2", "train.batch_size=4", "stage.compare_base=false"),
    )
    result = train.run(cfg)
    assert result.run_dir is not None
    ledger = json.loads((result.run_dir / "ledger.json").read_text(encoding="utf-8"))
    assert tuple(sum(counts.values()) for counts in ledger["splits"].values()) == ROWS[name]
    assert set(ledger["buckets"]) <= {"used", "used, truncated"}
    assert sum(ledger["buckets"].values()) == sum(ROWS[name])
    assert list(result.metrics["test"]["per_class"]) == ["negative", "neutral", "positive"]
    assert result.metrics["test"]["n"] == ROWS[name][2]
    assert len((result.run_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == ROWS[name][2]
