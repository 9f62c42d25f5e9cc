"""Which training rows are used, and the weight of each class in the loss."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from finsa.config import Loss, Method
from finsa.data.splits import shuffled_classes
from finsa.errors import ConfigError, Problem


def choose(gold: Sequence[int], method: Method, seed: int) -> list[int]:
    """Choose the training rows that a method uses, by number: limited per class, then balanced.

    Args:
        gold: the class of each training row, (n,).
        method: its ``rows_per_class`` and ``balance``.
        seed: of the sample.
    """
    order = list(range(len(gold))) if method.rows_per_class is None else limit(gold, method.rows_per_class, seed)
    if method.balance == "none":
        return order
    balance = downsample if method.balance == "downsample" else oversample
    return [order[row] for row in balance([gold[row] for row in order], seed)]


def downsample(labels: Sequence[object], seed: int) -> list[int]:
    """Reduce every class to the size of the smallest (AIDF ablation).

    Args:
        labels: the class of each row, (n,).
        seed: of the choice and of the final order.

    Returns:
        Row numbers, shuffled; each class equally often.
    """
    return limit(labels, min(map(len, shuffled_classes(labels, seed).values()), default=0), seed)


def limit(labels: Sequence[object], most: int, seed: int) -> list[int]:
    """Keep at most `most` rows of each class; row numbers, shuffled."""
    return _shuffled([rows[:most] for rows in shuffled_classes(labels, seed).values()], seed)


def oversample(labels: Sequence[object], seed: int) -> list[int]:
    """Repeat rows until every class is as large as the largest; the counts of a class's rows differ by at most one.

    Args:
        labels: the class of each row, (n,).
        seed: of the choice and of the final order.

    Returns:
        Row numbers, shuffled; every row at least once.
    """
    classes = shuffled_classes(labels, seed)
    largest = max(map(len, classes.values()), default=0)
    return _shuffled([(rows * -(-largest // len(rows)))[:largest] for rows in classes.values()], seed)


def _shuffled(classes: list[list[int]], seed: int) -> list[int]:
    kept = [row for rows in classes for row in rows]
    random.Random(seed).shuffle(kept)
    return kept


def class_counts(gold: Sequence[int], order: Sequence[int], names: Sequence[str], loss: Loss) -> list[int]:
    """Number of used training rows per class.

    Args:
        gold: the class of each training row, (n,).
        order: numbers of the rows that are used, with repetitions.
        names: the classes.
        loss: may depend on the counts.

    Raises:
        ConfigError: for a class without rows, if the loss depends on class frequencies.
    """
    found = Counter(gold[row] for row in order)
    empty = [name for number, name in enumerate(names) if not found[number]]
    if empty and (loss.class_weights != "none" or loss.logit_adjustment > 0):
        text = f"weighs classes by their training rows, and {', '.join(empty)} has none; check data.labels"
        raise ConfigError([Problem("method.loss", text)])
    return [found[number] for number in range(len(names))]


def class_weights(counts: Sequence[int], rule: Literal["inverse", "effective"], beta: float = 0.9999) -> list[float]:
    """Weight of each class in the loss; the mean over the classes is 1.

    Args:
        counts: training rows per class, each at least 1.
        rule: ``inverse``: 1 / n; ``effective``: (1 - beta) / (1 - beta^n), the inverse effective number of samples
            (Cui et al. 2019; FinSA-MoE with beta 0.99, which is 1 for every class of more than about 1,000 rows).
        beta: of the effective number, in [0, 1).
    """
    raw = [1 / n if rule == "inverse" else (1 - beta) / (1 - beta**n) for n in counts]
    return [weight * len(raw) / sum(raw) for weight in raw]
