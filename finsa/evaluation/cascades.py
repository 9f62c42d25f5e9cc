"""Cascades of runs: each answers the texts that it is sure of, and leaves the others to the next one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finsa.evaluation import metrics, statistics

FloatArray = NDArray[np.float64]
LEVELS = np.linspace(1, 0, 51)  # of the confidences of a run, from which thresholds are chosen
SAMPLES = 1000  # of the bootstrap


def answering(confidence: FloatArray, thresholds: Sequence[float]) -> NDArray[np.int64]:
    """Number of the run that answers each row, (n,): the first whose confidence is above its threshold, or the last.

    Args:
        confidence: of m runs, (m, n).
        thresholds: of all runs but the last, (m - 1,).
    """
    sure = confidence[:-1] > np.array(thresholds)[:, None]
    return np.asarray(np.vstack([sure, np.ones_like(confidence[-1], dtype=bool)]).argmax(axis=0))


def choose(
    probs: FloatArray, gold: NDArray[np.int64], tolerance: float, confidence: float, seed: int = 0
) -> list[float]:
    """Choose thresholds at which macro-F1 is not lower than that of the last run by more than a tolerance.

    From the first run to the last but one, its threshold is lowered from 1, where it answers no row, as long as the
    one-sided paired bootstrap interval of the difference stays above the tolerance. The first threshold that fails ends
    the sequence (fixed-sequence testing), so that the chosen ones do not look good by chance.

    Args:
        probs: of m runs on labeled rows, (m, n, c).
        gold: true classes, (n,).
        confidence: of the interval; m - 1 runs share what is left of it to 1.

    Returns:
        A threshold per run but the last.
    """
    surest, predicted, count = probs.max(axis=2), probs.argmax(axis=2), len(probs) - 1
    thresholds, rows = [1.0] * count, np.arange(len(gold))
    for place in range(count):
        for level in [*np.unique(np.quantile(surest[place], LEVELS, method="lower"))[::-1], 0.0]:
            tried = [*thresholds[:place], float(level), *thresholds[place + 1 :]]
            answers = predicted[answering(surest, tried), rows]
            _, drawn = statistics.paired_draws(gold, answers[None], predicted[-1:], probs.shape[2], SAMPLES, seed)
            if np.quantile(drawn, (1 - confidence) / count) < -tolerance:
                break
            thresholds = tried
    return thresholds


def macro_f1(predicted: NDArray[np.int64], gold: NDArray[np.int64], classes: int) -> float:
    """Macro-F1 of predicted classes, (n,)."""
    return float(metrics.averages(statistics.confusions(gold, predicted[None], classes))["macro_f1"][0])
