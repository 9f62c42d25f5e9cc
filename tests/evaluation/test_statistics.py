from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from sklearn.metrics import f1_score

from finsa.evaluation import metrics, statistics

# Published confusion matrices (AIDF; rows true), of a weak and a good arm, as the truth of the simulations.
TRUTHS = ([[177, 44, 46], [92, 60, 78], [124, 107, 180]], [[136, 104, 27], [24, 105, 101], [6, 48, 357]])


def paired(gold: np.ndarray, first: np.ndarray, second: np.ndarray, samples: int, seed: int) -> statistics.Difference:
    """The difference between two runs, tested alone."""
    return statistics.differences([statistics.paired_draws(gold, first[None], second[None], 3, samples, seed)])[0]


def drawn(n: int, right: float, seed: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, classes, n)
    return gold, np.where(rng.random(n) < right, gold, rng.integers(0, classes, n))


@pytest.mark.parametrize(
    ("model", "base", "tuned", "published", "pairs"),
    [
        ("Qwen2.5-7B-Instruct", 64, 66, 0.774, (7, 5)),
        ("Baichuan2-7B-Chat", 53, 66, 0.0002, (13, 0)),
        ("Llama-3-8B-Instruct", 56, 65, 0.0225, (11, 2)),
    ],
)
def test_mcnemar_of_the_intent_table_from_reconstructed_pairs(
    model: str, base: int, tuned: int, published: float, pairs: tuple[int, int]
) -> None:
    decimals = len(str(published).split(".")[1])
    fitting = [
        (tuned - both, base - both)
        for both in range(max(0, base + tuned - 75), min(base, tuned) + 1)
        if round(statistics.mcnemar(tuned - both, base - both), decimals) == published
    ]
    assert fitting == [pairs], model


@given(st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_the_mcnemar_range_covers_all_possible_pairs(n: int, data: st.DataObject) -> None:
    first, second = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    fitting = [both for both in range(n + 1) if max(0, first + second - n) <= both <= min(first, second)]
    values = [statistics.mcnemar(first - both, second - both) for both in fitting]
    assert statistics.mcnemar_range(first, second, n) == pytest.approx((min(values), max(values)))


def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ() -> None:
    assert statistics.mcnemar(0, 0) == 1
    for fixed, broken in product(range(6), range(6)):
        if fixed + broken:
            assert statistics.mcnemar(fixed, broken) == binomtest(broken, fixed + broken, 0.5).pvalue


def test_holm_multiplies_the_smallest_p_value_most_and_keeps_the_order() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_scores_of_resampled_cells_are_those_of_resampled_rows() -> None:
    """The same means, spreads and, because runs share the rows, correlations."""
    gold, first = drawn(150, 0.7, 1)
    second = np.where(np.arange(150) % 2 == 0, first, drawn(150, 0.5, 2)[1])
    cells = statistics.resampled(gold, np.vstack([first, second]), 3, 4000, seed=3)
    rng = np.random.default_rng(4)
    rows = [rng.integers(0, 150, 150) for _ in range(3000)]
    by_rows = [
        metrics.averages(statistics.confusions(gold[row], np.vstack([first[row], second[row]]), 3)) for row in rows
    ]
    for name in ("accuracy", "macro_f1", "weighted_f1"):
        drawn_rows = np.array([one[name] for one in by_rows]).T
        np.testing.assert_allclose(cells[name].mean(axis=1), drawn_rows.mean(axis=1), atol=0.004)
        np.testing.assert_allclose(cells[name].std(axis=1), drawn_rows.std(axis=1), rtol=0.06)
        np.testing.assert_allclose(np.corrcoef(cells[name]), np.corrcoef(drawn_rows), atol=0.06)


def test_drawing_in_chunks_equals_drawing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gold, first = drawn(200, 0.7, 5)
    whole = statistics.resampled(gold, first[None], 3, 500, seed=6)
    monkeypatch.setattr(statistics, "CHUNK", 70)
    parts = statistics.resampled(gold, first[None], 3, 500, seed=6)
    for name, values in whole.items():
        np.testing.assert_array_equal(values, parts[name])


def test_a_group_does_not_differ_from_itself() -> None:
    gold, first = drawn(300, 0.7, 7)
    same = paired(gold, first, first, 1000, seed=8)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_swapping_the_groups_flips_the_sign_of_the_difference() -> None:
    gold, first = drawn(300, 0.8, 9)
    second = drawn(300, 0.5, 10)[1]
    there = paired(gold, first, second, 4000, seed=11)
    back = paired(gold, second, first, 4000, seed=11)
    expected = f1_score(gold, first, average="macro") - f1_score(gold, second, average="macro")
    assert there.value == pytest.approx(expected)
    assert back.value == pytest.approx(-expected)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=0.01)
    assert there.p == back.p == pytest.approx(2 / 4001)
    assert there.corrected == there.p
    assert (there.verdict, back.verdict) == ("better", "worse")
    assert replace(there, corrected=0.06).verdict == "inconclusive"


