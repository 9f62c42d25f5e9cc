"""The temperature and the calibration error, on scores whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from finsa.evaluation import calibration
from finsa.evaluation.metrics import probabilities


def overconfident(rows: int, times: float) -> tuple[np.ndarray, list[int]]:
    """Log-probabilities of which the labels were drawn, made sharper than they are."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(rows, 3))
    shares = probabilities(true)
    gold = [int(rng.choice(3, p=row)) for row in shares]
    return times * true, gold


@pytest.mark.parametrize("times", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_was_done_to_the_scores(times: float) -> None:
    scores, gold = overconfident(20_000, times)
    assert calibration.temperature(scores, gold) == pytest.approx(times, rel=0.05)


def test_the_error_falls_and_no_answer_changes() -> None:
    scores, gold = overconfident(5_000, 3.0)
    degrees = calibration.temperature(scores, gold)
    told = calibration.report(scores, gold, degrees)
    assert told["ece_calibrated"] < 0.03 < 0.15 < told["ece"]
    assert told["loss_calibrated"] < told["loss"]
    assert (probabilities(scores).argmax(1) == probabilities(scores / degrees).argmax(1)).all()


def test_the_error_of_two_bins_by_hand() -> None:
    shares = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration.ece(shares, [0, 1, 0, 0]) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)


def test_scores_that_are_all_right_keep_a_temperature_that_can_be_used() -> None:
    scores = np.array([[0.0, -9.0], [-9.0, 0.0]])
    degrees = calibration.temperature(scores, [0, 1])
    assert np.isfinite(calibration.report(scores, [0, 1], degrees)["loss_calibrated"])
