"""Power of the tests between two methods on the same rows: what a test split detects, and how many rows it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, norm

from finsa.evaluation import metrics
from finsa.evaluation.statistics import LEVEL

DRAWS = 4000
FEWEST, MOST = 20, 10_000_000  # rows between which the number that a difference needs is searched
PRECISE = 1_000_000
STEPS = 25  # of a bisection
Cells = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


def mcnemar_power(n: int, difference: float, disagreement: float) -> float:
    """Probability that the exact McNemar test finds a difference in accuracy (p < 0.05).

    The number of rows that exactly one method classifies correctly is binomial, and given it, so is the number of those
    that the better method does; both are summed over exactly.

    Args:
        n: number of test rows.
        difference: of the accuracies, at most `disagreement`.
        disagreement: share of the rows that exactly one method classifies correctly.
    """
    center, spread = n * disagreement, math.sqrt(n * disagreement * (1 - disagreement))
    discordant = np.arange(max(0, int(center - 6 * spread)), min(n, math.ceil(center + 6 * spread)) + 1)
    critical = binom.ppf(LEVEL / 2, discordant, 0.5) - 1  # the largest x with 2 P(X <= x) < LEVEL; -1 if there is none
    better = (1 + difference / disagreement) / 2
    rejected = binom.cdf(critical, discordant, better) + binom.cdf(critical, discordant, 1 - better)
    return float((binom.pmf(discordant, n, disagreement) * rejected).sum())


def assumed_cells(counts: Sequence[int], accuracy: float, disagreement: float, difference: float) -> Cells:
    """Two methods with equally accurate classes, whose errors are spread evenly over the other classes.

    Args:
        counts: test rows by class, (c,).
        accuracy: of the first method.
        disagreement: share of the rows that exactly one of them classifies correctly.
        difference: accuracy of the second minus that of the first.

    Returns:
        True class, predictions of both, and probability of each cell of their joint distribution, each (k,).
    """
    classes, only_second = len(counts), (disagreement + difference) / 2
    only_first = disagreement - only_second
    both, neither = accuracy - only_first, 1 - accuracy - only_second
    cells = []
    for gold, count in enumerate(counts):
        share, others = count / sum(counts), [other for other in range(classes) if other != gold]
        cells.append((gold, gold, gold, share * both))
        for other in others:  # where both are wrong, they predict the same class
            cells.append((gold, gold, other, share * only_first / len(others)))
            cells.append((gold, other, gold, share * only_second / len(others)))
            cells.append((gold, other, other, share * neither / len(others)))
    numbers = np.array(cells)
    truth, first, second = (numbers[:, place].astype(np.int64) for place in range(3))
    return truth, first, second, np.clip(numbers[:, 3], 0, None)


def macro_f1_difference(cells: Cells, n: int, classes: int, draws: int = DRAWS) -> tuple[float, float]:
    """Mean and standard deviation of the difference in macro-F1, second minus first, on n rows drawn from the cells.

    With one draw, which is that of the exact shares, the mean is the difference of infinitely many rows.
    """
    gold, first, second, shares = cells
    drawn = (shares * n / shares.sum())[None]
    if draws > 1:  # the same draws for every difference, so that a bisection is not misled by chance
        drawn = np.random.default_rng(0).multinomial(n, shares / shares.sum(), draws).astype(np.float64)
    scores = []
    for predicted in (first, second):
        by_class = metrics.counts_by_class(drawn, gold, predicted, classes)
        scores.append(metrics.resampled_averages(*by_class, np.ones(classes, bool))["macro_f1"])
    differences = scores[1] - scores[0]
    return float(differences.mean()), float(differences.std())


def macro_f1_power(n: int, difference: float, counts: Sequence[int], accuracy: float, disagreement: float) -> float:
    """Probability that a test of the difference in macro-F1 finds it at a level of 5 %, by simulation of its spread.

    Args:
        difference: in macro-F1; 0 if methods with this accuracy and disagreement cannot differ that much.
    """

    def missing(shift: float) -> float:
        cells = assumed_cells(counts, accuracy, disagreement, shift)
        return macro_f1_difference(cells, PRECISE, len(counts), draws=1)[0] - difference

    largest = largest_difference(accuracy, disagreement)
    if difference <= 0 or missing(largest) < 0:
        return 0.0
    cells = assumed_cells(counts, accuracy, disagreement, brentq(missing, 0, largest, xtol=1e-7))
    mean, spread = macro_f1_difference(cells, n, len(counts))
    return float(norm.cdf(mean / spread - norm.isf(LEVEL / 2)))


def largest_difference(accuracy: float, disagreement: float) -> float:
    """The largest possible difference in accuracy: on all rows of disagreement, or all errors of the first method."""
    return min(disagreement, 2 * (1 - accuracy) - disagreement) * (1 - 1e-6)


def detectable(power_of: Callable[[float], float], power: float, largest: float) -> float | None:
    """The smallest difference that is detected with a power, by bisection; None if the largest possible one is not."""
    low, high = 0.0, largest
    if max(power_of(largest * part) for part in (1.0, 0.9, 0.8)) < power:  # macro-F1 may not reach the largest accuracy
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high


def rows_needed(power_of: Callable[[int], float], power: float) -> int | None:
    """The number of rows from which a difference is detected with a power, by bisection; None beyond ``MOST``."""
    if power_of(MOST) < power:
        return None
    low, high = FEWEST, MOST
    while high - low > max(1, low // 500):
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high


def describe(
    counts: Sequence[int], accuracy: float, disagreement: float, power: float, difference: float | None
) -> dict[str, str]:
    """Lines of the plan: what the test split detects, and how many rows a wished difference needs."""
    n, counts = sum(counts), [count for count in counts if count]
    largest = largest_difference(accuracy, disagreement)
    tests: dict[str, Callable[[int, float], float]] = {
        "accuracy": lambda rows, wished: mcnemar_power(rows, wished, disagreement),
        "macro-F1": lambda rows, wished: macro_f1_power(rows, wished, counts, accuracy, disagreement),
    }
    found, needed = [], []
    for name, power_of in tests.items():
        least = detectable(lambda wished, power_of=power_of: power_of(n, wished), power, largest)  # type: ignore[misc]
        found.append(f"{name} {'none' if least is None else f'{least:.4f}'}")
        if difference is not None and difference <= largest:
            rows = rows_needed(lambda rows, power_of=power_of: power_of(rows, difference), power)  # type: ignore[misc]
            needed.append(f"{name} {f'more than {MOST:,}' if rows is None else f'{rows:,}'}")
    assumed = f"accuracy {accuracy:.3f}, methods disagree on {100 * disagreement:.1f} % of the rows"
    lines = {
        "detectable difference": f"{', '.join(found)} on {n:,} test rows, with {100 * power:.4g} % power ({assumed})"
    }
    if difference is not None:
        text = f"impossible, because it is larger than {largest:.4f}, what methods can differ that disagree this rarely"
        lines[f"test rows for a difference of {difference:g}"] = ", ".join(needed) or text
    return lines