@given(st.integers(1, 8), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_an_interval_excludes_0_if_and_only_if_the_corrected_p_is_below_the_level(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [(shift, rng.normal(shift, 1, 1000).round(1)) for shift in rng.uniform(-4, 4, size)]
    found = statistics.differences(pairs)
    assert [one.corrected for one in found] == statistics.holm([one.p for one in found])
    for one in found:
        assert (one.corrected < statistics.LEVEL) == (not one.low <= 0 <= one.high)
        assert (one.verdict == "inconclusive") == (one.low <= 0 <= one.high)
        assert one.verdict == "inconclusive" or (one.verdict == "better") == (one.low > 0)


def test_the_interval_of_a_single_difference_is_the_central_95_percent() -> None:
    drawn = np.random.default_rng(4).normal(0.1, 1, 3999)
    (one,) = statistics.differences([(0.1, drawn)])
    assert [one.low, one.high] == pytest.approx(metrics.percentiles(drawn), abs=0.03)
    assert (one.p, one.corrected) == (one.corrected, one.p)


def test_too_few_samples_for_the_level_are_inconclusive() -> None:
    one, *_ = statistics.differences([(1.0, np.full(20, 1.0))] * 3)
    assert (one.low, one.high, one.verdict) == (-1.0, 1.0, "inconclusive")


def test_seeds_widen_the_interval() -> None:
    """Three runs that disagree have more uncertainty than the same run three times."""
    gold, one = drawn(400, 0.7, 12)
    others = [drawn(400, right, seed)[1] for right, seed in ((0.55, 13), (0.85, 14))]
    alike, apart = np.vstack([one, one, one]), np.vstack([one, *others])
    widths = []
    for arm in (alike, apart):
        scores = statistics.over_seeds(statistics.resampled(gold, arm, 3, 2000, seed=15)["macro_f1"], seed=16)
        low, high = metrics.percentiles(scores)
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def test_the_mean_over_seeds_of_one_run_is_that_run() -> None:
    scores = np.random.default_rng(17).random((1, 50))
    np.testing.assert_array_equal(statistics.over_seeds(scores, seed=18), scores[0])


def test_confusions_are_those_of_sklearn() -> None:
    from sklearn.metrics import confusion_matrix

    gold, first = drawn(200, 0.6, 19, classes=5)
    second = drawn(200, 0.3, 20, classes=5)[1]
    found = statistics.confusions(gold, np.vstack([first, second]), 5)
    for matrix, predicted in zip(found, (first, second), strict=True):
        np.testing.assert_array_equal(matrix, confusion_matrix(gold, predicted, labels=range(5)))


# ------------------------------------------------------------------------------------------------ coverage


@pytest.mark.parametrize("n", [596, 908])
def test_wilson_covers_95_percent(n: int) -> None:
    """Exactly, by the binomial distribution, over shares from 0.3 to 0.95."""
    intervals = np.array([metrics.wilson(hits, n) for hits in range(n + 1)])
    shares = np.linspace(0.3, 0.95, 131)
    inside = (intervals[:, :1] <= shares) & (shares <= intervals[:, 1:])
    coverage = (binom.pmf(np.arange(n + 1)[:, None], n, shares) * inside).sum(axis=0)
    assert 0.94 <= coverage.mean() <= 0.96


@pytest.mark.parametrize("truth", TRUTHS)
def test_bootstrap_covers_95_percent(truth: list[list[int]]) -> None:
    shares = np.array(truth) / np.sum(truth)
    real = metrics.averages(shares)
    rng, trials, hits = np.random.default_rng(22), 3000, dict.fromkeys(("accuracy", "macro_f1", "weighted_f1"), 0)
    for trial, counts in enumerate(rng.multinomial(908, shares.ravel(), size=trials)):
        for name, (low, high) in metrics.intervals(counts.reshape(3, 3), trial, samples=1000).items():
            hits[name] += low <= real[name] <= high
    assert {name: 0.94 <= count / trials <= 0.96 for name, count in hits.items()} == dict.fromkeys(hits, True), hits


def test_the_interval_of_a_difference_covers_95_percent() -> None:
    """Pairs of groups with a known true difference: the second has the first's answer in most rows."""
    rng, trials, n, hits = np.random.default_rng(23), 1000, 600, 0
    shares = np.array(TRUTHS[1]) / 908
    joint = np.zeros((3, 3, 3))  # gold, first, second
    for gold, first in product(range(3), range(3)):
        joint[gold, first] += 0.3 * shares[gold, first] / 3
        joint[gold, first, first] += 0.7 * shares[gold, first]
    scores = [metrics.averages(joint.sum(axis=axis))["macro_f1"] for axis in (2, 1)]
    for trial in range(trials):
        gold, first, second = np.unravel_index(rng.choice(27, n, p=joint.ravel()), (3, 3, 3))
        found = paired(gold, first, second, 500, seed=trial)
        hits += found.low <= scores[0] - scores[1] <= found.high
    assert 0.935 <= hits / trials <= 0.965, hits


def test_hundreds_of_classes_take_little_memory() -> None:
    """150 intents (CLINC150): a matrix of all pairs of classes alone would take 4 GB."""
    gold, first = drawn(4500, 0.8, 1, 150)
    second = drawn(4500, 0.7, 2, 150)[1]
    tracemalloc.start()
    try:
        difference, samples = statistics.paired_draws(gold, first[None], second[None], 150, 200, 0)
        metrics.report(gold.tolist(), first.tolist(), [str(number) for number in range(150)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6
    assert samples.mean() == pytest.approx(difference, abs=0.02)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    """Costs of 0, 1 and 2: the bootstrap has the standard error of a mean, and equal runs the same draws."""
    values = np.random.default_rng(3).choice([0.0, 1.0, 2.0], 400, p=[0.7, 0.2, 0.1])
    means = statistics.resampled_means(np.stack([values, values, 2 * values]), 4000, seed=4)
    np.testing.assert_array_equal(means[0], means[1])
    np.testing.assert_allclose(means[2], 2 * means[0])
    assert means[0].mean() == pytest.approx(values.mean(), abs=0.003)
    assert means[0].std() == pytest.approx(values.std() / 20, rel=0.05)
