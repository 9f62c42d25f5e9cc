"""The temperature and the calibration error, on scores with a known truth."""

from __future__ import annotations

import numpy as np
import pytest

from finsa.evaluation import calibration
from finsa.evaluation.metrics import probabilities


def overconfident(rows: int, times: float) -> tuple[np.ndarray, list[int]]:
    """Log-probabilities from which the labels were drawn, sharpened."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(rows, 3))
    shares = probabilities(true)
    gold = [int(rng.choice(3, p=row)) for row in shares]
    return times * true, gold


@pytest.mark.parametrize("times", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_recovers_the_applied_one(times: float) -> None:
    scores, gold = overconfident(20_000, times)
    assert calibration.fit_temperature(scores, gold) == pytest.approx(times, rel=0.05)


def test_calibration_lowers_the_error_and_keeps_predictions() -> None:
    scores, gold = overconfident(5_000, 3.0)
    degrees = calibration.fit_temperature(scores, gold)
    told = calibration.report(scores, gold, degrees)
    assert told["ece"] < 0.03 < 0.15 < told["ece_uncalibrated"]
    assert told["loss"] < told["loss_uncalibrated"]
    assert (probabilities(scores).argmax(1) == probabilities(scores, degrees).argmax(1)).all()


def test_the_error_of_two_bins_by_hand() -> None:
    confidence, correct = np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, False, True, True])
    assert calibration.ece(confidence, correct) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert calibration.reliability(confidence, correct) == [
        {"rows": 2, "confidence": 0.6, "accuracy": 1.0},
        {"rows": 2, "confidence": 0.9, "accuracy": 0.5},
    ]


def test_calibration_of_a_calibrated_and_of_an_overconfident_model() -> None:
    rng = np.random.default_rng(21)
    confidence = rng.uniform(0.3, 1, 20_000)
    assert calibration.ece(confidence, rng.random(20_000) < confidence) < 0.015
    certain = (np.ones(100), np.arange(100) < 60)
    assert calibration.reliability(*certain) == [{"rows": 100, "confidence": 1.0, "accuracy": 0.6}]
    assert calibration.ece(*certain) == pytest.approx(0.4)


def test_all_correct_scores_keep_a_usable_temperature() -> None:
    scores = np.array([[0.0, -9.0], [-9.0, 0.0]])
    degrees = calibration.fit_temperature(scores, [0, 1])
    assert degrees == calibration.LOWEST
    assert calibration.at_bound(degrees)
    assert np.isfinite(calibration.report(scores, [0, 1], degrees)["loss"])


def test_uninformative_scores_keep_temperature_1_and_wrong_ones_reach_the_upper_bound() -> None:
    assert calibration.fit_temperature(np.zeros((4, 2)), [0, 1, 0, 1]) == 1
    wrong = calibration.fit_temperature(np.array([[0.0, -9.0], [-9.0, 0.0]]), [1, 0])
    assert (wrong, calibration.at_bound(wrong)) == (calibration.HIGHEST, True)
    scores, gold = overconfident(2_000, 3.0)
    assert not calibration.at_bound(calibration.fit_temperature(scores, gold))
