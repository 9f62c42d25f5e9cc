"""Logistic regression with scikit-learn, of numbers ridge regression: on any features, and on TF-IDF of n-grams."""

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
from sklearn.linear_model import LogisticRegression, Ridge

from finsa import config
from finsa.baselines import NEVER, Evaluate, Fitted, FloatArray, Learner, Record, Targets, Texts, rank
from finsa.config.base import headline
from finsa.data.values import TASKS
from finsa.errors import DataError
from finsa.runs.progress import Moved, ignored

NGRAMS, NUMBERS = "ngrams.json", "weights.npz"
ITERATIONS = 1000


class LinearLearner(Learner):
    """Logistic regression on the features of a subclass, one for each of several labels; of numbers ridge regression.

    Args:
        section: the settings, with the inverse strengths of the L2 penalty.
        classes: number of classes; 1 for numbers.
        task: of the data.
    """

    def __init__(
        self, section: config.TfidfLr | config.LinearProbe, classes: int, task: str = "classification"
    ) -> None:
        self.strengths, self.class_weight, self.classes = sorted(section.strengths), section.class_weight, classes
        self.task = task
        self.weights, self.bias = np.zeros((classes, 0)), np.zeros(classes)

    @abstractmethod
    def features(self, texts: Texts, moved: Moved = ignored) -> Any:
        """Features of texts, (n, f), dense or sparse."""

    def fit(self, texts: Texts, labels: Targets, held: Texts, evaluate: Evaluate, record: Record) -> Fitted:
        """Fit once per penalty and keep the best on the validation rows; ties go to the strongest penalty.

        Raises:
            DataError: if all training rows have the same class, or no features.
        """
        self.start(texts)
        rows, held_rows = self.features(texts), self.features(held)
        if len(np.unique(labels, axis=0)) < 2:
            raise DataError("all training rows have the same class, so there is nothing to learn; use method=majority")
        tried: dict[float, float] = {}
        best, chosen, highest, measure = (self.weights, self.bias), self.strengths[0], -np.inf, headline(self.task)
        for number, strength in enumerate(self.strengths, start=1):
            self.weights, self.bias = self._fit(rows, np.asarray(labels), strength)
            metrics = evaluate(self._log_probs(held_rows))
            record(number, {"strength": strength, **{f"eval_{name}": value for name, value in metrics.items()}})
            line = f"  C {strength:g}  validation: {measure} {metrics[measure]:.4f}"
            Console(stderr=True).print(line, highlight=False)
            if rank(metrics, self.task) > highest:
                best, chosen, highest = (self.weights, self.bias), strength, rank(metrics, self.task)
            tried[strength] = metrics[measure]
        self.weights, self.bias = best
        size = self.weights.size + self.bias.size
        facts = {"strength": chosen, "strengths": tried}
        return Fitted(size, tried[chosen], len(labels) * len(tried), chosen=facts)

    def _fit(self, rows: Any, labels: Any, strength: float) -> tuple[FloatArray, FloatArray]:
        """Fit one penalty, (c, f) and (c,); a class without training rows gets the lowest log-probability."""
        if self.task == "regression":
            ridge = Ridge(alpha=1 / strength).fit(rows, labels[:, 0])
            return ridge.coef_[None], np.array([ridge.intercept_])
        if self.task == "multi_label":
            single = [self._fit_label(rows, label, strength) for label in labels.T]
            return np.stack([weights for weights, _ in single]), np.array([bias for _, bias in single])
        balanced = "balanced" if self.class_weight == "balanced" else None
        model = LogisticRegression(C=strength, class_weight=balanced, max_iter=ITERATIONS).fit(rows, labels)
        weights, bias = np.zeros((self.classes, rows.shape[1])), np.full(self.classes, NEVER)
        if len(model.classes_) == 2:  # binary: one row of weights, for the second class against the first
            bias[model.classes_] = [0.0, float(model.intercept_[0])]
            weights[model.classes_[1]] = model.coef_[0]
        else:
            bias[model.classes_], weights[model.classes_] = model.intercept_, model.coef_
        return weights, bias

    def _fit_label(self, rows: Any, label: Any, strength: float) -> tuple[FloatArray, float]:
        """Weights (f,) and bias of the log-odds of one label; constant if all rows have it, or none."""
        if len(set(label.tolist())) < 2:
            return np.zeros(rows.shape[1]), -NEVER if label.any() else NEVER
        balanced = "balanced" if self.class_weight == "balanced" else None
        model = LogisticRegression(C=strength, class_weight=balanced, max_iter=ITERATIONS).fit(rows, label)
        return model.coef_[0], float(model.intercept_[0])

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities: (n, c)."""
        return self._log_probs(self.features(texts, moved))

    def _log_probs(self, rows: Any) -> FloatArray:
        scores: FloatArray = rows @ self.weights.T + self.bias
        return scores if self.task in TASKS else np.asarray(log_softmax(scores, axis=1))


class TfidfLr(LinearLearner):
    """Logistic regression on TF-IDF of character n-grams of whole texts.

    Args:
        section: the settings.
        classes, task: as for `LinearLearner`.
    """

    def __init__(self, section: config.TfidfLr, classes: int, task: str = "classification") -> None:
        super().__init__(section, classes, task)
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
