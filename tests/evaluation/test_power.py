"""The claimed power is the share of simulated comparisons in which the test of the reports finds the difference."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from finsa.evaluation import power, statistics

COUNTS = [80, 120, 200]


def _within(hits: int, n: int, share: float) -> bool:
    """Whether a number of hits is within the 99.9 % limits of a binomial distribution."""
    return bool(binom.ppf(0.0005, n, share) <= hits <= binom.ppf(0.9995, n, share))


@pytest.mark.parametrize(("n", "difference", "disagreement"), [(400, 0.05, 0.1), (400, 0.0, 0.1), (60, 0.15, 0.3)])
def test_mcnemar_power_is_the_share_of_rejections(n: int, difference: float, disagreement: float) -> None:
    rng, trials = np.random.default_rng(0), 2000
    shares = [(disagreement + difference) / 2, (disagreement - difference) / 2, 1 - disagreement]
    drawn = rng.multinomial(n, shares, trials)
    rejected = sum(statistics.mcnemar(int(fixed), int(broken)) < 0.05 for fixed, broken, _ in drawn)
    assert _within(rejected, trials, power.mcnemar_power(n, difference, disagreement))


def test_the_exact_test_rejects_at_most_five_percent_without_a_difference() -> None:
    for n in (50, 300, 3000):
        assert 0 < power.mcnemar_power(n, 0.0, 0.2) <= 0.05


def test_macro_f1_power_is_the_share_of_paired_bootstraps_that_find_the_difference() -> None:
    n, difference, trials = sum(COUNTS), 0.05, 300
    claimed = power.macro_f1_power(n, difference, COUNTS, 0.8, 0.1)
    assert 0.6 < claimed < 0.95
    # The shift in accuracy that makes this difference in macro-F1, found by trying.
    shifts = np.linspace(0.03, 0.07, 41)
    found = [
        power.macro_f1_difference(power.assumed_cells(COUNTS, 0.8, 0.1, shift), 10**6, 3, draws=1)[0]
        for shift in shifts
    ]
    shift = float(shifts[np.abs(np.array(found) - difference).argmin()])
    gold, first, second, shares = power.assumed_cells(COUNTS, 0.8, 0.1, shift)
    rng, rejected = np.random.default_rng(1), 0
    for trial in range(trials):
        rows = rng.choice(len(shares), n, p=shares / shares.sum())
        drawn = statistics.paired_draws(gold[rows], second[None, rows], first[None, rows], 3, 1000, trial)
        rejected += statistics.differences([drawn])[0].verdict == "better"
    assert _within(rejected, trials, claimed)


def test_cells_have_the_assumed_accuracy_and_disagreement() -> None:
    gold, first, second, shares = power.assumed_cells(COUNTS, 0.7, 0.2, 0.05)
    assert shares.sum() == pytest.approx(1)
    assert shares[first == gold].sum() == pytest.approx(0.7)
    assert shares[second == gold].sum() == pytest.approx(0.75)
    assert shares[(first == gold) != (second == gold)].sum() == pytest.approx(0.2)
    assert [shares[gold == label].sum() for label in range(3)] == pytest.approx([0.2, 0.3, 0.5])


def test_what_is_detected_and_the_rows_it_needs_agree() -> None:
    n = sum(COUNTS)
    least = power.detectable(lambda wished: power.mcnemar_power(n, wished, 0.1), 0.8, 0.1)
    assert least is not None
    assert power.mcnemar_power(n, least, 0.1) == pytest.approx(0.8, abs=0.005)
    needed = power.rows_needed(lambda rows: power.mcnemar_power(rows, least, 0.1), 0.8)
    assert needed == pytest.approx(n, rel=0.03)
    least = power.detectable(lambda wished: power.macro_f1_power(n, wished, COUNTS, 0.8, 0.1), 0.8, 0.1)
    assert least is not None
    needed = power.rows_needed(lambda rows: power.macro_f1_power(rows, least, COUNTS, 0.8, 0.1), 0.8)
    assert needed == pytest.approx(n, rel=0.03)


def test_few_rows_detect_nothing_and_an_impossible_difference_is_named() -> None:
    lines = power.describe([10, 10], 0.9, 0.02, 0.8, 0.1)
    assert lines["detectable difference"].startswith("accuracy none, macro-F1 none on 20 test rows, with 80 % power")
    assert "impossible, because it is larger than 0.0200" in lines["test rows for a difference of 0.1"]
