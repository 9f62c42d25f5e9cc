"""Logistic regression on TF-IDF of character n-grams, with scikit-learn. Whole texts are read; nothing is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from finsa import config
from finsa.baselines import NEVER, Classes, Fitted, FloatArray, Judge, Record, Texts
from finsa.errors import DataError

NGRAMS, NUMBERS = "ngrams.json", "weights.npz"
ITERATIONS = 1000


class TfidfLr:
    """TF-IDF and a linear layer.

    Args:
        section: the settings.
        classes: how many there are.
    """

    def __init__(self, section: config.TfidfLr, classes: int) -> None:
        self.section, self.classes = section, classes
        self.vectorizer: Any = self._vectorizer()
        self.weights, self.bias = np.zeros((classes, 0)), np.zeros(classes)

    def _vectorizer(self, ngrams: Sequence[str] | None = None) -> Any:
        return TfidfVectorizer(
            analyzer="char",
            ngram_range=self.section.ngrams,
            min_df=self.section.min_rows,
            sublinear_tf=self.section.sublinear,
            vocabulary=ngrams,
        )

    def start(self, texts: Texts) -> None:
        """Nothing is needed."""

    def fit(self, texts: Texts, labels: Classes, held: Texts, judge: Judge, record: Record) -> Fitted:
        """Learn once per penalty; what is best on the validation rows is kept, of equals the strongest penalty.

        Raises:
            DataError: where the training rows have one class alone, or no n-gram is frequent enough.
        """
        if len(set(labels)) < 2:
            raise DataError(
                "the training rows have one class alone, so there is nothing to tell apart; method=majority does"
            )
        self._count(texts)
        rows, console = self.vectorizer.transform(texts), Console(stderr=True)
        tried: dict[float, float] = {}
        best: tuple[FloatArray, FloatArray] | None = None
        for number, strength in enumerate(sorted(self.section.strengths), start=1):
            self.weights, self.bias = self._linear(rows, labels, strength)
            values = judge(self.score(held))
            record(number, {"strength": strength, **{f"eval_{name}": value for name, value in values.items()}})
            console.print(f"  C {strength:g}  validation: macro_f1 {values['macro_f1']:.4f}", highlight=False)
            if best is None or values["macro_f1"] > max(tried.values()):
                best = (self.weights, self.bias)
            tried[strength] = values["macro_f1"]
        assert best is not None
        self.weights, self.bias = best
        chosen = {"strength": max(tried, key=lambda strength: tried[strength]), "strengths": tried}
        size = self.weights.size + self.bias.size
        return Fitted(size, max(tried.values()), len(texts) * len(tried), chosen=chosen)

    def _count(self, texts: Texts) -> None:
        try:
            self.vectorizer = self._vectorizer().fit(texts)
        except ValueError:
            few = f"no n-gram occurs in {self.section.min_rows} of the {len(texts)} training rows"
            raise DataError(f"{few}; set method.baseline.min_rows=1") from None

    def _linear(self, rows: Any, labels: Sequence[int], strength: float) -> tuple[FloatArray, FloatArray]:
        """Weights (c, f) and bias (c,) of one fit; a class without rows gets the floor."""
        weight = "balanced" if self.section.class_weight == "balanced" else None
        model = LogisticRegression(C=strength, class_weight=weight, max_iter=ITERATIONS).fit(rows, labels)
        weights, bias = np.zeros((self.classes, rows.shape[1])), np.full(self.classes, NEVER)
        if len(model.classes_) == 2:  # one row of weights, that of the second class against the first
            bias[model.classes_] = [0.0, float(model.intercept_[0])]
            weights[model.classes_[1]] = model.coef_[0]
        else:
            bias[model.classes_], weights[model.classes_] = model.intercept_, model.coef_
        return weights, bias

    def score(self, texts: Texts) -> FloatArray:
        """Log-probabilities: (n, c)."""
        scores: FloatArray = log_softmax(self.vectorizer.transform(texts) @ self.weights.T + self.bias, axis=1)
        return scores

    def cut(self, texts: Texts) -> None:
        """Texts are read whole."""

    def plan(self, texts: Texts) -> dict[str, object]:
        """Features are counted; nothing is fitted."""
        self._count(texts)
        features = len(self.vectorizer.vocabulary_)
        strengths = ", ".join(f"{strength:g}" for strength in sorted(self.section.strengths))
        return {
            "features": f"{features:,} n-grams of {self.section.ngrams[0]} to {self.section.ngrams[1]} characters",
            "parameters": f"{self.classes * (features + 1):,}",
            "training": f"{len(texts):,} rows, one fit for each C of {strengths}",
        }

    def save(self, folder: Path) -> None:
        """Write the n-grams in the order of their columns, and all numbers at full precision."""
        (folder / NGRAMS).write_text(json.dumps(self.vectorizer.get_feature_names_out().tolist()), encoding="utf-8")
        np.savez(folder / NUMBERS, idf=self.vectorizer.idf_, weights=self.weights, bias=self.bias)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.vectorizer = self._vectorizer(json.loads((folder / NGRAMS).read_text(encoding="utf-8")))
        with np.load(folder / NUMBERS, allow_pickle=False) as numbers:
            self.vectorizer.idf_ = numbers["idf"]
            self.weights, self.bias = numbers["weights"], numbers["bias"]
