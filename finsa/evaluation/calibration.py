"""How far probabilities can be believed, and the one number that mends them: a temperature. No torch here.

Scores divided by a temperature keep their order, so no answer changes (Guo et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from finsa.evaluation.metrics import probabilities

FloatArray = NDArray[np.float64]
BINS = 15
LOWEST, HIGHEST = 0.05, 20.0  # rows that are all right would ask for 0, rows that say nothing for infinity


def temperature(scores: FloatArray, gold: Sequence[int]) -> float:
    """The temperature under which the right labels are likeliest.

    Args:
        scores: log-probabilities of the labels, (n, c).
        gold: true classes, (n,).
    """
    found = minimize_scalar(
        lambda power: loss(scores / np.exp(power), gold), bounds=np.log([LOWEST, HIGHEST]), method="bounded"
    )
    return float(np.exp(found.x))


def loss(scores: FloatArray, gold: Sequence[int]) -> float:
    """Mean negative log-probability of the right labels among the labels, of scores (n, c)."""
    largest = scores.max(axis=1)
    total = largest + np.log(np.exp(scores - largest[:, None]).sum(axis=1))
    return float((total - scores[np.arange(len(scores)), gold]).mean())


def ece(shares: FloatArray, gold: Sequence[int], bins: int = BINS) -> float:
    """Expected calibration error: mean distance between confidence and accuracy over bins of confidence.

    Args:
        shares: probabilities, (n, c).
        gold: true classes, (n,).
        bins: of equal width.
    """
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == np.asarray(gold)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(shares))


def report(scores: FloatArray, gold: Sequence[int], degrees: float) -> dict[str, Any]:
    """Calibration error and loss of scores (n, c) as they are, and at a temperature."""
    return {
        "n": len(scores),
        "ece": ece(probabilities(scores), gold),
        "ece_calibrated": ece(probabilities(scores / degrees), gold),
        "loss": loss(scores, gold),
        "loss_calibrated": loss(scores / degrees, gold),
    }
