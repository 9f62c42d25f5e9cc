from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from finsa.evaluation import metrics, tables

NAMES = ("利空", "中性", "利好")


def report(hits: int, n: int = 300) -> dict[str, object]:
    gold = [row % 3 for row in range(n)]
    return metrics.report(gold, [g if row < hits else (g + 1) % 3 for row, g in enumerate(gold)], NAMES)


def test_only_a_win_outside_the_noise_is_marked() -> None:
    assert tables.clear_winner({"a": report(280), "b": report(150)}) == "a"
    assert tables.clear_winner({"a": report(280), "b": report(276)}) is None
    assert tables.clear_winner({"a": report(280)}) is None


def test_the_comparison_shows_every_report_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_comparison({"zero_shot": report(150), "lora": report(280)}, "a title")
    shown = capsys.readouterr().out
    low, high = report(280)["intervals"]["macro_f1"]  # type: ignore[index]
    assert "a title" in shown
    assert "zero_shot" in shown
    assert f"{report(280)['macro_f1']:.4f} ({low:.3f}-{high:.3f})" in shown


def test_the_comparison_is_written_with_the_same_numbers(tmp_path: Path) -> None:
    reports = {"zero_shot": report(150), "lora": report(280)}
    tables.write_comparison(reports, tmp_path / "sweep")
    rows = list(csv.DictReader((tmp_path / "sweep" / "comparison.csv").open(encoding="utf-8")))
    assert [row["job"] for row in rows] == ["zero_shot", "lora"]
    assert float(rows[1]["macro_f1"]) == pytest.approx(reports["lora"]["macro_f1"], abs=1e-6)
    assert json.loads((tmp_path / "sweep" / "comparison.json").read_text(encoding="utf-8")) == reports


def test_a_report_shows_its_confusion_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_report(report(280), "by class")
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert f"{report(280)['per_class']['利好']['f1']:.4f}" in shown  # type: ignore[index]
