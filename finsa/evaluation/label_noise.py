"""Wrong labels, found by confident learning (Northcutt, Jiang & Chuang 2021), and the best score that they allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.evaluation import metrics

DRAWS = 2000
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Confident:
    """What confident learning finds in n rows of c classes.

    Args:
        counts: the confident joint, (c, c): rows by given label and by the label that they confidently have.
        given: rows by given label, (c,); not all of them are counted in ``counts``.
        likely: the most probable other label of each row, (n,).
        suspicious: whether a row confidently has another label than the given one, (n,).
        margin: probability of the given label minus that of the likely one, (n,); the most suspicious rows have -1.
    """

    counts: NDArray[np.int64]
    given: NDArray[np.int64]
    likely: NDArray[np.int64]
    suspicious: NDArray[np.bool_]
    margin: FloatArray

    @property
    def ranked(self) -> NDArray[np.int64]:
        """Numbers of the suspicious rows, the most suspicious first."""
        rows = np.flatnonzero(self.suspicious)
        return rows[np.argsort(self.margin[rows], kind="stable")]


def find(gold: NDArray[np.int64], probs: FloatArray) -> Confident:
    """Compare given labels with out-of-fold probabilities.

    A row confidently has a label if the label's probability reaches its threshold, the mean probability of the label
    over the rows that are given it; of several such labels, the row has the most probable one.

    Args:
        gold: given labels, (n,).
        probs: probabilities by models that were not trained on the row, (n, c).
    """
    rows, classes = np.arange(len(gold)), probs.shape[1]
    given = np.bincount(gold, minlength=classes)
    own = probs[rows, gold]
    # A class without rows has no threshold to reach.
    thresholds = np.where(given > 0, np.bincount(gold, own, classes) / np.maximum(given, 1), np.inf)
    reached = np.where(probs >= thresholds, probs, -1.0)
    confident, found = reached.max(axis=1) >= 0, reached.argmax(axis=1)
    others = probs.copy()
    others[rows, gold] = -1.0
    counts = np.bincount(gold[confident] * classes + found[confident], minlength=classes**2)
    suspicious = confident & (found != gold)
    likely = np.where(suspicious, found, others.argmax(axis=1))
    return Confident(counts.reshape(classes, classes), given, likely, suspicious, own - probs[rows, likely])


def joint(counts: NDArray[Any], given: NDArray[Any]) -> FloatArray:
    """The estimated joint distribution of given and true labels, (..., c, c), which sums to 1.

    Each row of the confident joint is scaled to the number of rows with that given label; a label without confident
    rows is taken to be right.

    Args:
        counts: confident joints, (..., c, c).
        given: rows by given label, (..., c).
    """
    counts = np.where(counts.sum(axis=-1, keepdims=True) > 0, counts, np.eye(counts.shape[-1]))
    scaled: FloatArray = counts / counts.sum(axis=-1, keepdims=True) * given[..., None]
    return scaled / scaled.sum(axis=(-2, -1), keepdims=True)


def ceiling(found: Confident, held_out: NDArray[np.int64], seed: int, wrong: float = 1.0) -> dict[str, Any]:
    """The scores that a perfect predictor of the true labels is expected to have on rows with the given labels.

    Its confusion matrix is the joint of given and true labels. The intervals contain the uncertainty of the joint
    (bootstrap over the rows behind it) and of the wrong labels that happen to be in the held-out rows.

    Args:
        found: in all rows.
        held_out: number of held-out rows by given label, (c,).
        seed: of the draws.
        wrong: share of the suspicious labels that are really wrong; the others are confident errors of the models.

    Returns:
        ``noise`` (share of wrong labels in all rows), ``accuracy`` and ``macro_f1``, each with its ``intervals``.
    """
    classes, rng = len(found.given), np.random.default_rng(seed)

    def estimate(counts: NDArray[Any], given: NDArray[Any]) -> FloatArray:
        found = joint(counts, given)
        return wrong * found + (1 - wrong) * found.sum(axis=-1, keepdims=True) * np.eye(classes)

    def on_held_out(joints: FloatArray) -> FloatArray:
        by_given = joints.sum(axis=-1, keepdims=True)
        true = np.divide(joints, by_given, out=np.zeros_like(joints), where=by_given > 0)
        return true * (held_out / held_out.sum())[:, None]

    estimated = estimate(found.counts, found.given)
    scores = metrics.averages(on_held_out(estimated))
    # Cells of the bootstrap: the confident joint, and by given label the rows that it does not count.
    uncounted = found.given - found.counts.sum(axis=1)
    cells = np.concatenate([found.counts.ravel(), uncounted])
    drawn = rng.multinomial(cells.sum(), cells / cells.sum(), DRAWS)
    counts = drawn[:, : classes**2].reshape(DRAWS, classes, classes)
    joints = estimate(counts, counts.sum(axis=-1) + drawn[:, classes**2 :])
    expected = on_held_out(joints).reshape(DRAWS, -1)
    confusions = rng.multinomial(held_out.sum(), expected / expected.sum(axis=1, keepdims=True))
    sampled = metrics.averages(confusions.reshape(DRAWS, classes, classes))
    noise = 1 - np.trace(joints, axis1=1, axis2=2)
    return {
        "noise": float(1 - np.trace(estimated)),
        **{name: float(scores[name]) for name in ("accuracy", "macro_f1")},
        "intervals": {
            "noise": metrics.percentiles(noise),
            **{name: metrics.percentiles(sampled[name]) for name in ("accuracy", "macro_f1")},
        },
    }
