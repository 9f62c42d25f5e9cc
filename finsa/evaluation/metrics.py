"""Classification metrics with confidence intervals.

scipy and sklearn are imported inside functions: they take a second to import, which the service does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Measuring = Callable[[NDArray[Any], NDArray[Any], NDArray[np.float64]], float]  # true, predicted, probabilities (n, c)
DRAWS = 2000
MEASURE_DRAWS = 1000
CHUNK = 2_000_000  # counts drawn at once, to limit memory


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


def by_period(
    gold: Sequence[int], predicted: Sequence[int], periods: Sequence[str | None], names: Sequence[str]
) -> dict[str, Any]:
    """The number of rows, accuracy and macro-F1 of each period, with intervals; rows without a period are left out.

    Macro-F1 is None in a period that lacks a class, because it would count as 0.
    """
    found = {}
    for period in sorted({one for one in periods if one is not None}):
        rows = [row for row, one in enumerate(periods) if one == period]
        one = report([gold[row] for row in rows], [predicted[row] for row in rows], names)
        if not all(of["support"] for of in one["per_class"].values()):
            one["macro_f1"] = one["intervals"]["macro_f1"] = None
        found[period] = {name: one[name] for name in ("n", "accuracy", "macro_f1", "intervals")}
    return found


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


def expected_level(probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected level of ordered labels with probabilities (…, c), (…,); the first label is level 1."""
    return np.asarray(probs @ np.arange(1, probs.shape[-1] + 1))


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
    return {
        name: float(drawn[0]) for name, drawn in _on_samples(named, gold, log_probs, np.ones((1, len(gold)))).items()
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
    n, size = len(true), max(1, CHUNK // len(true))
    parts = []
    for start in range(0, MEASURE_DRAWS, size):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(size, MEASURE_DRAWS - start))
        parts.append(_on_samples(named, true, log_probs, counts.astype(np.float64)))
    intervals = {}
    for name in named:
        drawn = np.concatenate([part[name] for part in parts])
        known = drawn[~np.isnan(drawn)]
        intervals[name] = percentiles(known) if len(known) else [float("nan")] * 2
    return values(named, true, log_probs), intervals


def _on_samples(
    named: Mapping[str, Measuring | None],
    gold: NDArray[Any],
    log_probs: NDArray[np.float64],
    counts: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """Measures of s samples in which each of the n rows occurs a number of times, (s, n): by name, (s,)."""
    probs, predicted = probabilities(log_probs), log_probs.argmax(axis=1)  # of ties the first label, as everywhere
    classes, found = probs.shape[1], dict[str, NDArray[np.float64]]()
    cells = np.eye(classes**2)[gold * classes + predicted]
    confusion = (counts @ cells).reshape(-1, classes, classes)
    for name, function in named.items():
        if function is not None:
            rows = [np.repeat(np.arange(len(gold)), sample.astype(int)) for sample in counts]
            found[name] = np.array([float(function(gold[one], predicted[one], probs[one])) for one in rows])
        elif name == "log_loss":
            found[name] = -(counts @ np.log(probs[np.arange(len(gold)), gold])) / counts.sum(axis=1)
        elif name == "brier":
            found[name] = (counts @ ((probs - np.eye(classes)[gold]) ** 2).sum(axis=1)) / counts.sum(axis=1)
        elif name in ("auroc", "average_precision"):
            measure = _auroc if name == "auroc" else _average_precision
            by_class = np.array([measure(probs[:, label], gold == label, counts) for label in range(classes)])
            known = ~np.isnan(by_class)
            sums = np.where(known, by_class, 0).sum(axis=0)
            found[name] = np.divide(sums, known.sum(axis=0), out=np.full(len(counts), np.nan), where=known.any(axis=0))
        else:
            found[name] = _of_confusion(name, confusion)
    return found


def _of_confusion(name: str, confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """A measure of confusion matrices, rows true, (s, c, c): (s,), as scikit-learn defines it; NaN for one class."""
    n, hits = confusion.sum(axis=(1, 2)), np.diagonal(confusion, axis1=1, axis2=2)
    true, predicted = confusion.sum(axis=2), confusion.sum(axis=1)

    def mean(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean of the quotients over the classes whose divisor is not 0."""
        quotients = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        return np.asarray(quotients.sum(axis=1) / (below > 0).sum(axis=1))

    if name == "balanced_accuracy":
        return mean(hits, true)
    if name == "jaccard":
        return mean(hits, true + predicted - hits)
    distance = np.abs(np.subtract.outer(np.arange(true.shape[1]), np.arange(true.shape[1]))).astype(np.float64)
    if name == "mae":
        return np.asarray((confusion * distance).sum(axis=(1, 2)) / n)
    single = ((true + predicted) > 0).sum(axis=1) < 2
    if name == "mcc":
        above = hits.sum(axis=1) * n - (true * predicted).sum(axis=1)
        below = np.sqrt((n**2 - (true**2).sum(axis=1)) * (n**2 - (predicted**2).sum(axis=1)))
        value = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    else:
        weights = distance**2 if name == "quadratic_kappa" else (distance > 0).astype(np.float64)
        chance = true[:, :, None] * predicted[:, None, :] / n[:, None, None]
        above, below = (confusion * weights).sum(axis=(1, 2)), (chance * weights).sum(axis=(1, 2))
        value = 1 - np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return np.asarray(np.where(single, np.nan, value))


def _auroc(scores: NDArray[np.float64], inside: NDArray[np.bool_], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area under the ROC curve of samples (s, n): the share of pairs in the right order, (s,); NaN without pairs."""
    inner, outer = _by_score(scores, inside, counts)
    below = np.cumsum(outer, axis=1) - outer / 2  # of equal scores, half are below
    pairs = inner.sum(axis=1) * outer.sum(axis=1)
    won = (inner * below).sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def _average_precision(
    scores: NDArray[np.float64], inside: NDArray[np.bool_], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Precision at each threshold, weighted by the recall that it adds, (s,); NaN for samples with one kind of row."""
    inner, outer = (part[:, ::-1] for part in _by_score(scores, inside, counts))
    hits, chosen = np.cumsum(inner, axis=1), np.cumsum(inner + outer, axis=1)
    precision = np.divide(hits, chosen, out=np.zeros_like(hits), where=chosen > 0)
    total = inner.sum(axis=1)
    both = (total > 0) & (outer.sum(axis=1) > 0)
    return np.divide((inner * precision).sum(axis=1), total, out=np.full(len(counts), np.nan), where=both)


def _by_score(
    scores: NDArray[np.float64], inside: NDArray[np.bool_], counts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Number of rows inside and outside of the class per distinct score, ascending, each (s, k)."""
    order = np.argsort(scores, kind="stable")
    starts = np.unique(scores[order], return_index=True)[1]
    return tuple(np.add.reduceat(counts[:, order] * part[order], starts, axis=1) for part in (inside, ~inside))  # type: ignore[return-value]
