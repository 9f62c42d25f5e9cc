"""Planted power laws: the parameters are recovered, and intervals cover what more rows bring."""

from __future__ import annotations

import numpy as np
import pytest

from finsa.evaluation import power_law

SIZES = np.repeat([250.0, 500, 1000, 2000, 4000], 3)


@pytest.mark.parametrize(("a", "b", "c"), [(0.1, 5.0, 0.5), (0.0, 2.0, 0.25), (0.05, 40.0, 0.9)])
def test_exact_errors_give_back_the_parameters(a: float, b: float, c: float) -> None:
    found = power_law.fit(SIZES, a + b * SIZES**-c)
    assert found[0] == pytest.approx(a, abs=0.003)
    assert found[1] == pytest.approx(b, rel=0.05)
    assert found[2] == pytest.approx(c, abs=0.011)
    assert power_law.predict(found, [8000.0])[0] == pytest.approx(a + b * 8000**-c, abs=1e-4)


def test_errors_that_grow_or_do_not_change_give_a_flat_curve() -> None:
    for errors in (0.2 + SIZES * 1e-6, np.full(len(SIZES), 0.3)):
        found = power_law.fit(SIZES, errors)
        assert power_law.predict(found, [1000, 8000]) == pytest.approx([errors.mean()] * 2, abs=1e-6)


def test_several_fits_at_once_are_the_same() -> None:
    errors = 0.2 + 3 * SIZES**-0.5 + np.random.default_rng(0).normal(0, 0.01, (450, len(SIZES)))
    found = power_law.fit(SIZES, errors)
    assert found.shape == (450, 3)
    assert found[[0, 449]] == pytest.approx(np.array([power_law.fit(SIZES, errors[row]) for row in (0, 449)]))


def test_intervals_cover_the_planted_error_and_gain() -> None:
    """Runs vary more at small sizes, and all of them share the chance of their 800 test rows."""
    true, rng, covered = 0.1 + 3.0 * np.unique(SIZES) ** -0.4, np.random.default_rng(5), np.zeros(2)
    doubled, trials = 0.1 + 3.0 * 8000.0**-0.4, 60
    for trial in range(trials):
        # Each row has a difficulty; a run is wrong where it exceeds 1 minus its error.
        hard, runs = rng.random(800), np.repeat(true, 3) + rng.normal(0, 0.3 / np.sqrt(SIZES))
        wrong = hard[None] < runs[:, None]
        errors = wrong.mean(axis=1)
        weights = rng.multinomial(800, np.full(800, 1 / 800), 400)
        draws = power_law.bootstrap(SIZES, errors, weights @ wrong.T / 800, trial)
        found = power_law.summarize(power_law.fit(SIZES, errors), draws, 4000)["8000"]
        covered[0] += found["interval"][0] <= doubled <= found["interval"][1]
        covered[1] += found["gain_interval"][0] <= true[-1] - doubled <= found["gain_interval"][1]
    assert covered.min() >= 52, covered


def test_intervals_cover_the_planted_error_if_only_the_runs_vary() -> None:
    rng, covered, expected = np.random.default_rng(6), 0, 0.1 + 3.0 * 8000.0**-0.4
    for trial in range(60):
        errors = 0.1 + 3.0 * SIZES**-0.4 + rng.normal(0, 0.3 / np.sqrt(SIZES))
        draws = power_law.bootstrap(SIZES, errors, np.tile(errors, (300, 1)), trial)
        low, high = power_law.summarize(power_law.fit(SIZES, errors), draws, 4000)["8000"]["interval"]
        covered += low <= expected <= high
    assert covered >= 50, covered
