"""Guarantees of thresholds and label sets, by simulation, and the area under the risk-coverage curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from finsa.config import RunConfig
from finsa.evaluation import selective

SPLITS = 200
CLASSES, PRIOR = 3, np.array([0.2, 0.3, 0.5])


def drawn(n: int, seed: int) -> tuple[Any, Any]:
    """Rows of a model whose probabilities are those of the labels: (n, c) and (n,)."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(2 * PRIOR, n)
    probs = (probs**2 / (probs**2).sum(axis=1, keepdims=True)).round(6)
    gold = (rng.random((n, 1)) > probs.cumsum(axis=1)).sum(axis=1).clip(max=CLASSES - 1)
    return probs, gold


POPULATION = drawn(400_000, 0)  # stands for the distribution: risks and coverages on it are the true ones


def overconfident(n: int, seed: int) -> tuple[Any, Any]:
    """Rows of a model that is more certain than it should be, with equal probabilities in many rows."""
    probs, gold = drawn(n, seed)
    sharp = probs**2 / (probs**2).sum(axis=1, keepdims=True)
    return sharp.round(2), gold


@pytest.mark.parametrize("limit", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("model", [drawn, overconfident])
def test_the_risk_is_above_its_limit_in_at_most_a_share_delta_of_the_resplits(
    model: Callable[[int, int], tuple[Any, Any]], limit: float
) -> None:
    level, violated, answering = 0.1, 0, 0
    whole, truth = model(200_000, 1)
    surest, wrong = whole.max(axis=1), whole.argmax(axis=1) != truth
    for split in range(SPLITS):
        probs, gold = model(400, 100 + split)
        bar = selective.threshold(probs.max(axis=1), probs.argmax(axis=1) != gold, limit, level)
        if not math.isinf(bar):
            answering += 1
            violated += bool(wrong[surest > bar].mean() > limit)
    assert answering > 0.3 * SPLITS  # it is of use
    assert violated <= binom.ppf(0.999, SPLITS, level), violated


@pytest.mark.parametrize("by_class", [False, True])
def test_label_sets_have_their_coverage_in_the_mean_over_the_resplits(by_class: bool) -> None:
    coverage, hits, by_label, rows = 0.9, 0, np.zeros(CLASSES), np.zeros(CLASSES)
    sizes = []
    for split in range(SPLITS):
        probs, gold = overconfident(150, 500 + split)
        low = selective.floors(probs, gold, coverage, by_class)
        test, truth = overconfident(20, 5_000 + split)
        true = test[np.arange(len(truth)), truth] >= low[truth]
        hits += int(true.sum())
        by_label += np.bincount(truth, true, CLASSES)
        rows += np.bincount(truth, minlength=CLASSES)
        sizes.append((test >= low).sum(axis=1).mean())
    # The rows of one resplit share a threshold; the widths of these limits count that.
    spread = 3 * math.sqrt(coverage * (1 - coverage) * (1 / (20 * SPLITS) + 1 / (150 * SPLITS)))
    assert hits / (20 * SPLITS) >= coverage - spread
    assert np.mean(sizes) < 2.5
    shares, fewest = by_label / rows, 150 * PRIOR
    limits = 3 * np.sqrt(coverage * (1 - coverage) * (1 / rows + 1 / (fewest * SPLITS)))
    if by_class:
        assert (shares >= coverage - limits).all(), shares
    else:
        assert (shares < coverage - limits).any(), shares  # what the marginal sets do not promise


def test_the_threshold_of_known_rows() -> None:
    confidence = np.linspace(0.99, 0.01, 200)
    nothing_wrong = np.zeros(200, dtype=bool)
    assert selective.threshold(confidence, nothing_wrong, 0.1, 0.05) == 0.0  # all rows are answered
    assert math.isinf(selective.threshold(confidence[:20], nothing_wrong[:20], 0.1, 0.05))  # 0.9^20 > 0.05
    assert math.isinf(selective.threshold(confidence, ~nothing_wrong, 0.1, 0.05))
    late = np.arange(200) >= 120  # the 120 surest rows are right, the others wrong
    bar = selective.threshold(confidence, late, 0.1, 0.05)
    answered, level = confidence > bar, 0.05 / 3
    bound = binom.cdf(late[answered].sum(), answered.sum(), 0.1)
    assert answered.sum() > 120
    assert bound <= level < binom.cdf(late[: answered.sum() + 1].sum(), answered.sum() + 1, 0.1)
    confidence, between = np.linspace(0.99, 0.01, 400), (np.arange(400) >= 100) & (np.arange(400) < 120)
    bar = selective.threshold(confidence, between, 0.1, 0.05)
    assert 100 < (confidence > bar).sum() < 120  # of all rows few are wrong, but the sequence has ended before
    confidence = np.linspace(0.99, 0.01, 200)
    first = np.arange(200) == 0  # one mistake among the surest rows does not end every sequence
    assert selective.threshold(confidence, first, 0.1, 0.05) == 0.0


def test_the_fewest_rows_that_show_a_limit() -> None:
    for n, met in ((79, False), (80, True)):  # as the documentation says
        bar = selective.threshold(np.linspace(0.99, 0.01, n), np.zeros(n, dtype=bool), 0.05, 0.05)
        assert math.isfinite(bar) == met


def test_floors_are_order_statistics_and_too_few_rows_give_all_labels() -> None:
    probs = np.array([[0.1 * k, 1 - 0.1 * k] for k in range(1, 10)])
    zeros = np.zeros(9, dtype=np.int64)
    np.testing.assert_allclose(selective.floors(probs, zeros, 0.8, False), [0.2, 0.2])  # ceil(10 * 0.8) = 8th largest
    np.testing.assert_allclose(selective.floors(probs, zeros, 0.95, False), [0.0, 0.0])
    np.testing.assert_allclose(selective.floors(probs, zeros, 0.8, True), [0.2, 0.0])


def test_a_label_set_is_never_empty_and_decisions_do_not_depend_on_the_seventh_decimal(
    config: Callable[..., RunConfig],
) -> None:
    options = config("stage=report", "runs=x", "stage.risk=0.1", "stage.coverage=0.9").stage
    assert isinstance(options, selective.Selection)
    rule = selective.Rule(("a", "b"), options, 10, 0.6, np.array([0.7, 0.7]))
    cells = rule.cells(np.array([[0.6, 0.4], [0.6 + 4e-7, 0.4 - 4e-7], [0.75, 0.25]]))
    assert cells == {"abstain": [True, True, False], "label_set": [["a"], ["a"], ["a"]]}
    assert tuple(cells) == rule.columns
    none = rule.cells(np.zeros((0, 2)))
    assert none == {"abstain": [], "label_set": []}


def test_the_area_under_the_risk_coverage_curve() -> None:
    confidence, correct = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    np.testing.assert_allclose(selective.risks(confidence, correct), [0, 1 / 2, 1 / 3, 1 / 2])
    value, low, high = selective.aurc(confidence, correct)
    assert value == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert low <= value <= high
    # Without an order, every share of the rows has the same error rate.
    np.testing.assert_allclose(selective.risks(np.full(4, 0.5), correct), [0.5] * 4)


def test_the_interval_of_the_area_contains_the_true_one() -> None:
    probs, gold = POPULATION
    true = selective.risks(probs.max(axis=1), probs.argmax(axis=1) == gold).mean()
    inside = 0
    for split in range(30):
        probs, gold = drawn(300, 900 + split)
        _, low, high = selective.aurc(probs.max(axis=1), probs.argmax(axis=1) == gold, split)
        inside += bool(low <= true <= high)
    assert inside >= binom.ppf(0.001, 30, 0.95) - 1
