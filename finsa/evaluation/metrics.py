"""Classification metrics with confidence intervals.

scipy and sklearn are imported inside functions: they take a second to import, which the service does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Measuring = Callable[[NDArray[Any], NDArray[Any], NDArray[np.float64]], float]  # true, predicted, probabilities (n, c)
DRAWS = 2000
MEASURE_DRAWS = 1000  # for measures that are computed anew on every sample


def report(gold: Sequence[int], predicted: Sequence[int], names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Compute the metrics of predictions.

    Args:
        gold: true classes, (n,).
        predicted: predicted classes, (n,).
        names: class names in order, (c,).
        seed: of the bootstrap.

    Returns:
        Plain values: n, accuracy, macro and weighted precision, recall and F1, per_class, confusion (rows true), and
        95 % intervals: Wilson for accuracy, percentile bootstrap over rows for the F1 scores. A class without
        predictions has precision 0; a class without rows has recall and F1 0 and still counts in the macro mean.
    """
    counted = _counted(gold, predicted, names)
    return {**counted, "intervals": intervals(np.array(counted["confusion"]), seed)}


def _counted(gold: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """The metrics of `report` without the intervals; a prediction outside the classes counts as wrong."""
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    classes = range(len(names))
    confusion = confusion_matrix(gold, predicted, labels=list(classes))
    table = precision_recall_fscore_support(gold, predicted, labels=list(classes), zero_division=0)
    means: dict[str, float] = {}
    for kind in ("macro", "weighted"):
        values = precision_recall_fscore_support(gold, predicted, labels=list(classes), average=kind, zero_division=0)
        means |= dict(zip((f"{kind}_precision", f"{kind}_recall", f"{kind}_f1"), map(float, values[:3]), strict=True))
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
        **means,
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def report_parsed(
    gold: Sequence[int], parsed: Sequence[int | None], names: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Compute the metrics of parsed answers; None (no class) always counts as wrong.

    Args:
        gold: true classes, (n,).
        parsed: classes parsed from the answers, (n,).
        names: class names in order, (c,).
        seed: of the bootstrap.

    Returns:
        The metrics of `report`, and ``unparsable``: number of answers without a class, by true class.
    """
    from sklearn.metrics import confusion_matrix

    lost = len(names)  # one more class without rows, which is excluded from the means
    predicted = [lost if answer is None else answer for answer in parsed]
    result = _counted(gold, predicted, names)
    confusion = confusion_matrix(gold, predicted, labels=list(range(lost + 1)))
    result["intervals"] = intervals(confusion, seed, classes=lost)
    missed = confusion[:lost, lost]
    return {**result, "unparsable": {name: int(count) for name, count in zip(names, missed, strict=True)}}


def intervals(
    confusion: NDArray[np.int64], seed: int, samples: int = DRAWS, classes: int | None = None
) -> dict[str, list[float]]:
    """95 % intervals from a confusion matrix (c, c).

    Drawing n rows with replacement is equivalent to drawing the cells of the matrix from a multinomial.
    Only nonempty cells are drawn, so that hundreds of classes take little memory.

    Args:
        confusion: rows true, columns predicted.
        seed, samples: of the bootstrap.
        classes: average the F1 scores over the first so many classes; None: all.
    """
    n, kept = int(confusion.sum()), slice(classes)
    gold, predicted = np.nonzero(confusion)
    drawn = np.random.default_rng(seed).multinomial(n, confusion[gold, predicted] / n, size=samples)
    hits, support, chosen = counts_by_class(drawn, gold, predicted, len(confusion))
    known = (confusion.sum(axis=0) + confusion.sum(axis=1) > 0)[kept]
    scores = resampled_averages(hits[:, kept], support[:, kept], chosen[:, kept], known)
    return {
        "accuracy": wilson(int(np.trace(confusion)), n),
        "macro_f1": percentiles(scores["macro_f1"]),
        "weighted_f1": percentiles(scores["weighted_f1"]),
    }


def wilson(hits: int, n: int) -> list[float]:
    """95 % interval of a proportion (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def averages(confusion: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Accuracy, macro-F1 and weighted F1 of confusion matrices (…, c, c), each (…,)."""
    f1, support = f1_scores(confusion), confusion.sum(axis=-1)
    n = support.sum(axis=-1)
    return {
        "accuracy": np.diagonal(confusion, axis1=-2, axis2=-1).sum(axis=-1) / n,
        "macro_f1": f1.mean(axis=-1),
        "weighted_f1": (f1 * support).sum(axis=-1) / n,
    }


def counts_by_class(
    drawn: NDArray[Any], gold: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Count rows by class in samples of the cells of a confusion matrix.

    Args:
        drawn: rows per sample and cell, (s, k).
        gold, predicted: true and predicted class of each cell, (k,).
        classes: number of classes, c.

    Returns:
        Correct rows, true rows and predicted rows per sample and class, each (s, c).
    """
    of_gold = np.eye(classes)[gold]
    right = (gold == predicted)[:, None]
    return drawn @ (of_gold * right), drawn @ of_gold, drawn @ np.eye(classes)[predicted]


def resampled_averages(
    hits: NDArray[Any], support: NDArray[Any], predicted: NDArray[Any], known: NDArray[np.bool_]
) -> dict[str, NDArray[np.float64]]:
    """Accuracy, macro-F1 and weighted F1 of samples, each (...,).

    A class that has rows or predictions, but none in a sample, is excluded from that sample's macro mean: counted as 0,
    it would bias the mean over many small classes far below the score of the whole set.

    Args:
        hits, support, predicted: from `counts_by_class`, (..., c).
        known: classes that have rows or predictions at all, (c,); the others count as 0 in every sample.
    """
    total, n = support + predicted, support.sum(axis=-1)
    f1 = np.divide(2.0 * hits, total, out=np.zeros(hits.shape), where=total > 0)
    return {
        "accuracy": hits.sum(axis=-1) / n,
        "macro_f1": f1.sum(axis=-1) / ((total > 0) | ~known).sum(axis=-1),
        "weighted_f1": (f1 * support).sum(axis=-1) / n,
    }


def f1_scores(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Per-class F1 of confusion matrices (…, c, c): 2 tp / (support + predictions), 0 for a class without either."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    total = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    return np.divide(2.0 * hits, total, out=np.zeros(hits.shape), where=total > 0)


def percentiles(values: NDArray[np.float64]) -> list[float]:
    """The 2.5th and the 97.5th percentile."""
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def probabilities(log_probs: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Normalize label log-probabilities over the labels: softmax(log_probs / temperature), (n, c), rows sum to 1."""
    shifted = np.exp((log_probs - log_probs.max(axis=1, keepdims=True)) / temperature)
    probs: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return probs


def values(
    named: Mapping[str, Measuring | None], gold: NDArray[Any], log_probs: NDArray[np.float64]
) -> dict[str, float]:
    """Compute measures by name.

    Args:
        named: `finsa.config.base.Measure`; a function for a measure that is not one of them.
        gold: true classes, (n,).
        log_probs: of the labels, (n, c).

    Returns:
        The values; NaN if a measure is not defined, such as the area under the curve where all rows have one class.
    """
    probs, predicted = probabilities(log_probs), log_probs.argmax(axis=1)  # of ties the first label, as everywhere
    return {
        name: float((function or partial(_measure, name))(gold, predicted, probs)) for name, function in named.items()
    }


def measures(
    named: Mapping[str, Measuring | None], gold: Sequence[int], log_probs: NDArray[np.float64], seed: int = 0
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Compute measures by name, with 95 % percentile bootstrap intervals over rows.

    The arguments are those of `values`, and the seed of the bootstrap.

    Returns:
        The values and their intervals, by name.
    """
    if not named:
        return {}, {}
    true, rng = np.asarray(gold), np.random.default_rng(seed)
    drawn = (rng.integers(0, len(true), len(true)) for _ in range(MEASURE_DRAWS))
    samples = [values(named, true[rows], log_probs[rows]) for rows in drawn]
    intervals = {}
    for name in named:
        known = np.array([sample[name] for sample in samples if not np.isnan(sample[name])])
        intervals[name] = percentiles(known) if len(known) else [float("nan")] * 2
    return values(named, true, log_probs), intervals


def _measure(name: str, gold: NDArray[Any], predicted: NDArray[Any], probs: NDArray[np.float64]) -> float:
    """A measure of scikit-learn; those of one class against the others are averaged over the classes that have rows."""
    from sklearn import metrics

    labels = list(range(probs.shape[1]))
    if name in ("mcc", "kappa", "quadratic_kappa") and len(np.union1d(gold, predicted)) < 2:
        return float("nan")
    match name:
        case "mcc":
            return float(metrics.matthews_corrcoef(gold, predicted))
        case "balanced_accuracy":
            return float(metrics.recall_score(gold, predicted, labels=np.unique(gold), average="macro"))
        case "kappa" | "quadratic_kappa":
            weights = "quadratic" if name == "quadratic_kappa" else None
            return float(metrics.cohen_kappa_score(gold, predicted, labels=labels, weights=weights))
        case "jaccard":
            known = np.union1d(gold, predicted)
            return float(metrics.jaccard_score(gold, predicted, labels=known, average="macro"))
        case "log_loss":
            return float(metrics.log_loss(gold, probs, labels=labels))
        case "brier":
            return float(((probs - np.eye(len(labels))[gold]) ** 2).sum(axis=1).mean())
        case "auroc" | "average_precision":
            score = metrics.roc_auc_score if name == "auroc" else metrics.average_precision_score
            mixed = [label for label in np.unique(gold) if (gold != label).any()]
            return float(np.mean([score(gold == label, probs[:, label]) for label in mixed])) if mixed else float("nan")
    raise ValueError(f"there is no measure '{name}'")
