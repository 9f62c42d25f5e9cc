"""Measures of predicted numbers and of predicted sets of labels, with bootstrap intervals over rows.

Letters: n rows, k values of a row (its number, or a 1 for each label that it has), s samples of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.data.labels import LabelSpace
from finsa.evaluation import calibration, metrics

FloatArray = NDArray[np.float64]
CHUNK = 2_000_000  # counts drawn at once, to limit memory
CONSTANT = 1e-12  # relative standard deviation below which values differ only by rounding


def probabilities(labels: LabelSpace, scores: FloatArray, temperature: float = 1.0) -> FloatArray:
    """Probability of each label or anchor, (n, c); (n, 0) for the output of a regression head.

    Args:
        labels: of the run.
        scores: log-probabilities of the anchors, log-odds of the labels, or the output of a head, (n, m).
        temperature: that divides log-odds; numbers have none.
    """
    if labels.task == "multi_label":
        return np.asarray(1 / (1 + np.exp(-np.clip(scores / temperature, -500, 500))))
    return metrics.probabilities(scores) if scores.shape[1] == len(labels) else np.zeros((len(scores), 0))


def decide(
    labels: LabelSpace, scores: FloatArray, temperature: float = 1.0, thresholds: Sequence[float] | None = None
) -> FloatArray:
    """Predicted values, (n, k): the expected number, or the output of a head within the range; or the sets of labels.

    Args:
        labels, scores, temperature: as for `probabilities`.
        thresholds: probability above which a label applies, (c,); None: 0.5.
    """
    probs = probabilities(labels, scores, temperature)
    if labels.task == "multi_label":
        return (probs > np.asarray(thresholds or [0.5] * len(labels))).astype(np.float64)
    if probs.shape[1]:
        return probs @ np.array(labels.numbers)[:, None]
    return np.clip(scores, labels.numbers[0], labels.numbers[-1])


def loss(labels: LabelSpace, scores: FloatArray, truth: FloatArray, temperature: float = 1.0) -> float:
    """Mean squared error of the numbers, or mean cross-entropy of the labels, each on its own."""
    if labels.task == "regression":
        return float(((decide(labels, scores) - truth) ** 2).mean())
    odds = scores / temperature
    return float((np.logaddexp(0, odds) - truth * odds).mean())


def fit_thresholds(probs: FloatArray, truth: FloatArray) -> list[float]:
    """The threshold of each label with the highest F1, halfway between two probabilities; 0.5 for a label without rows.

    Args:
        probs, truth: of the validation rows, (n, c).
    """
    thresholds = []
    for p, true in zip(probs.T, truth.T, strict=True):
        order = np.argsort(-p, kind="stable")
        hits, chosen = np.cumsum(true[order]), np.arange(1, len(p) + 1)
        f1 = 2 * hits / (chosen + true.sum())
        ends = np.append(np.diff(p[order]) < 0, True)  # equal probabilities are chosen together
        best = int(np.where(ends, f1, -1.0).argmax())
        below = p[order][best + 1] if best + 1 < len(p) else 0.0
        thresholds.append(float((p[order][best] + below) / 2) if true.any() else 0.5)
    return thresholds


def calibrate(
    labels: LabelSpace, scores: dict[str, FloatArray], truth: dict[str, FloatArray], fitted: bool
) -> dict[str, Any]:
    """Fit temperature and thresholds of several labels on the ``validation`` rows, and report the calibration error.

    Args:
        labels: of the run.
        scores, truth: by split.
        fitted: whether to fit them, instead of the temperature 1 and the thresholds 0.5.

    Returns:
        ``temperature``, 1 for numbers; for several labels also ``thresholds`` by label and a report by split.
    """
    if labels.task == "regression":
        return {"temperature": 1.0}
    temperature, thresholds = 1.0, [0.5] * len(labels)
    if fitted:
        held, true = scores["validation"], truth["validation"]
        temperature = calibration.minimize(held, lambda odds: loss(labels, odds, true))
        thresholds = fit_thresholds(probabilities(labels, held, temperature), true)
    reports: dict[str, Any] = {}
    for split, values in scores.items():
        reports[split] = {"n": len(values)}
        for name, power in (("", temperature), ("_uncalibrated", 1.0)):
            probs = probabilities(labels, values, power)
            correct = (probs > 0.5) == (truth[split] > 0.5)
            reports[split][f"ece{name}"] = calibration.ece(np.maximum(probs, 1 - probs).ravel(), correct.ravel())
            reports[split][f"loss{name}"] = loss(labels, values, truth[split], power)
    named = dict(zip(labels.names, thresholds, strict=True))
    return {"temperature": temperature, "bins": calibration.BINS, "thresholds": named, **reports}


# ------------------------------------------------------------------------------------------------ measures


def report(labels: LabelSpace, truth: FloatArray, predicted: FloatArray, seed: int = 0) -> dict[str, Any]:
    """Compute the measures of predicted values (n, k).

    Returns:
        Plain values: task, n, the measures of `on_samples`, and 95 % intervals (percentile bootstrap over rows); a
        measure is None if it is not defined. For several labels also per_class, as for one class per row.
    """
    drawn = resampled(labels.task, truth, [predicted], metrics.DRAWS, seed)
    result: dict[str, Any] = {"task": labels.task, "n": len(truth)}
    result |= {name: _known(value) for name, value in values(labels.task, truth, predicted).items()}
    ends = {name: metrics.percentiles(one[~np.isnan(one)]) for name, (one,) in drawn.items() if not np.isnan(one).all()}
    result["intervals"] = {name: interval for name, interval in ends.items() if result[name] is not None}
    if labels.task == "multi_label":
        hits, chosen, support = (truth * predicted).sum(0), predicted.sum(0), truth.sum(0)
        result["per_class"] = {
            name: {
                "precision": float(hits[at] / chosen[at]) if chosen[at] else 0.0,
                "recall": float(hits[at] / support[at]) if support[at] else 0.0,
                "f1": float(2 * hits[at] / max(1.0, chosen[at] + support[at])),
                "support": int(support[at]),
            }
            for at, name in enumerate(labels.names)
        }
    return result


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def values(task: str, truth: FloatArray, predicted: FloatArray) -> dict[str, float]:
    """The measures of predicted values (n, k); NaN if not defined, such as a correlation with constant predictions."""
    return {name: float(one[0]) for name, one in on_samples(task, truth, predicted, np.ones((1, len(truth)))).items()}


def resampled(
    task: str, truth: FloatArray, runs: Sequence[FloatArray], samples: int, seed: int
) -> dict[str, FloatArray]:
    """Measures of several runs' predictions on resampled rows, the same rows for all runs: by name, (runs, samples)."""
    parts = []
    for counts in _counts(len(truth), samples, seed):
        found = [on_samples(task, truth, predicted, counts) for predicted in runs]
        parts.append({name: np.stack([one[name] for one in found]) for name in found[0]})
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _counts(n: int, samples: int, seed: int) -> Iterator[FloatArray]:
    rng, size = np.random.default_rng(seed), max(1, CHUNK // n)
    for start in range(0, samples, size):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(size, samples - start)).astype(np.float64)


