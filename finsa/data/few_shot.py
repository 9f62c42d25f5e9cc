"""Labeled examples in the prompt (few-shot, Brown et al. 2020): chosen from the training rows, never from others."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finsa.config import Examples
from finsa.data.splits import shuffled_classes
from finsa.errors import RunError
from finsa.runs import files

FILE = "examples.jsonl"  # in a run folder: the rows that examples are chosen from
BREAK = "\n\n"  # between examples


@dataclass(frozen=True)
class ExampleRows:
    """Rows from which the examples of a prompt are chosen.

    Args:
        settings: number and choice of the examples.
        texts: as methods read them, with their targets if the prompt has one, (n,).
        gold: classes, (n,).
        seed: of the choice.
    """

    settings: Examples
    texts: list[str]
    gold: list[int]
    seed: int

    @property
    def fixed(self) -> bool:
        """Whether all prompts have the same examples."""
        return self.settings.choice != "nearest"

    def choose(self, text: str = "") -> list[tuple[str, int]]:
        """The examples for a text, as text and class; the last one is next to the text.

        ``random``: a sample of the rows; ``balanced``: the classes take turns; ``nearest``: the rows with the most
        similar character n-grams (TF-IDF, cosine), the most similar one last.
        """
        count = min(self.settings.count, len(self.texts))
        if self.settings.choice == "nearest":
            similar = (self._features @ self._vectorizer.transform([text]).T).toarray()[:, 0]
            numbers = similar.argsort(kind="stable")[len(similar) - count :].tolist()
        elif self.settings.choice == "random":
            numbers = random.Random(self.seed).sample(range(len(self.texts)), count)
        else:
            turns = list(shuffled_classes(self.gold, self.seed).values())
            numbers = [rows[turn] for turn in range(count) for rows in turns if turn < len(rows)][:count]
            random.Random(self.seed).shuffle(numbers)
        return [(self.texts[number][: self.settings.max_characters], self.gold[number]) for number in numbers]

    @cached_property
    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second to import

        return TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True).fit(self.texts)

    @cached_property
    def _features(self) -> Any:
        return self._vectorizer.transform(self.texts)

    def lines(self) -> list[dict[str, Any]]:
        """The rows that a run folder has to keep: the examples, or all rows if each text has examples of its own."""
        kept = self.choose() if self.fixed else zip(self.texts, self.gold, strict=True)
        return [{"text": text, "label": label} for text, label in kept]


@dataclass(frozen=True)
class KeptExamples(ExampleRows):
    """The examples of a finished run, in the order in which they were chosen."""

    def choose(self, text: str = "") -> list[tuple[str, int]]:
        """The examples for a text."""
        return list(zip(self.texts, self.gold, strict=True)) if self.fixed else super().choose(text)


def read(settings: Examples | None, run: Path, seed: int) -> ExampleRows | None:
    """Read the examples of a finished run; None for a method without examples.

    Raises:
        RunError: if the file is missing or damaged.
    """
    if settings is None:
        return None
    try:
        rows = files.json_lines(run / FILE)
        return KeptExamples(settings, [row["text"] for row in rows], [row["label"] for row in rows], seed)
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"run: {run / FILE} is missing or damaged; repeat the run's command") from None
