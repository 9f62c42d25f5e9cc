"""Calibration: the temperature of a run's probabilities, and how far they are from the truth. No torch here.

A probability in finsa is ``softmax(log_probs / temperature)`` over the labels, where ``log_probs`` are the
log-probabilities of the whole labels and the temperature is fitted on the validation rows of the run (Guo et al. 2017);
it is 1 for a run that fits none. The temperature changes no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.evaluation.metrics import probabilities

FloatArray = NDArray[np.float64]
BINS = 15  # as in Guo et al. 2017
LOWEST, HIGHEST = 0.05, 20.0  # rows that are all right would ask for 0, rows that say nothing for infinity


def temperature(log_probs: FloatArray, gold: Sequence[int]) -> float:
    """The temperature that maximises the likelihood of the true labels, between `LOWEST` and `HIGHEST`.

    Args:
        log_probs: of the labels, (n, c).
        gold: true classes, (n,).

    Returns:
        Exactly a bound where the likelihood still rises there, and 1 where no temperature changes it.
    """
    from scipy.optimize import minimize_scalar  # half a second, which readers of results need not wait for

    bounds = np.log([LOWEST, HIGHEST])
    found = minimize_scalar(lambda power: loss(log_probs / np.exp(power), gold), bounds=bounds, method="bounded")
    candidates = [1.0, LOWEST, HIGHEST, float(np.exp(found.x))]  # the search stops short of its bounds
    return min(candidates, key=lambda candidate: round(loss(log_probs / candidate, gold), 9))


def at_bound(value: float) -> bool:
    """Whether a temperature was limited by the bounds, so that the true optimum lies beyond them."""
    return value in (LOWEST, HIGHEST)


def loss(log_probs: FloatArray, gold: Sequence[int]) -> float:
    """Mean negative log-probability of the true labels among the labels, of log-probabilities (n, c)."""
    largest = log_probs.max(axis=1)
    total = largest + np.log(np.exp(log_probs - largest[:, None]).sum(axis=1))
    return float((total - log_probs[np.arange(len(log_probs)), gold]).mean())


def reliability(confidence: FloatArray, correct: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Bins of equal width over the probability of the predicted label, for a reliability diagram.

    Args:
        confidence: probability of each row's predicted label, (n,).
        correct: whether that label is the true one, (n,).

    Returns:
        Per bin that has rows: ``rows``, ``confidence`` (mean), ``accuracy``.
    """
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "rows": int((place == at).sum()),
            "confidence": float(confidence[place == at].mean()),
            "accuracy": float(correct[place == at].mean()),
        }
        for at in np.unique(place)
    ]


def ece(confidence: FloatArray, correct: NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo et al. 2017): mean gap of confidence and accuracy, bins weighted by rows."""
    bins = reliability(confidence, correct)
    return float(sum(one["rows"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / len(confidence))


def report(log_probs: FloatArray, gold: Sequence[int], degrees: float) -> dict[str, Any]:
    """ECE and log loss of the probabilities at a temperature, and without it (``_uncalibrated``)."""
    found: dict[str, Any] = {"n": len(log_probs)}
    for name, value in (("", degrees), ("_uncalibrated", 1.0)):
        probs = probabilities(log_probs, value)
        found[f"ece{name}"] = ece(probs.max(axis=1), probs.argmax(axis=1) == np.asarray(gold))
        found[f"loss{name}"] = loss(log_probs / value, gold)
    return found
