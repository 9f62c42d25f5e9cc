"""The gap between later rows and rows mixed in time: found where drift is planted; without, the interval contains 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finsa.config import ReportStage, RunConfig
from finsa.evaluation import comparison, finished_runs, report
from finsa.stages import train

WORDS = (
    "data=generated_drift",
    "method=tfidf_lr",
    "method.baseline.strengths=[10]",
    "tracking=none",
    "stage.compare_base=false",
)


def _runs(config: Callable[..., RunConfig], folder: Path, *words: str) -> list[Path]:
    done = []
    for rule in ("by_class", "time"):
        done.append(train.run(config(*WORDS, f"data.split.rule={rule}", *words, f"output_dir={folder}")).run_dir)
    return [path for path in done if path is not None]


def _gap(config: Callable[..., RunConfig], paths: list[Path]) -> dict[str, Any]:
    options = config("stage=report", "runs=x").stage
    assert isinstance(options, ReportStage)
    (gap,), later = comparison.forward_gaps(finished_runs.load(paths)[0], options)
    assert [run.path for run in later] == paths[1:]
    return gap


def test_planted_drift_is_found_and_reported(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    paths = _runs(config, tmp_path)
    gap = _gap(config, paths)
    assert gap["gap_low"] > 0.02
    assert gap["gap"] == pytest.approx(gap["macro_f1"] - gap["forward_macro_f1"])
    options = config("stage=report", "runs=x").stage
    assert isinstance(options, ReportStage)
    made = report.build(paths, options, None, {})
    assert made.remarks[0].startswith(f"Macro-F1 of tfidf_lr is {gap['gap']:.4f} ({gap['gap_low']:.4f} to ")
    assert made.tables["forward"].rows[0][3] == f"{gap['gap']:.4f}"
    assert [row[1] for row in made.tables["periods"].rows] == ["2023-10", "2023-11", "2023-12"]
    report.write(made, tmp_path / "report")
    assert "Forward in time" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_without_drift_the_interval_contains_0(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for seed in (7, 8):
        drift = ("data.generator.drift=0.0", f"data.generator.seed={seed}", "data.generator.rows=2400")
        gap = _gap(config, _runs(config, tmp_path / str(seed), *drift))
        assert gap["gap_low"] <= 0 <= gap["gap_high"]


def test_scores_by_period_are_those_of_the_predictions(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    _, later = _runs(config, tmp_path, "data.generator.rows=1200")
    rows = [json.loads(line) for line in (later / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    periods = json.loads((later / "metrics.json").read_text(encoding="utf-8"))["test"]["periods"]
    assert sum(one["n"] for one in periods.values()) == len(rows) == 300
    for name, one in periods.items():
        inside = [row for row in rows if row["time"].startswith(name)]
        assert one["n"] == len(inside)
        assert one["accuracy"] == pytest.approx(sum(row["gold"] == row["label"] for row in inside) / len(inside))
        low, high = one["intervals"]["accuracy"]
        assert low < one["accuracy"] < high
    page = (later / "index.html").read_text(encoding="utf-8")
    assert "Scores by period" in page
    assert (later / "periods.png").is_file()


def test_a_run_ends_although_a_period_lacks_a_class(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    days = [f"2024-{month:02}-{day:02}" for month in range(1, 7) for day in range(1, 21)]
    lines = [f"text {n},{'a' if n > 117 else 'ab'[n % 2]},{day}" for n, day in enumerate(days)]
    (tmp_path / "rows.csv").write_text(
        "text,label,when\n" + "\n".join(lines).replace("06-20", "07-01"), encoding="utf-8"
    )
    words = ("data=table", f"data.files={tmp_path / 'rows.csv'}", "data.columns.time=when", "data.split.rule=time")
    done = train.run(config(*words, "method=majority", "tracking=none", f"output_dir={tmp_path}"))
    july = done.metrics["test"]["periods"]["2024-07"]
    assert (july["n"], july["macro_f1"], july["intervals"]["macro_f1"]) == (1, None, None)
