"""Measures of numbers and of sets of labels equal those of scipy and scikit-learn, also on resampled rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from finsa.data.labels import LabelSpace
from finsa.evaluation import value_metrics

SCALE = LabelSpace(("-1", "0", "1"), ("bad", "so", "good"), "regression")
TOPICS = LabelSpace(("a", "b", "c"), ("a", "b", "c"), "multi_label", ("{label}: yes", "{label}: no"))


def _numbers(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.choice(np.linspace(-1, 1, 9), n)  # with ties
    return true[:, None], np.round(true / 2 + rng.normal(0, 0.3, n), 1)[:, None]


def _sets(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.random((n, 3)) < [0.6, 0.3, 0.05]).astype(float), (rng.random((n, 3)) < 0.4).astype(float)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_equal_scipy_and_scikit_learn(seed: int) -> None:
    true, guess = (values[:, 0] for values in _numbers(seed))
    found = value_metrics.values("regression", true[:, None], guess[:, None])
    assert found["rmse"] == pytest.approx(reference.root_mean_squared_error(true, guess))
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(true, guess))
    assert found["pearson"] == pytest.approx(stats.pearsonr(true, guess).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(true, guess).statistic)
    assert found["cosine"] == pytest.approx(reference.pairwise.cosine_similarity([true], [guess])[0, 0])


@pytest.mark.parametrize("seed", range(4))
def test_sets_equal_scikit_learn(seed: int) -> None:
    true, guess = _sets(seed)
    found = value_metrics.report(TOPICS, true, guess)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(true, guess, average="macro", zero_division=0))
    assert found["micro_f1"] == pytest.approx(reference.f1_score(true, guess, average="micro"))
    assert found["subset_accuracy"] == pytest.approx(reference.accuracy_score(true, guess))
    rows = zip(*reference.precision_recall_fscore_support(true, guess, zero_division=0), strict=True)
    for (name, of), row in zip(found["per_class"].items(), rows, strict=True):
        assert tuple(of.values()) == pytest.approx(tuple(row)), name


@pytest.mark.parametrize("task", ["regression", "multi_label"])
def test_counts_are_repeated_rows(task: str) -> None:
    true, guess = (_numbers if task == "regression" else _sets)(7)
    counts = np.random.default_rng(1).multinomial(len(true), np.full(len(true), 1 / len(true)), size=5).astype(float)
    found = value_metrics.on_samples(task, true, guess, counts)
    for sample, drawn in enumerate(counts):
        rows = np.repeat(np.arange(len(true)), drawn.astype(int))
        repeated = value_metrics.values(task, true[rows], guess[rows])
        for name, value in repeated.items():
            if name != "macro_f1":  # a label that a sample lacks is excluded, and counts 0 in a set of its own
                assert found[name][sample] == pytest.approx(value), name


def test_a_label_that_a_sample_lacks_is_excluded() -> None:
    true, guess = np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([[1.0, 0, 0], [0, 1, 0]])
    found = value_metrics.on_samples("multi_label", true, guess, np.array([[1.0, 1.0], [2.0, 0.0]]))
    assert found["macro_f1"].tolist() == [
        2 / 3,
        1 / 2,
    ]  # c never occurs and counts 0; b is missing in the second sample


def test_intervals_contain_the_value_and_shrink_with_rows() -> None:
    few, many = (value_metrics.report(SCALE, *_numbers(3, n)) for n in (40, 1000))
    for name in ("rmse", "mae", "pearson", "spearman", "cosine"):
        low, high = few["intervals"][name]
        assert low < few[name] < high
        assert many["intervals"][name][1] - many["intervals"][name][0] < (high - low) / 2


def test_a_correlation_with_constant_predictions_is_undefined() -> None:
    found = value_metrics.report(SCALE, _numbers(0)[0], np.full((40, 1), 0.1))
    assert found["pearson"] is None
    assert found["spearman"] is None
    assert "pearson" not in found["intervals"]
    assert found["rmse"] > 0


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e6])
def test_correlations_do_not_depend_on_the_scale(scale: float) -> None:
    true, guess = _numbers(0)
    plain, scaled = (value_metrics.values("regression", true * factor, guess * factor) for factor in (1.0, scale))
    for name in ("pearson", "spearman", "cosine"):
        assert scaled[name] == pytest.approx(plain[name])
    constant = np.full_like(true, 0.1 * scale)
    for same in (constant, constant * (1 + 1e-15 * np.sign(guess))):  # also up to rounding
        report = value_metrics.report(SCALE, true * scale, same)
        assert (report["pearson"], report["spearman"]) == (None, None)
        assert not {"pearson", "spearman"} & set(report["intervals"])


def test_the_number_is_the_expectation_over_the_anchors_or_the_limited_output() -> None:
    log_probs = np.log([[0.2, 0.3, 0.5], [1e-9, 1e-9, 1 - 2e-9]])
    assert value_metrics.decide(SCALE, log_probs)[:, 0] == pytest.approx([0.3, 1.0])
    assert value_metrics.decide(SCALE, np.array([[0.25], [1.7], [-3.0]]))[:, 0].tolist() == [0.25, 1.0, -1.0]
    assert value_metrics.probabilities(SCALE, np.zeros((3, 1))).shape == (3, 0)


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_have_the_highest_f1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = (rng.random((30, 3)) < 0.4).astype(float)
    probs = np.round(np.clip(0.3 * truth + 0.7 * rng.random((30, 3)), 0, 1), 1)  # with ties
    thresholds = value_metrics.fit_thresholds(probs, truth)
    for at, threshold in enumerate(thresholds):
        best = max(reference.f1_score(truth[:, at], probs[:, at] > cut - 1e-9) for cut in np.unique(probs[:, at]))
        assert reference.f1_score(truth[:, at], probs[:, at] > threshold) == pytest.approx(best)


def test_a_label_without_rows_keeps_one_half() -> None:
    assert value_metrics.fit_thresholds(np.array([[0.9], [0.2]]), np.zeros((2, 1))) == [0.5]


def test_calibration_recovers_the_temperature_of_log_odds() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, (4000, 3))
    truth = (rng.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(float)
    found = value_metrics.calibrate(TOPICS, {"validation": 3 * odds}, {"validation": truth}, fitted=True)
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert found["validation"]["ece"] < found["validation"]["ece_uncalibrated"]
    assert list(found["thresholds"]) == ["a", "b", "c"]
    assert value_metrics.calibrate(SCALE, {}, {}, fitted=True) == {"temperature": 1.0}


def test_the_loss_is_squared_error_or_cross_entropy() -> None:
    assert value_metrics.loss(SCALE, np.array([[0.5], [-1.0]]), np.array([[0.0], [1.0]])) == pytest.approx(2.125)
    odds, truth = np.array([[0.7, -2.0, 40.0]]), np.array([[1.0, 1.0, 1.0]])
    expected = -np.log(1 / (1 + np.exp(-odds))).mean()
    assert value_metrics.loss(TOPICS, odds, truth) == pytest.approx(expected, rel=1e-9)
