"""Classification metrics with their intervals. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

DRAWS = 2000


def report(gold: Sequence[int], predicted: Sequence[int], names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Compare predictions with the truth.

    Args:
        gold: true classes, (n,).
        predicted: predicted classes, (n,).
        names: classes in their order, (c,).
        seed: of the bootstrap.

    Returns:
        Plain values: n, accuracy, macro and weighted precision, recall and F1, per_class, confusion (rows true), and
        95 % intervals: Wilson for accuracy, percentile bootstrap over rows for the F1 scores. A class without a
        single prediction has precision 0; a class without a row has recall and F1 0 and still counts in the macro mean.
    """
    classes = range(len(names))
    confusion = confusion_matrix(gold, predicted, labels=list(classes))
    table = precision_recall_fscore_support(gold, predicted, labels=list(classes), zero_division=0)
    averages: dict[str, float] = {}
    for kind in ("macro", "weighted"):
        values = precision_recall_fscore_support(gold, predicted, labels=list(classes), average=kind, zero_division=0)
        averages |= dict(
            zip((f"{kind}_precision", f"{kind}_recall", f"{kind}_f1"), map(float, values[:3]), strict=True)
        )
    per_class = {
        name: {
            "precision": float(table[0][c]),
            "recall": float(table[1][c]),
            "f1": float(table[2][c]),
            "support": int(table[3][c]),
        }
        for c, name in enumerate(names)
    }
    return {
        "n": len(gold),
        "accuracy": float(accuracy_score(gold, predicted)),
        **averages,
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "intervals": intervals(confusion, seed),
    }


def intervals(confusion: NDArray[np.int64], seed: int) -> dict[str, list[float]]:
    """95 % intervals from a confusion matrix (c, c).

    Drawing n rows with replacement is drawing the matrix' cells from a multinomial, which needs no rows and no loop.
    """
    n = int(confusion.sum())
    wilson = binomtest(int(np.trace(confusion)), n).proportion_ci(confidence_level=0.95, method="wilson")
    drawn = np.random.default_rng(seed).multinomial(n, confusion.ravel() / n, size=DRAWS)
    f1 = f1_scores(drawn.reshape(DRAWS, *confusion.shape))
    support = drawn.reshape(DRAWS, *confusion.shape).sum(axis=2)
    weighted = (f1 * support).sum(axis=1) / n
    return {
        "accuracy": [float(wilson.low), float(wilson.high)],
        "macro_f1": _percentiles(f1.mean(axis=1)),
        "weighted_f1": _percentiles(weighted),
    }


def f1_scores(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per-class F1 of confusion matrices (…, c, c): 2 tp / (support + predictions), 0 for a class without either."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    total = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    return np.divide(2.0 * hits, total, out=np.zeros(hits.shape), where=total > 0)


def _percentiles(values: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normalise label log-probabilities over the labels: (n, c), rows sum to 1."""
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return shares