def on_samples(task: str, truth: FloatArray, predicted: FloatArray, counts: FloatArray) -> dict[str, FloatArray]:
    """Measures of samples in which each row occurs a number of times, counts (s, n): by name, each (s,).

    ``regression``: root mean squared and mean absolute error, Pearson's and Spearman's correlation, and the cosine of
    predicted and true numbers as vectors, the score of SemEval-2017 task 5. ``multi_label``: macro and micro average of
    the labels' F1, and the share of rows whose whole set is right. A label that is neither true nor predicted in a
    sample is excluded from that sample's macro average.
    """
    n = counts.sum(axis=1)
    if task == "multi_label":
        hits, total = counts @ (truth * predicted), counts @ (truth + predicted)
        known = (truth + predicted).any(axis=0)
        f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
        every = total.sum(axis=1)
        return {
            "macro_f1": f1.sum(axis=1) / ((total > 0) | ~known).sum(axis=1),
            "micro_f1": np.divide(2 * hits.sum(axis=1), every, out=np.zeros_like(every), where=every > 0),
            "subset_accuracy": counts @ (truth == predicted).all(axis=1) / n,
        }
    true, guess = truth[:, 0], predicted[:, 0]
    pearson = _correlation(true, guess, counts)
    ranked = _correlation(_ranks(true, counts), _ranks(guess, counts), counts)
    return {
        "rmse": np.sqrt(counts @ (guess - true) ** 2 / n),
        "mae": counts @ np.abs(guess - true) / n,
        "pearson": pearson,
        "spearman": np.where(np.isnan(pearson), np.nan, ranked),  # values that differ by rounding have no order
        "cosine": _quotient(counts @ (true * guess), np.sqrt(counts @ true**2) * np.sqrt(counts @ guess**2)),
    }


def _correlation(first: FloatArray, second: FloatArray, counts: FloatArray) -> FloatArray:
    """Pearson's correlation of samples of values (n,) or (s, n), (s,)."""
    n = counts.sum(axis=1, keepdims=True)
    centered, spreads = [], []
    for values in (first, second):
        deviation = values - (counts * values).sum(axis=1, keepdims=True) / n
        spread, size = (counts * deviation**2).sum(axis=1), (counts * values**2).sum(axis=1)
        centered.append(deviation)
        spreads.append(np.where(spread > CONSTANT**2 * size, spread, 0))  # below, it is only rounding
    return _quotient((counts * centered[0] * centered[1]).sum(axis=1), np.sqrt(spreads[0]) * np.sqrt(spreads[1]))


def _quotient(above: FloatArray, below: FloatArray) -> FloatArray:
    """A quotient; NaN where the divisor is 0."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _ranks(values: FloatArray, counts: FloatArray) -> FloatArray:
    """Rank of each value in each sample, the mean rank for equal values, (s, n)."""
    order = np.argsort(values, kind="stable")
    ordered, places = values[order], np.argsort(order, kind="stable")
    below = np.pad(np.cumsum(counts[:, order], axis=1), ((0, 0), (1, 0)))
    first, last = np.searchsorted(ordered, ordered, "left"), np.searchsorted(ordered, ordered, "right")
    ranks: FloatArray = ((below[:, first] + below[:, last] + 1) / 2)[:, places]
    return ranks
