"""Figures of a report: the drawn data are the numbers of the comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import answers, write_run

from finsa.config import ReportStage, RunConfig
from finsa.evaluation import calibration, comparison, finished_runs, report_figures

GOLD = np.random.default_rng(0).integers(0, 3, 300)
LIMITS: Any = {"risk": None, "confidence": 0.95, "coverage": None, "coverage_by": "all", "prices": None}
OPTIONS = ReportStage(name="report", baseline=None, training_rows="same", samples=1000, seed=0, **LIMITS)
LABELS = ["利空", "中性", "利好"]


@pytest.fixture
def compared(config: Callable[..., RunConfig], tmp_path: Path) -> comparison.Comparison:
    for method, right in (("zero_shot", 0.3), ("lora", 0.7)):
        write_run(tmp_path / method, config(f"method={method}"), GOLD, answers(GOLD, right, 1))
    runs, _ = finished_runs.load(finished_runs.find_folders(str(tmp_path)))
    return comparison.compare(finished_runs.group(runs)[0], OPTIONS)


def test_the_drawn_data_are_the_numbers(compared: comparison.Comparison, tmp_path: Path, drawn: list[Any]) -> None:
    figures = report_figures.draw(compared, tmp_path / "figures")
    found = {figure.file.stem: one for figure, one in zip(figures, drawn, strict=True)}
    records, names = compared.records, ["lora", "zero_shot"]
    assert [record["arm"] for record in records] == names

    (axes,) = found["f1"].axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [record[name] for name in ("macro_f1", "weighted_f1") for record in records]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == names
    ends = axes.collections[0].get_segments()  # the error bars of macro-F1
    for record, ((low, _), (high, _)) in zip(records, ends, strict=True):
        assert (low, high) == pytest.approx((record["macro_f1_low"], record["macro_f1_high"]))

    (axes,) = found["confusion_matrices"].axes
    written = [text.get_text() for text in axes.texts]
    for group, image in zip(compared.groups, axes.images, strict=True):
        counts = np.array(group.runs[0].report["confusion"])
        shares = counts / counts.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(image.get_array(), shares)
        for count, share in zip(counts.ravel(), shares.ravel(), strict=True):
            assert f"{count}\n{share:.0%}" in written
    assert set(names) <= set(written)

    for axes, label in zip(found["precision_recall"].axes, LABELS, strict=True):
        assert axes.get_title() == label
        for line, name in zip(axes.lines, ("precision", "recall"), strict=True):
            assert line.get_xdata().tolist() == [record[f"{name}_{label}"] for record in records]

    upper, _ = found["training_curves"].axes
    log = compared.groups[0].runs[0].log
    points = [[record["step"], record["loss"]] for record in log if "loss" in record]
    assert [line.get_xydata().tolist() for line in upper.lines if len(line.get_xdata())] == [points]

    (axes,) = found["calibration"].axes
    for line, group, record in zip(axes.lines[1:], compared.groups, records, strict=True):
        bins = calibration.reliability(group.runs[0].confidence, group.runs[0].correct)
        assert line.get_xydata().tolist() == [[one["confidence"], one["accuracy"]] for one in bins]
        assert line.get_label() == f"{group.name}: ECE {record['calibration_error']:.3f}"

    (axes,) = found["label_distribution"].axes
    rows = ["true, train", "true, validation", "true, test", *names]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == rows
    shares = [np.bincount(GOLD, minlength=3)] * 3 + [np.bincount(group.predicted[0]) for group in compared.groups]
    expected = np.array(shares) / len(GOLD)
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], expected.T.ravel())


def test_a_line_figure_shows_the_baseline_and_the_best(
    config: Callable[..., RunConfig], tmp_path: Path, drawn: list[Any]
) -> None:
    write_run(tmp_path / "base", config("method=zero_shot"), GOLD, answers(GOLD, 0.1, 0))
    for number in range(1, 11):
        cfg = config("method=lora", f"train.learning_rate={number}e-4")
        write_run(tmp_path / str(number), cfg, GOLD, answers(GOLD, 0.2 + number / 20, number))
    runs, _ = finished_runs.load(finished_runs.find_folders(str(tmp_path)))
    compared = comparison.compare(finished_runs.group(runs)[0], OPTIONS)
    figures = report_figures.draw(compared, tmp_path / "figures")
    (place,) = (place for place, figure in enumerate(figures) if figure.file.stem == "calibration")
    assert figures[place].title.endswith("(the baseline and the best, 8 of 11 configurations)")
    labels = [line.get_label().split(":")[0] for line in drawn[place].axes[0].lines[1:]]
    assert labels == [*(group.name for group in compared.groups[:7]), "zero_shot"]
