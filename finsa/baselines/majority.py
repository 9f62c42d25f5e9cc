"""The floor: the classes' shares, whatever the text says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from finsa.baselines import NEVER, Classes, Fitted, FloatArray, Judge, Record, Texts
from finsa.runs.progress import Moved, ignored

FILE = "shares.json"


class Majority:
    """Gives every text the shares of the classes among the training rows."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = np.zeros(classes, np.int64)

    def start(self, texts: Texts) -> None:
        """Nothing is needed."""

    def fit(self, texts: Texts, labels: Classes, held: Texts, judge: Judge, record: Record) -> Fitted:
        """Count the classes."""
        self.counts = np.bincount(labels, minlength=self.classes)
        return Fitted(self.classes, judge(self.score(held))["macro_f1"], len(texts))

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Logarithms of the shares, for each text: (n, c)."""
        shares = np.where(self.counts > 0, self.counts / self.counts.sum(), np.exp(NEVER))
        return np.tile(np.log(shares), (len(texts), 1))

    def cut(self, texts: Texts) -> None:
        """No text is read."""

    def plan(self, texts: Texts) -> dict[str, object]:
        """It counts the classes."""
        return {"parameters": f"{self.classes} shares of classes", "training": f"{len(texts):,} rows are counted"}

    def save(self, folder: Path) -> None:
        """Write the counts."""
        (folder / FILE).write_text(json.dumps(self.counts.tolist()) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Read the counts."""
        self.counts = np.array(json.loads((folder / FILE).read_text(encoding="utf-8")))
