"""Logistic regression with scikit-learn: on any features, and on TF-IDF of character n-grams."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from finsa import config
from finsa.baselines import NEVER, Classes, Evaluate, Fitted, FloatArray, Learner, Record, Texts
from finsa.errors import DataError
from finsa.runs.progress import Moved, ignored

NGRAMS, NUMBERS = "ngrams.json", "weights.npz"
ITERATIONS = 1000


class LinearLearner(Learner):
    """Logistic regression on the features of a subclass.

    Args:
        section: the settings, with the inverse strengths of the L2 penalty.
        classes: number of classes.
    """

    def __init__(self, section: config.TfidfLr | config.LinearProbe, classes: int) -> None:
        self.strengths, self.class_weight, self.classes = sorted(section.strengths), section.class_weight, classes
        self.weights, self.bias = np.zeros((classes, 0)), np.zeros(classes)

    @abstractmethod
    def features(self, texts: Texts, moved: Moved = ignored) -> Any:
        """Features of texts, (n, f), dense or sparse."""

    def fit(self, texts: Texts, labels: Classes, held: Texts, evaluate: Evaluate, record: Record) -> Fitted:
        """Fit once per penalty and keep the best on the validation rows; ties go to the strongest penalty.

        Raises:
            DataError: if all training rows have the same class, or no features.
        """
        self.start(texts)
        rows, held_rows = self.features(texts), self.features(held)
        if len(set(labels)) < 2:
            raise DataError("all training rows have the same class, so there is nothing to learn; use method=majority")
        tried: dict[float, float] = {}
        best = self.weights, self.bias
        for number, strength in enumerate(self.strengths, start=1):
            self._fit(rows, labels, strength)
            metrics = evaluate(self._log_probs(held_rows))
            record(number, {"strength": strength, **{f"eval_{name}": value for name, value in metrics.items()}})
            line = f"  C {strength:g}  validation: macro_f1 {metrics['macro_f1']:.4f}"
            Console(stderr=True).print(line, highlight=False)
            if not tried or metrics["macro_f1"] > max(tried.values()):
                best = self.weights, self.bias
            tried[strength] = metrics["macro_f1"]
        self.weights, self.bias = best
        chosen = {"strength": max(tried, key=lambda strength: tried[strength]), "strengths": tried}
        size = self.weights.size + self.bias.size
        return Fitted(size, max(tried.values()), len(labels) * len(tried), chosen=chosen)

    def _fit(self, rows: Any, labels: Classes, strength: float) -> None:
        """Fit one penalty; a class without training rows gets the lowest log-probability."""
        balanced = "balanced" if self.class_weight == "balanced" else None
        model = LogisticRegression(C=strength, class_weight=balanced, max_iter=ITERATIONS).fit(rows, labels)
        weights, bias = np.zeros((self.classes, rows.shape[1])), np.full(self.classes, NEVER)
        if len(model.classes_) == 2:  # binary: one row of weights, for the second class against the first
            bias[model.classes_] = [0.0, float(model.intercept_[0])]
            weights[model.classes_[1]] = model.coef_[0]
        else:
            bias[model.classes_], weights[model.classes_] = model.intercept_, model.coef_
        self.weights, self.bias = weights, bias

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities: (n, c)."""
        return self._log_probs(self.features(texts, moved))

    def _log_probs(self, rows: Any) -> FloatArray:
        log_probs: FloatArray = log_softmax(rows @ self.weights.T + self.bias, axis=1)
        return log_probs


class TfidfLr(LinearLearner):
    """Logistic regression on TF-IDF of character n-grams of whole texts.

    Args:
        section: the settings.
        classes: number of classes.
    """

    def __init__(self, section: config.TfidfLr, classes: int) -> None:
        super().__init__(section, classes)
        self.section = section
        self.vectorizer: Any = None

    def _vectorizer(self, ngrams: Sequence[str] | None = None) -> Any:
        return TfidfVectorizer(
            analyzer="char",
            ngram_range=self.section.ngrams,
            min_df=self.section.min_rows,
            sublinear_tf=self.section.sublinear,
            vocabulary=ngrams,
        )

    def start(self, texts: Texts) -> None:
        """Count the n-grams of the training rows.

        Raises:
            DataError: if no n-gram is frequent enough.
        """
        if self.vectorizer is not None:
            return
        try:
            self.vectorizer = self._vectorizer().fit(texts)
        except ValueError:
            few = f"no n-gram occurs in {self.section.min_rows} of the {len(texts)} training rows"
            raise DataError(f"{few}; set method.baseline.min_rows=1") from None

    def features(self, texts: Texts, moved: Moved = ignored) -> Any:
        """TF-IDF of texts, (n, f), sparse."""
        return self.vectorizer.transform(texts)

    def plan(self, texts: Texts) -> dict[str, object]:
        """Count the features without fitting."""
        self.start(texts)
        features = len(self.vectorizer.vocabulary_)
        strengths = ", ".join(f"{strength:g}" for strength in self.strengths)
        return {
            "features": f"{features:,} n-grams of {self.section.ngrams[0]} to {self.section.ngrams[1]} characters",
            "parameters": f"{self.classes * (features + 1):,}",
            "training": f"{len(texts):,} rows, one fit for each C of {strengths}",
        }

    def save(self, folder: Path) -> None:
        """Write the n-grams in column order, and all numbers at full precision."""
        (folder / NGRAMS).write_text(json.dumps(self.vectorizer.get_feature_names_out().tolist()), encoding="utf-8")
        np.savez(folder / NUMBERS, idf=self.vectorizer.idf_, weights=self.weights, bias=self.bias)

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote."""
        self.vectorizer = self._vectorizer(json.loads((folder / NGRAMS).read_text(encoding="utf-8")))
        with np.load(folder / NUMBERS, allow_pickle=False) as numbers:
            self.vectorizer.idf_ = numbers["idf"]
            self.weights, self.bias = numbers["weights"], numbers["bias"]
