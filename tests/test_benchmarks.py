"""The benchmark runs, and its arms learn the same: a short pass at the embedded shape."""

from __future__ import annotations

import re
from pathlib import Path

import commands

from benchmarks import bench
from finsa.config import ROOT


def test_the_training_benchmark_compares_equal_arms() -> None:
    done = commands.run("--quick", "--rows", "4", "--turns", "1", script="benchmarks/training_step.py")
    assert done.returncode == 0, done.stderr
    equal = re.search(
        r"loss ([\d.]+) \(trl ([\d.]+)\), gradients differ by ([\d.e-]+)",
        " ".join(re.sub("│", " ", done.stdout).split()),
    )
    assert equal is not None, done.stdout
    assert abs(float(equal[1]) - float(equal[2])) < 1e-4
    assert float(equal[3]) < 1e-5
    assert len(re.findall(r"samples/s", done.stdout)) == 14


def test_the_mixture_benchmark_runs_its_arms() -> None:
    done = commands.run("--quick", "--turns", "1", "--batch", "2", "--tokens", "24", script="benchmarks/mixture.py")
    assert done.returncode == 0, done.stderr
    told = " ".join(re.sub("│", " ", done.stdout).split())  # cells wrap
    assert len(re.findall(r"as fast as published", told)) == 12


def test_an_epoch_is_timed_beside_stock_trainers() -> None:
    done = commands.run("--quick", script="benchmarks/epoch.py")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"turn 1: (.+): \[\(([\d.]+), ([\d.]+)\)\]", done.stdout)
    assert [name for name, _, _ in found] == ["transformers Trainer", "trl SFTTrainer, completion only", "finsa"]
    assert all(float(seconds) > 0 and 0 < float(score) <= 1 for _, seconds, score in found)


def test_the_cost_curves_have_every_axis() -> None:
    done = commands.run("--quick", script="benchmarks/curves.py")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"[\d.]+ ms", done.stdout)) == 8
    shown = " ".join(done.stdout.split())
    assert all(f"a step over {axis}" in shown for axis in ("prompt tokens", "rows", "classes", "experts"))


def test_a_micro_batch_is_timed_in_every_way() -> None:
    """The script ends with an error where losses differ."""
    done = commands.run("--quick", script="benchmarks/lines.py")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"│ (\w[\w ,]+?) +│ +[\d.]+ s +([\d.]+)x", done.stdout)
    alone = ["side by side", "packs behind masks", "one line"]
    behind = [*alone, "prefix once, side by side", "prefix once, one line"]
    cut = [f"{way}, {what}" for way in ("side by side", "one line") for what in ("8 rows", "1008 tokens")]
    assert [arm for arm, _ in found] == alone + behind + cut
    assert all(float(ratio) > 0 for _, ratio in found)


def test_the_table_and_the_chart_come_from_the_results(tmp_path: Path) -> None:
    rows = bench.rows(bench.RESULTS)
    assert {"training_step (qwen05b)", "inference (qwen05b)", "data_pipeline"} <= {row.benchmark for row in rows}
    assert all(row.equal and row.value for row in rows)
    bench.draw(rows, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_every_benchmark_is_run_by_the_one_command() -> None:
    scripts = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert set(bench.WORDS) == scripts - {
        "bench",
        "drawn",
        "gpu",
        "kept",
        "predict",
        "real",
        "stock",
    }
    assert set(bench.READERS) == set(bench.WORDS) - {"report", "serving"}
