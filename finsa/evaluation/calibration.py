"""Calibration: the temperature of a run's probabilities, calibration error and log loss.

A probability in finsa is ``softmax(log_probs / temperature)`` over the labels, where ``log_probs`` are the
log-probabilities of the whole labels and the temperature is fitted on the validation rows (Guo et al. 2017); it is 1 if
none was fitted. The temperature does not change the predicted label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.evaluation.metrics import probabilities

FloatArray = NDArray[np.float64]
BINS = 15  # as in Guo et al. 2017
# The optimum is 0 if all rows are correct, and infinite if the log-probabilities are uninformative.
LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(log_probs: FloatArray, gold: Sequence[int]) -> float:
    """Fit the temperature of log-probabilities (n, c) to the true classes (n,); see `minimize`."""
    return minimize(log_probs, lambda scores: loss(scores, gold))


def minimize(scores: FloatArray, loss_of: Callable[[FloatArray], float]) -> float:
    """Fit the temperature that maximizes the likelihood of the true labels, between `LOWEST` and `HIGHEST`.

    Args:
        scores: log-probabilities or log-odds of the labels, (n, c).
        loss_of: mean negative log-likelihood of the true labels, given the scores divided by a temperature.

    Returns:
        Exactly a bound if the likelihood still increases there, and 1 if it does not depend on the temperature.
    """
    from scipy.optimize import minimize_scalar  # imported here because it takes half a second

    bounds = np.log([LOWEST, HIGHEST])
    optimum = minimize_scalar(lambda power: loss_of(scores / np.exp(power)), bounds=bounds, method="bounded")
    candidates = [1.0, LOWEST, HIGHEST, float(np.exp(optimum.x))]  # the search never reaches its bounds exactly
    return min(candidates, key=lambda candidate: round(loss_of(scores / candidate), 9))


def at_bound(value: float) -> bool:
    """Whether a temperature is at a bound, so that the optimum lies beyond it."""
    return value in (LOWEST, HIGHEST)


def loss(log_probs: FloatArray, gold: Sequence[int]) -> float:
    """Mean negative log-probability of the true labels after normalizing log-probabilities (n, c) over the labels."""
    largest = log_probs.max(axis=1)
    total = largest + np.log(np.exp(log_probs - largest[:, None]).sum(axis=1))
    return float((total - log_probs[np.arange(len(log_probs)), gold]).mean())


def reliability(confidence: FloatArray, correct: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Bins of equal width over the probability of the predicted label, for a reliability diagram.

    Args:
        confidence: probability of each row's predicted label, (n,).
        correct: whether it is the true label, (n,).

    Returns:
        Per non-empty bin: ``rows``, ``confidence`` (mean), ``accuracy``.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "rows": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(correct[bins == number].mean()),
        }
        for number in np.unique(bins)
    ]


def ece(confidence: FloatArray, correct: NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo et al. 2017): mean gap between confidence and accuracy, weighted by rows."""
    bins = reliability(confidence, correct)
    return float(sum(one["rows"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / len(confidence))


def report(log_probs: FloatArray, gold: Sequence[int], temperature: float) -> dict[str, Any]:
    """ECE and log loss of the probabilities at a temperature, and without it (``_uncalibrated``)."""
    metrics: dict[str, Any] = {"n": len(log_probs)}
    for name, value in (("", temperature), ("_uncalibrated", 1.0)):
        probs = probabilities(log_probs, value)
        metrics[f"ece{name}"] = ece(probs.max(axis=1), probs.argmax(axis=1) == np.asarray(gold))
        metrics[f"loss{name}"] = loss(log_probs / value, gold)
    return metrics
