"""The learning curve of real runs: ordinary ones on nested sizes, reused when the command is repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.errors import ConfigError
from finsa.stages import curve, train

WORDS = ("method=tfidf_lr", "tracking=none", "method.baseline.strengths=[10]")
CURVE = ("stage=curve", *WORDS, FEW, "stage.seeds=2", "stage.draws=200", "stage.fractions=[0.1,0.2,0.5,1.0]")


def test_runs_of_each_size_are_fitted_and_reused(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"output_dir={tmp_path}"
    whole = train.run(config(*WORDS, FEW, "stage.compare_base=false", out))  # the run on all rows is an ordinary one
    capsys.readouterr()
    first = curve.run(config(*CURVE, out))
    shown = capsys.readouterr().out
    assert "run 7 of 8: 1,203 rows, seed 42, finished before" in shown
    assert shown.count("finished before") == 1
    assert first.run_dir is not None
    numbers = json.loads((first.run_dir / "metrics.json").read_text(encoding="utf-8"))["curve"]
    assert list(numbers["macro_f1"]) == ["120", "241", "602", "1203"]
    assert numbers["macro_f1"]["1203"][0] == pytest.approx(whole.metrics["test"]["macro_f1"])
    means = [np.mean(values) for values in numbers["macro_f1"].values()]
    assert means == sorted(means)
    assert means[-1] - means[0] > 0.1
    assert numbers["macro_f1"]["120"][0] != numbers["macro_f1"]["120"][1]  # other rows with another seed
    doubled = numbers["expected"]["2406"]
    assert 0 < doubled["gain"] < 0.2
    assert doubled["gain_interval"][0] <= doubled["gain"] <= doubled["gain_interval"][1]
    for run, size in zip(numbers["runs"], [120, 120, 241, 241, 602, 602, 1203, 1203], strict=True):
        ledger = json.loads((Path(run) / "ledger.json").read_text(encoding="utf-8"))
        assert ledger["rows"]["train"] == size
    assert (first.run_dir / "curve.png").is_file()
    again = curve.run(config(*CURVE, out))
    assert capsys.readouterr().out.count("finished before") == 8
    assert again.metrics == first.metrics


def test_sizes_that_cannot_be_fitted_are_refused(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage.fractions: of [\d,]+ training rows are .* a curve needs four sizes"):
        curve.run(config(*CURVE, "stage.fractions=[0.004,0.2,0.5,1.0]", f"output_dir={tmp_path}"))
    with pytest.raises(ConfigError, match=r"stage.fractions"):
        config("stage=curve", "method=tfidf_lr", "stage.fractions=[0.5,1.0]")
    assert not list(tmp_path.iterdir())
