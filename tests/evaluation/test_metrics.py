from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from finsa.evaluation import metrics

NAMES = ("negative", "neutral", "positive")
# A published confusion matrix (AIDF, response-only LoRA; rows true) and the figures printed beside it.
AIDF_RESPONSE = [[136, 104, 27], [24, 105, 101], [6, 48, 357]]


def rows_of(confusion: list[list[int]]) -> tuple[list[int], list[int]]:
    cells = [(g, p) for g, line in enumerate(confusion) for p, count in enumerate(line) for _ in range(count)]
    return [g for g, _ in cells], [p for _, p in cells]


def test_published_figures_from_their_confusion_matrix() -> None:
    report = metrics.report(*rows_of(AIDF_RESPONSE), NAMES)
    assert report["confusion"] == AIDF_RESPONSE
    printed = [report["accuracy"], report["macro_f1"], report["weighted_f1"]]
    printed += [report["per_class"][name]["f1"] for name in NAMES]
    assert [round(value, 2) for value in printed] == [0.66, 0.62, 0.65, 0.63, 0.43, 0.80]
    assert report["n"] == 908
    assert [report["per_class"][name]["support"] for name in NAMES] == [267, 230, 411]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
@settings(deadline=None, max_examples=50)
def test_f1_from_the_matrix_equals_sklearn_from_the_rows(pairs: list[tuple[int, int]]) -> None:
    gold, predicted = [g for g, _ in pairs], [p for _, p in pairs]
    report = metrics.report(gold, predicted, NAMES)
    per_class = metrics.f1_scores(np.array(report["confusion"]))
    expected = f1_score(gold, predicted, labels=[0, 1, 2], average=None, zero_division=0)
    np.testing.assert_allclose(per_class, expected)
    assert report["macro_f1"] == pytest.approx(expected.mean())
    assert report["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    for name in ("accuracy", "macro_f1", "weighted_f1"):
        low, high = report["intervals"][name]
        assert 0 <= low <= high <= 1


def test_wilson_interval_of_the_75_questions() -> None:
    low, high = metrics.intervals(np.array([[66, 9], [0, 0]]), seed=0)["accuracy"]
    assert (round(100 * low, 1), round(100 * high, 1)) == (78.7, 93.6)


def test_drawing_cells_equals_drawing_rows() -> None:
    gold, predicted = map(np.array, rows_of(AIDF_RESPONSE))
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(2000):
        rows = rng.integers(0, len(gold), len(gold))
        matrix = np.bincount(3 * gold[rows] + predicted[rows], minlength=9).reshape(3, 3)
        drawn.append(metrics.f1_scores(matrix).mean())
    by_rows = np.percentile(drawn, [2.5, 97.5])
    by_cells = metrics.intervals(np.array(AIDF_RESPONSE), seed=2)["macro_f1"]
    np.testing.assert_allclose(by_cells, by_rows, atol=0.004)


def test_bootstrap_intervals_have_about_the_nominal_coverage() -> None:
    rng, n = np.random.default_rng(3), 400
    cells = np.array(AIDF_RESPONSE) / 908
    truth = metrics.f1_scores(1000 * cells).mean()
    hits = 0
    for trial in range(300):
        low, high = metrics.intervals(rng.multinomial(n, cells.ravel()).reshape(3, 3), seed=trial)["macro_f1"]
        hits += low <= truth <= high
    assert 0.91 <= hits / 300 <= 0.985


def test_probabilities_sum_to_one_and_keep_the_order() -> None:
    scores = np.array([[-1000.0, -1001.0, -1002.0], [0.0, -50.0, -1.0]])
    shares = metrics.probabilities(scores)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert (shares.argmax(axis=1) == scores.argmax(axis=1)).all()
    np.testing.assert_allclose(shares[0, 0] / shares[0, 1], np.e)


def test_a_class_without_predictions_counts_in_the_macro_mean() -> None:
    report = metrics.report([0, 1, 2], [0, 0, 0], NAMES)
    assert report["macro_f1"] == pytest.approx(0.5 / 3)
    assert report["per_class"]["neutral"]["precision"] == 0


@pytest.mark.parametrize("each", [1, 3])
def test_the_interval_of_many_small_classes_contains_the_score(each: int) -> None:
    """A class without rows in a sample is excluded there; counted as 0, the interval would lie far below the score."""
    gold = [number for number in range(77) for _ in range(each)]
    names = [str(number) for number in range(77)]
    perfect = metrics.report(gold, gold, names)
    assert perfect["intervals"]["macro_f1"] == [1.0, 1.0]
    mostly = metrics.report(gold, [0 if number == 76 else number for number in gold], names)
    low, high = mostly["intervals"]["macro_f1"]
    assert low <= mostly["macro_f1"] <= high


def test_class_that_never_occurs_still_counts_as_0_in_every_sample() -> None:
    report = metrics.report([0, 1] * 50, [0, 1] * 50, NAMES)
    assert report["macro_f1"] == pytest.approx(2 / 3)
    assert report["intervals"]["macro_f1"] == pytest.approx([2 / 3, 2 / 3])
