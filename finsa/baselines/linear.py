"""Logistic regression on features, with scikit-learn: what TF-IDF and the linear probe share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from finsa.baselines import NEVER, Classes, Fitted, FloatArray, Judge, Record
from finsa.errors import DataError

ITERATIONS = 1000
Layer = tuple[FloatArray, FloatArray]  # weights (c, f) and bias (c,)


def fit(
    rows: Any,
    labels: Classes,
    classes: int,
    strengths: Sequence[float],
    class_weight: str,
    held: Any,
    judge: Judge,
    record: Record,
) -> tuple[Layer, Fitted]:
    """Fit once per penalty and keep what is best on the validation rows; of equals the strongest penalty.

    Args:
        rows: features of the training rows, (n, f), dense or sparse.
        labels: their classes, (n,).
        classes: how many there are.
        strengths: inverse strengths of the L2 penalty.
        class_weight: ``none`` or ``balanced``.
        held: features of the validation rows, (m, f).
        judge: computes the metrics of their scores.
        record: takes the metrics of each fit.

    Raises:
        DataError: where all training rows are of one class.
    """
    if len(set(labels)) < 2:
        raise DataError("all training rows are of one class, so there is nothing to learn; method=majority does")
    tried: dict[float, float] = {}
    best: Layer | None = None
    for number, strength in enumerate(sorted(strengths), start=1):
        layer = _fit_one(rows, labels, classes, strength, class_weight)
        values = judge(score(held, layer))
        record(number, {"strength": strength, **{f"eval_{name}": value for name, value in values.items()}})
        line = f"  C {strength:g}  validation: macro_f1 {values['macro_f1']:.4f}"
        Console(stderr=True).print(line, highlight=False)
        if best is None or values["macro_f1"] > max(tried.values()):
            best = layer
        tried[strength] = values["macro_f1"]
    assert best is not None
    chosen = {"strength": max(tried, key=lambda strength: tried[strength]), "strengths": tried}
    size = best[0].size + best[1].size
    return best, Fitted(size, max(tried.values()), len(labels) * len(tried), chosen=chosen)


def score(rows: Any, layer: Layer) -> FloatArray:
    """Log-probabilities (n, c) of features (n, f)."""
    scores: FloatArray = log_softmax(rows @ layer[0].T + layer[1], axis=1)
    return scores


def _fit_one(rows: Any, labels: Classes, classes: int, strength: float, class_weight: str) -> Layer:
    """One fit; a class without training rows gets the floor."""
    balanced = "balanced" if class_weight == "balanced" else None
    model = LogisticRegression(C=strength, class_weight=balanced, max_iter=ITERATIONS).fit(rows, labels)
    weights, bias = np.zeros((classes, rows.shape[1])), np.full(classes, NEVER)
    if len(model.classes_) == 2:  # one row of weights, that of the second class against the first
        bias[model.classes_] = [0.0, float(model.intercept_[0])]
        weights[model.classes_[1]] = model.coef_[0]
    else:
        bias[model.classes_], weights[model.classes_] = model.intercept_, model.coef_
    return weights, bias
