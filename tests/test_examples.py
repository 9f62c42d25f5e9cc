"""The notebook, run from top to bottom on the folders of real runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import notebooks
import polars as pl
import pytest


@pytest.mark.parametrize("method", ["lora_response", "majority"])
def test_notebook_shows_the_contents_of_a_real_run(
    trained: Callable[..., Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpl.use("agg")
    run = trained(method)
    monkeypatch.setenv("FINSA_RUN", str(run))
    sources = ["".join(cell["source"]) for cell in notebooks.cells()]
    assert len(sources) == 7
    names, values, printed = notebooks.run(sources)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert printed[0] == f"{run.name} | complete | {facts['wall_seconds']} seconds | seed 42\n"
    scored = {row["scored"]: row for row in names["table"].to_dicts()}
    assert set(scored) == {split for split in metrics if "macro_f1" in metrics[split]}
    low, high = metrics["test"]["intervals"]["macro_f1"]
    assert scored["test"] == {
        "scored": "test",
        "n": 60,
        "macro_f1": metrics["test"]["macro_f1"],
        "low": low,
        "high": high,
    }
    assert "validation" not in scored or scored["validation"]["low"] is None
    confusion = values[3].select(pl.exclude("gold"))
    assert confusion.sum_horizontal().sum() == 60
    wrong = 60 - round(metrics["test"]["accuracy"] * 60)
    assert printed[2] == f"60 rows, {wrong} wrong, accuracy {1 - wrong / 60:.4f}\n"
    assert values[4].columns == ["text", "gold", "label", "confidence"]
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    assert len(names["losses"]) == sum('"loss"' in line for line in lines)
    assert bool(names["losses"]) == (method != "majority")
    assert [row["split"] for row in values[6].to_dicts()] == ["train", "validation", "test"]


def test_notebook_keeps_the_outputs_of_its_cells() -> None:
    kept = [cell["outputs"] for cell in notebooks.cells()]
    assert [cell["execution_count"] for cell in notebooks.cells()] == list(range(1, 8))
    assert [[output["output_type"] for output in one] for one in kept] == [
        ["stream"],
        *[["execute_result"]],
        ["stream"],
        *[["execute_result"]] * 4,
    ]
    assert "image/png" in kept[5][0]["data"]
    assert "macro_f1" in "".join(kept[1][0]["data"]["text/html"])
    assert "/home/" not in json.dumps(kept)
