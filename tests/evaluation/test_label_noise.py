"""Confident learning: thresholds and joint by hand, planted noise is estimated, the ceiling covers what is observed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from finsa.evaluation import label_noise, metrics


def test_thresholds_and_joint_by_hand() -> None:
    gold = np.array([0, 0, 0, 1, 1, 1])
    first = np.array([0.9, 0.8, 0.1, 0.2, 0.3, 0.7])
    found = label_noise.find(gold, np.stack([first, 1 - first], axis=1))
    # Thresholds: (0.9 + 0.8 + 0.1) / 3 = 0.6 and (0.8 + 0.7 + 0.3) / 3 = 0.6.
    assert found.counts.tolist() == [[2, 1], [1, 2]]
    assert found.suspicious.tolist() == [False, False, True, False, False, True]
    assert found.ranked.tolist() == [2, 5]  # margins -0.8 and -0.4
    assert found.margin[[2, 5]] == pytest.approx([-0.8, -0.4])
    joint = label_noise.joint(found.counts, found.given)
    assert joint == pytest.approx(np.array([[2, 1], [1, 2]]) / 6)


def test_a_row_below_every_threshold_is_not_counted() -> None:
    gold = np.array([0, 0, 1, 1])
    first = np.array([0.9, 0.5, 0.5, 0.1])
    found = label_noise.find(gold, np.stack([first, 1 - first], axis=1))
    assert found.counts.tolist() == [[1, 0], [0, 1]]
    assert label_noise.joint(found.counts, np.array([3, 1])) == pytest.approx(np.diag([0.75, 0.25]))


def test_labels_without_rows_and_without_confident_rows_are_taken_to_be_right() -> None:
    probs = np.array([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [0.2, 0.7, 0.1]])
    found = label_noise.find(np.array([0, 0, 1]), probs)
    assert found.given.tolist() == [2, 1, 0]
    joint = label_noise.joint(np.zeros((3, 3), int), found.given)
    assert joint == pytest.approx(np.diag([2, 1, 0]) / 3)


def _planted(n: int, noise: float, seed: int) -> tuple[Any, Any, Any]:
    """True labels, given labels of which a share is wrong, and probabilities of a model that is often right."""
    rng = np.random.default_rng(seed)
    true = rng.choice(3, n, p=[0.2, 0.3, 0.5])
    given = np.where(rng.random(n) < noise, (true + rng.integers(1, 3, n)) % 3, true)
    logits = 5.0 * np.eye(3)[true] + rng.normal(size=(n, 3))
    probs = np.exp(logits)
    return true, given, probs / probs.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("noise", [0.05, 0.15])
def test_planted_noise_is_found_and_estimated(noise: float) -> None:
    true, given, probs = _planted(6000, noise, 1)
    found = label_noise.find(given, probs)
    wrong = true != given
    assert (found.suspicious & wrong).sum() / found.suspicious.sum() > 0.95
    assert (found.suspicious & wrong).sum() / wrong.sum() > 0.85
    assert (found.likely == true)[found.suspicious & wrong].mean() > 0.99
    ceiling = label_noise.ceiling(found, np.bincount(given[:1000]), 0)
    assert ceiling["noise"] == pytest.approx(wrong.mean(), abs=0.01)
    oracle = metrics.report(given.tolist(), true.tolist(), "abc")
    assert ceiling["accuracy"] == pytest.approx(oracle["accuracy"], abs=0.015)
    assert ceiling["macro_f1"] == pytest.approx(oracle["macro_f1"], abs=0.015)


def test_the_interval_covers_what_a_perfect_predictor_has_on_the_held_out_rows() -> None:
    covered = 0
    for seed in range(60):
        true, given, probs = _planted(1500, 0.1, seed)
        held = slice(0, 300)
        ceiling = label_noise.ceiling(label_noise.find(given, probs), np.bincount(given[held], minlength=3), seed)
        observed = metrics.report(given[held].tolist(), true[held].tolist(), "abc")["macro_f1"]
        low, high = ceiling["intervals"]["macro_f1"]
        covered += low <= observed <= high
    assert covered >= 52  # of 60 draws with 95 %, fewer have a probability below 1 %


def test_half_of_the_suspicious_labels_being_right_halves_the_noise() -> None:
    _, given, probs = _planted(3000, 0.1, 3)
    found = label_noise.find(given, probs)
    whole, half = (label_noise.ceiling(found, found.given, 0, wrong) for wrong in (1.0, 0.5))
    assert half["noise"] == pytest.approx(whole["noise"] / 2)
    assert half["accuracy"] == pytest.approx((1 + whole["accuracy"]) / 2)
