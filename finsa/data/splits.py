"""Divide rows into splits, and balance classes within one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

SPLITS = ("train", "validation", "test")


def by_class(labels: Sequence[object], validation: float, test: float, seed: int) -> list[str]:
    """Assign a split to every row by the published rule of FinNF (FinSA-MoE).

    Per class: shuffle; validation takes max(1, floor(share * n)), test the same, the rest trains.

    Args:
        labels: the class of each row, (n,).
        validation: share of each class, in (0, 0.5).
        test: share of each class; 0 leaves the test split out.
        seed: of the shuffle.

    Returns:
        ``train``, ``validation`` or ``test`` for each row, (n,).
    """
    assigned = ["train"] * len(labels)
    for rows in _shuffled_classes(labels, seed).values():
        n_validation = _size(validation, len(rows))
        n_test = _size(test, len(rows))
        for row in rows[:n_validation]:
            assigned[row] = "validation"
        for row in rows[n_validation : n_validation + n_test]:
            assigned[row] = "test"
    return assigned


def _size(share: float, n: int) -> int:
    # The tiny addend keeps floor(0.2 * 5) at 1 where binary fractions fall just below the whole number.
    return max(1, int(share * n + 1e-9)) if share > 0 else 0


def downsample(labels: Sequence[object], seed: int) -> list[int]:
    """Cut every class to the size of the smallest (AIDF ablation).

    Args:
        labels: the class of each row, (n,).
        seed: of the choice and of the final order.

    Returns:
        Row numbers, shuffled; each class equally often.
    """
    classes = _shuffled_classes(labels, seed)
    smallest = min(len(rows) for rows in classes.values())
    kept = [row for rows in classes.values() for row in rows[:smallest]]
    random.Random(seed).shuffle(kept)
    return kept


def _shuffled_classes(labels: Sequence[object], seed: int) -> dict[object, list[int]]:
    classes: dict[object, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        classes[label].append(row)
    for label, rows in classes.items():
        random.Random(f"{seed}-{label}").shuffle(rows)
    return dict(sorted(classes.items(), key=lambda item: str(item[0])))
