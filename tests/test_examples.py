"""The notebook, run from top to bottom on the folder that a finished run leaves."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import matplotlib as mpl
import numpy as np
import pytest

from finsa.config import ROOT, RunConfig

NOTEBOOK = ROOT / "examples" / "results.ipynb"


def _cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _run(cells: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """Run cells as a notebook does: in one name space, the value of each cell's last expression kept."""
    names: dict[str, Any] = {}
    values = []
    for cell in cells:
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(NOTEBOOK), "exec"), names)
        values.append(eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if last else None)
    return names, values


def test_notebook_tells_what_the_run_folder_holds(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpl, "get_backend", lambda: "agg")
    mpl.use("agg")
    gold = np.random.default_rng(0).integers(0, 3, 60)
    predicted = folders.answers(gold, 0.8, 1)
    finished = "2026-01-01T00:00:00+00:00"
    run = folders.write_run(tmp_path / "outputs" / "one", config("method=lora"), gold, predicted, finished=finished)
    monkeypatch.chdir(tmp_path)
    cells = _cells()
    assert len(cells) == 7
    names, values = _run(cells)
    test = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]
    assert names["run"] == run
    assert names["table"].filter(names["table"]["scored"] == "test")["macro_f1"][0] == test["macro_f1"]
    assert names["wrong"].height == int((gold != predicted).sum())
    assert values[3].select(pl_sum(values[3])).sum_horizontal().sum() == 60
    assert len(names["losses"]) == 40
    assert len(names["checks"]) == 4


def pl_sum(frame: Any) -> list[str]:
    """Columns of counts."""
    return [name for name in frame.columns if name != "gold"]
