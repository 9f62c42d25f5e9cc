"""Down-sampling and over-sampling give equal classes, weights are those of the papers; all of it is deterministic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import RunConfig
from finsa.data.sampling import choose, class_weights, downsample, limit, oversample

Configure = Callable[..., RunConfig]
CLASSES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1)
FORUM = (3_854, 889, 3_532)  # FinNF forum: 利空, 中性, 利好


def _labels(counts: dict[str, int]) -> list[str]:
    return [label for label, count in counts.items() for _ in range(count)]


# ------------------------------------------------------------------------------------------------ down-sampling


def test_downsample_gives_the_published_count() -> None:
    labels = _labels({"negative": 1_810, "neutral": 1_910, "positive": 3_427})
    kept = downsample(labels, seed=42)
    assert len(kept) == 5_430
    assert Counter(labels[row] for row in kept) == dict.fromkeys(("negative", "neutral", "positive"), 1_810)


@settings(deadline=None)
@given(CLASSES, st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_downsample_properties(counts: dict[str, int], seed: int, random: object) -> None:
    labels = _labels(counts)
    random.shuffle(labels)  # type: ignore[attr-defined]
    kept = downsample(labels, seed)
    assert kept == downsample(labels, seed)
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(range(len(labels)))
    assert Counter(labels[row] for row in kept) == dict.fromkeys(counts, min(counts.values()))


def test_downsample_keeps_all_rows_of_equal_classes() -> None:
    assert sorted(downsample(list("abcabc"), 3)) == list(range(6))


def test_downsample_does_not_depend_on_the_order_of_the_classes() -> None:
    """Rows of a class keep their places among themselves: which of them are kept is the same."""
    first = list("a" * 9 + "b" * 4)
    second = list("b" * 4 + "a" * 9)
    kept_first = {row for row in downsample(first, 7) if row < 9}
    kept_second = {row - 4 for row in downsample(second, 7) if row >= 4}
    assert kept_first == kept_second


def test_downsample_mixes_the_classes() -> None:
    labels = _labels({"a": 50, "b": 50})
    order = [labels[row] for row in downsample(labels, 0)]
    assert order not in (sorted(order), sorted(order, reverse=True))
    assert downsample(labels, 0) != downsample(labels, 1)


# ------------------------------------------------------------------------------------------------ caps, over-sampling


@settings(deadline=None)
@given(counts=CLASSES, most=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_cap_limits_the_rows_of_each_class(counts: dict[str, int], most: int, seed: int) -> None:
    labels = _labels(counts)
    kept = limit(labels, most, seed)
    assert Counter(labels[row] for row in kept) == {label: min(most, count) for label, count in counts.items()}
    assert len(set(kept)) == len(kept)
    assert set(limit(labels, max(1, most - 1), seed)) <= set(kept), "a lower limit keeps a part of these rows"


@settings(deadline=None)
@given(counts=CLASSES, seed=st.integers(0, 2**31))
def test_down_sampling_is_a_cap_at_the_smallest_class(counts: dict[str, int], seed: int) -> None:
    labels = _labels(counts)
    assert downsample(labels, seed) == limit(labels, min(counts.values()), seed)


@settings(deadline=None)
@given(counts=CLASSES, seed=st.integers(0, 2**31))
def test_over_sampling_repeats_rows_of_a_class_equally_often(counts: dict[str, int], seed: int) -> None:
    labels = _labels(counts)
    rows = oversample(labels, seed)
    assert rows == oversample(labels, seed)
    assert Counter(labels[row] for row in rows) == dict.fromkeys(counts, max(counts.values()))
    times = Counter(rows)
    assert set(times) == set(range(len(labels)))
    for label in counts:
        own = [count for row, count in times.items() if labels[row] == label]
        assert max(own) - min(own) <= 1


def test_over_sampling_mixes_the_classes() -> None:
    labels = _labels({"a": 50, "b": 5})
    order = [labels[row] for row in oversample(labels, 0)]
    assert order not in (sorted(order), sorted(order, reverse=True))
    assert oversample(labels, 0) != oversample(labels, 1)


def test_no_rows_give_no_rows() -> None:
    assert downsample([], 0) == limit([], 3, 0) == oversample([], 0) == []


# ------------------------------------------------------------------------------------------------ by method


@pytest.mark.parametrize("most", [None, 4])
@pytest.mark.parametrize("balance", ["none", "downsample", "oversample"])
def test_method_caps_first_and_then_balances(config: Configure, balance: str, most: int | None) -> None:
    gold = [0] * 9 + [1] * 3
    method = config().method.model_copy(update={"balance": balance, "rows_per_class": most})
    rows = choose(gold, method, 5)
    capped = [9 if most is None else 4, 3]
    target = {"none": capped, "downsample": [3, 3], "oversample": [max(capped)] * 2}[balance]
    assert Counter(gold[row] for row in rows) == dict(enumerate(target))
    assert rows == choose(gold, method, 5)
    if most is None and balance == "none":
        assert rows == list(range(12))
    if most is not None:
        assert set(rows) <= set(limit(gold, most, 5))


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(("beta", "published"), [(0.99, (0.99996, 1.00009, 0.99996)), (0.9999, (0.514, 1.933, 0.553))])
def test_effective_number_on_the_published_counts(beta: float, published: tuple[float, ...]) -> None:
    digits = 5 if beta == 0.99 else 3
    assert tuple(round(weight, digits) for weight in class_weights(FORUM, "effective", beta)) == published


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=6), beta=st.floats(0, 0.99999))
def test_weights_are_proportional_and_have_mean_one(counts: list[int], beta: float) -> None:
    for rule, raw in (
        ("inverse", [1 / n for n in counts]),
        ("effective", [1 / sum(beta**i for i in range(min(n, 3_000))) for n in counts]),
    ):
        weights = class_weights(counts, rule, beta)  # type: ignore[arg-type]
        assert sum(weights) / len(weights) == pytest.approx(1)
        if rule == "inverse" or max(counts) <= 3_000:
            for one, other in zip(weights, raw, strict=True):
                assert one * raw[0] == pytest.approx(weights[0] * other)


def test_beta_of_zero_weights_all_classes_equally() -> None:
    assert class_weights(FORUM, "effective", 0.0) == pytest.approx([1, 1, 1])


def test_beta_near_one_weights_by_inverse_counts() -> None:
    assert class_weights(FORUM, "effective", 1 - 1e-9) == pytest.approx(class_weights(FORUM, "inverse"), rel=1e-4)
