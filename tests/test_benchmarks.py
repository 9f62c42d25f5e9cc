"""The benchmark runs, and its arms learn the same: a short pass at the embedded shape."""

from __future__ import annotations

import re
import subprocess
import sys

from finsa.config import ROOT


def test_the_training_benchmark_compares_equal_arms() -> None:
    words = [sys.executable, "benchmarks/training_step.py", "--quick", "--rows", "4", "--turns", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    equal = re.search(
        r"loss ([\d.]+) \(trl ([\d.]+)\), gradients differ by ([\d.e-]+)",
        " ".join(re.sub("│", " ", done.stdout).split()),
    )
    assert equal is not None, done.stdout
    assert abs(float(equal[1]) - float(equal[2])) < 1e-4
    assert float(equal[3]) < 1e-5
    assert len(re.findall(r"samples/s", done.stdout)) == 10


def test_the_mixture_benchmark_runs_its_arms() -> None:
    words = [sys.executable, "benchmarks/mixture.py", "--quick", "--turns", "1", "--batch", "2", "--tokens", "24"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"as fast as published", done.stdout)) == 10
