"""Logistic regression on TF-IDF of character n-grams, with scikit-learn. Whole texts are read; nothing is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from finsa import config
from finsa.baselines import Classes, Fitted, FloatArray, Judge, Record, Texts, linear
from finsa.errors import DataError
from finsa.runs.progress import Moved, ignored

NGRAMS, NUMBERS = "ngrams.json", "weights.npz"


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
        """Count n-grams, then fit once per penalty; the validation rows choose.

        Raises:
            DataError: where the training rows have one class alone, or no n-gram is frequent enough.
        """
        self._count(texts)
        (self.weights, self.bias), fitted = linear.fit(
            self.vectorizer.transform(texts),
            labels,
            self.classes,
            self.section.strengths,
            self.section.class_weight,
            self.vectorizer.transform(held),
            judge,
            record,
        )
        return fitted

    def _count(self, texts: Texts) -> None:
        try:
            self.vectorizer = self._vectorizer().fit(texts)
        except ValueError:
            few = f"no n-gram occurs in {self.section.min_rows} of the {len(texts)} training rows"
            raise DataError(f"{few}; set method.baseline.min_rows=1") from None

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities: (n, c)."""
        return linear.score(self.vectorizer.transform(texts), (self.weights, self.bias))

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
