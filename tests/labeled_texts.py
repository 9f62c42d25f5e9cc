"""A tiny data set of texts that differ by words, and the metrics that select a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finsa.baselines import Evaluate, FloatArray

WORDS = ("大跌 亏损 跌停", "公告 会议 持平", "大涨 盈利 涨停")


def texts(rows: int, classes: int = 3, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts and their classes; every text has one word of its class and some uninformative ones."""
    draw = np.random.default_rng(seed)
    labels = [row % classes for row in range(rows)]
    noise = list("今天公司股票市场关于以及表示其中 ABc 12")
    made = []
    for label in labels:
        before, after = ("".join(draw.choice(noise, draw.integers(0, 9))) for _ in range(2))
        made.append(before + str(draw.choice(WORDS[label].split())) + after)
    return made, labels


def evaluate(labels: Sequence[int]) -> Evaluate:
    """The share of correct predictions, under the name of the selection metric."""

    def numbers(scores: FloatArray) -> dict[str, float]:
        right = float((scores.argmax(axis=1) == np.array(labels)).mean())
        return {"loss": -float(scores[np.arange(len(labels)), labels].mean()), "macro_f1": right}

    return numbers


def ignore(step: int, values: dict[str, float]) -> None:
    """Ignore a record."""
