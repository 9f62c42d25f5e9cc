"""A report over 50 runs: seconds from the command to the page, and what its intervals cover in simulations.

Run folders are written as finished runs leave them, with drawn answers: ten methods with five seeds each, and 50 arms
of one seed, because arms cost tests and figures. The report is a fresh process, imports included.

    python benchmarks/report.py                        # 596 test rows, as the embedded sample has
    python benchmarks/report.py --rows 16594           # as many as the news part of FinNF
    python benchmarks/report.py --coverage 10000       # also simulate the intervals
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from folders import answers, write_run

from finsa.config import compose
from finsa.evaluation import metrics

# Published confusion matrices (AIDF; rows true), of a weak and a good arm, as the truth of the simulations.
TRUTHS = {
    "lora": [[177, 44, 46], [92, 60, 78], [124, 107, 180]],
    "lora_response": [[136, 104, 27], [24, 105, 101], [6, 48, 357]],
}


def write(folder: Path, arms: int, seeds: int, rows: int) -> None:
    """Write run folders of arms that differ in the learning rate, some better than others."""
    gold = np.random.default_rng(0).integers(0, 3, rows)
    for arm in range(arms):
        for seed in range(seeds):
            overrides = ["method=lora", f"train.learning_rate={0.001 * (arm + 1):.3f}", f"seed={seed}"]
            values, choices = compose.compose_values(overrides)
            cfg = compose.build(values, choices, overrides)
            write_run(folder / f"{arm}_{seed}", cfg, gold, answers(gold, 0.5 + 0.4 * arm / arms, seed + 100 * arm))


def measure(arms: int, seeds: int, rows: int) -> float:
    """Seconds of the command over `arms` times `seeds` runs."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arms, seeds, rows)
        started = time.monotonic()
        words = [sys.executable, "run.py", "stage=report", f"runs={folder}"]
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - started


def coverage(trials: int, n: int) -> None:
    """Print how often the 95 % intervals hold the truth, over drawn test sets of n rows."""
    for name, truth in TRUTHS.items():
        shares = np.array(truth) / np.sum(truth)
        real = metrics.averages(shares)
        hits = dict.fromkeys(real, 0)
        for trial, counts in enumerate(np.random.default_rng(1).multinomial(n, shares.ravel(), size=trials)):
            for score, (low, high) in metrics.intervals(counts.reshape(3, 3), trial).items():
                hits[score] += bool(low <= real[score] <= high)
        told = ", ".join(f"{score} {100 * count / trials:.1f} %" for score, count in hits.items())
        print(f"coverage of {trials:,} test sets of {n} rows drawn from {name}: {told}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=596, help="test rows of every run")
    parser.add_argument("--coverage", type=int, default=0, help="simulated test sets; 0: none")
    chosen = parser.parse_args()
    for arms, seeds in ((10, 5), (50, 1)):
        print(
            f"{arms} arms with {seeds} seeds, {chosen.rows:,} rows: {measure(arms, seeds, chosen.rows):.1f} s",
            flush=True,
        )
    if chosen.coverage:
        coverage(chosen.coverage, chosen.rows)
