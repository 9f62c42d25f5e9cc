"""The temperature of a run: fitted, recorded, and reported if it is not determined."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from finsa.config import RunConfig
from finsa.data.dataset import Dataset
from finsa.data.labels import LabelSpace
from finsa.data.ledger import Ledger
from finsa.data.tokenized import Labeled
from finsa.runs.run_folder import RunFolder
from finsa.training import results

Configure = Callable[..., RunConfig]
ALL_RIGHT = np.array([[0.0, -9.0], [-9.0, 0.0]] * 2)
UNSURE = np.array([[0.0, -3.0], [-3.0, 0.0], [0.0, -3.0], [-3.0, 0.0], [-3.0, 0.0], [0.0, -3.0]])  # the last two: wrong


def calibrated(cfg: RunConfig, path: Path, held: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of metrics and ``run.json``, for validation rows of the classes 0, 1, 0, 1, 0, 1."""
    names = list("abcdef")
    split = pl.DataFrame({"id": names, "text": names, "target": [None] * 6, "label": [0, 1] * 3})
    job = Labeled(Dataset({"validation": split, "test": split}, LabelSpace(("a", "b"), ("a", "b")), Ledger(), "0"))
    metrics: dict[str, Any] = {}
    folder = RunFolder(path, {})
    folder.note()
    results.calibrate(cfg, job, folder, metrics, {"validation": held, "test": UNSURE})
    return metrics["calibration"], json.loads((path / "run.json").read_text(encoding="utf-8"))


def test_a_temperature_at_its_bound_is_reported(
    config: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, facts = calibrated(config(), tmp_path, ALL_RIGHT)
    assert found["temperature"] == facts["calibration"]["temperature"] == 0.05
    assert "warning: the temperature reached its bound 0.05: the 4 validation rows do not determine it" in (
        capsys.readouterr().out
    )
    found, facts = calibrated(config(), tmp_path, UNSURE)
    assert 0.05 < found["temperature"] == facts["calibration"]["temperature"] < 20
    assert found["test"]["loss"] < found["test"]["loss_uncalibrated"]
    assert capsys.readouterr().out == ""


def test_without_calibration_the_temperature_is_one(config: Configure, tmp_path: Path) -> None:
    found, facts = calibrated(config("train.calibrate=false"), tmp_path, ALL_RIGHT)
    assert found["temperature"] == 1
    assert found["test"]["ece"] == found["test"]["ece_uncalibrated"]
    assert "calibration" not in facts
