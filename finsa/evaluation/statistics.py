"""Significance tests between runs on the same test rows: paired bootstrap, exact McNemar test, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from finsa.evaluation import metrics

LEVEL = 0.05
CHUNK = 4_000_000  # numbers drawn at once, to limit memory

Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Difference:
    """A paired difference of a measure, tested in a family of differences.

    Args:
        value: first minus second.
        low, high: its interval, at the confidence level of its step in Holm's procedure: 95 % in a family of one.
        p: two-sided p-value of no difference.
        corrected: p, corrected for the size of the family.
        sign: -1 if a lower value is better.
    """

    value: float
    low: float
    high: float
    p: float
    corrected: float
    sign: int = 1

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` if both the corrected test and the interval agree, otherwise ``inconclusive``."""
        if self.corrected >= LEVEL or self.low <= 0 <= self.high:
            return "inconclusive"
        return "better" if self.sign * self.value > 0 else "worse"


def resampled(
    gold: Classes, predictions: Classes, classes: int, samples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Scores of runs on resampled test rows, the same rows for all runs.

    Rows with the same true class and the same predictions of all runs form one cell. Drawing n rows with replacement is
    equivalent to drawing the cell counts from a multinomial, which needs no loop over rows.

    Args:
        gold: true classes, (n,).
        predictions: of m runs, (m, n).
        classes: number of classes, c.

    Returns:
        accuracy, macro_f1 and weighted_f1, each (m, samples).
    """
    cell = gold
    for column in predictions:  # renumbered at each step to keep the codes small
        cell = np.unique(cell * classes + column, return_inverse=True)[1]
    first, counts = np.unique(cell, return_index=True, return_counts=True)[1:]
    answers = predictions[:, first]  # (m, k)
    known = [np.isin(np.arange(classes), [gold, column]) for column in predictions]
    rng, size = np.random.default_rng(seed), max(1, CHUNK // max(len(counts), classes * len(predictions)))
    parts = []
    for start in range(0, samples, size):
        number = min(size, samples - start)
        drawn = rng.multinomial(len(gold), counts / len(gold), size=number).astype(np.float64)
        scores = [
            metrics.resampled_averages(*metrics.counts_by_class(drawn, gold[first], column, classes), mask)
            for column, mask in zip(answers, known, strict=True)
        ]
        parts.append({name: np.stack([score[name] for score in scores]) for name in scores[0]})
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def resampled_means(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Means over resampled rows of a value per row and run, (m, n), the same rows for all runs: (m, samples)."""
    cells, counts = np.unique(values, axis=1, return_counts=True)  # rows that are equal in all runs
    drawn = np.random.default_rng(seed).multinomial(values.shape[1], counts / values.shape[1], size=samples)
    return np.asarray(cells @ drawn.T / values.shape[1])


def over_seeds(scores: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Mean over the runs (m, samples), which are also drawn with replacement: seeds are a sample too."""
    runs, samples = scores.shape
    chosen = np.random.default_rng(seed).integers(0, runs, scores.shape)
    return scores[chosen, np.arange(samples)].mean(axis=0)


def paired_draws(
    gold: Classes, first: Classes, second: Classes, classes: int, samples: int, seed: int
) -> tuple[float, NDArray[np.float64]]:
    """Paired bootstrap of the difference in macro-F1 between two groups of runs (Efron & Tibshirani 1993).

    Args:
        gold: true classes, (n,).
        first, second: predictions of the groups' runs, (a, n) and (b, n); their means over runs are compared.
        classes: number of classes.

    Returns:
        The difference, first minus second, and the differences on resampled rows, (samples,).
    """
    scores = resampled(gold, np.vstack([first, second]), classes, samples, seed)["macro_f1"]
    return _macro_f1(gold, first, classes) - _macro_f1(gold, second, classes), between(scores, len(first), seed)


def between(scores: NDArray[np.float64], first: int, seed: int) -> NDArray[np.float64]:
    """Differences of the means of two groups of runs on resampled rows, (samples,).

    Args:
        scores: of the runs of both groups, (a + b, samples).
        first: number of runs of the first group, a.
    """
    return over_seeds(scores[:first], seed + 1) - over_seeds(scores[first:], seed + 2)


def differences(pairs: Sequence[tuple[float, NDArray[np.float64]]], sign: int = 1) -> list[Difference]:
    """Test a family of differences, with intervals and corrected p-values that are always consistent.

    Holm's procedure compares the i-th smallest of m p-values with LEVEL / (m - i + 1) and stops at the first that is
    not below it. Each interval has the level of its step, and after the procedure has stopped, of that last step: it
    excludes 0 if and only if the corrected p is below LEVEL.

    Args:
        pairs: from `paired_draws`.
        sign: -1 if a lower value is better.
    """
    p = [_two_sided(drawn) for _, drawn in pairs]
    corrected = holm(p)
    intervals: dict[int, tuple[float, float]] = {}
    level, stopped = LEVEL, False
    for step, place in enumerate(np.argsort(p, kind="stable").tolist()):
        if not stopped:
            level = LEVEL / (len(pairs) - step)
        stopped = stopped or corrected[place] >= LEVEL
        intervals[place] = _interval(pairs[place][1], level)
    values = enumerate(pairs)
    return [Difference(value, *intervals[place], p[place], corrected[place], sign) for place, (value, _) in values]


def _two_sided(drawn: NDArray[np.float64]) -> float:
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    # One is added to both, as if the observed sample were one of the draws (Davison & Hinkley 1997), so p is never 0.
    return min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))


def _interval(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    """The order statistics that lie on one side of 0 if and only if `_two_sided` is below the level.

    With too few samples for the level there is no such statistic, and the interval is -1 to 1.
    """
    place = math.ceil(level * (len(drawn) + 1) / 2 - 1e-9) - 2  # from 0
    if place < 0:
        return -1.0, 1.0
    ordered = np.sort(drawn)
    return float(ordered[place]), float(ordered[-1 - place])


def _macro_f1(gold: Classes, predictions: Classes, classes: int) -> float:
    return float(metrics.averages(confusions(gold, predictions, classes))["macro_f1"].mean())


def confusions(gold: Classes, predictions: Classes, classes: int) -> Classes:
    """Confusion matrices (m, c, c), rows true, of runs' predictions (m, n)."""
    counts = [np.bincount(gold * classes + one, minlength=classes**2) for one in predictions]
    return np.array(counts).reshape(-1, classes, classes)


def mcnemar(fixed: int, broken: int) -> float:
    """p-value of the exact McNemar test that either run is equally likely to be the only correct one.

    Args:
        fixed: rows that only the first classifies correctly.
        broken: rows that only the second classifies correctly.
    """
    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


def mcnemar_range(first: int, second: int, n: int) -> tuple[float, float]:
    """Smallest and largest p-value of the exact McNemar test with `first` and `second` correct rows of n.

    If only totals are published, the number of rows that both classify correctly is unknown; the range covers all
    possible numbers.
    """
    both = np.arange(max(0, first + second - n), min(first, second) + 1)
    few, many = min(first, second) - both, max(first, second) - both
    p = np.minimum(1.0, 2 * binom.cdf(few, few + many, 0.5))
    return float(p.min()), float(p.max())


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple testing (Holm 1979): the i-th smallest of m is multiplied by m - i + 1."""
    order = np.argsort(values, kind="stable")
    scaled = np.asarray(values, dtype=float)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(value) for value in corrected]
