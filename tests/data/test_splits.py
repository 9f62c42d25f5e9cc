"""The published split rule gives the published counts; down-sampling gives equal classes; both are deterministic."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finsa.data.splits import SPLITS, by_class, downsample

# FinNF as published (FinSA-MoE): rows per class in all, and in train, validation and test.
FINNF = {
    "news": (
        0.01,
        {"利好": 791_739, "中性": 648_319, "利空": 219_422},
        {"利好": (775_905, 7_917, 7_917), "中性": (635_353, 6_483, 6_483), "利空": (215_034, 2_194, 2_194)},
    ),
    "forum": (
        0.2,
        {"利好": 5_884, "中性": 1_481, "利空": 6_422},
        {"利好": (3_532, 1_176, 1_176), "中性": (889, 296, 296), "利空": (3_854, 1_284, 1_284)},
    ),
}
CLASSES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1)
SHARES = st.floats(0.001, 0.49)


def _labels(counts: dict[str, int]) -> list[str]:
    return [label for label, count in counts.items() for _ in range(count)]


def _cells(labels: list[str], assigned: list[str]) -> dict[str, tuple[int, ...]]:
    counts = Counter(zip(labels, assigned, strict=True))
    return {label: tuple(counts[label, split] for split in SPLITS) for label in sorted(set(labels))}


@pytest.mark.parametrize("domain", ["forum", "news"])
def test_published_rule_gives_the_published_table(domain: str) -> None:
    share, totals, expected = FINNF[domain]
    assert sum(totals.values()) == {"news": 1_659_480, "forum": 13_787}[domain]
    labels = _labels(totals)
    assert _cells(labels, by_class(labels, share, share, seed=42)) == dict(sorted(expected.items()))


@pytest.mark.parametrize(
    ("n", "share", "held"),
    [
        (3, 0.01, 1),
        (100, 0.01, 1),
        (199, 0.01, 1),
        (200, 0.01, 2),
        (5, 0.2, 1),
        (9, 0.2, 1),
        (10, 0.2, 2),
        (10, 0.3, 3),
    ],
)
def test_share_is_rounded_down_but_never_to_nothing(n: int, share: float, held: int) -> None:
    assert _cells(["a"] * n, by_class(["a"] * n, share, share, 0)) == {"a": (n - 2 * held, held, held)}


def test_share_of_zero_leaves_the_split_out() -> None:
    labels = _labels({"a": 10, "b": 20})
    assert _cells(labels, by_class(labels, 0.1, 0.0, 1)) == {"a": (9, 1, 0), "b": (18, 2, 0)}
    assert _cells(labels, by_class(labels, 0.0, 0.1, 1)) == {"a": (9, 0, 1), "b": (18, 0, 2)}


def test_no_rows() -> None:
    assert by_class([], 0.1, 0.1, 0) == []


def test_class_of_one_or_two_rows_is_not_counted_twice() -> None:
    assert sorted(by_class(["a"], 0.1, 0.1, 0)) == ["validation"]
    assert sorted(by_class(["a", "a"], 0.1, 0.1, 0)) == ["test", "validation"]


@given(CLASSES, SHARES, SHARES, st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_split_properties(counts: dict[str, int], validation: float, test: float, seed: int, random: object) -> None:
    labels = _labels(counts)
    random.shuffle(labels)  # type: ignore[attr-defined]
    assigned = by_class(labels, validation, test, seed)
    assert assigned == by_class(labels, validation, test, seed)
    assert set(assigned) <= set(SPLITS)
    for label, (train, held, tested) in _cells(labels, assigned).items():
        assert train + held + tested == counts[label]
        if counts[label] >= 3:
            assert held == max(1, int(validation * counts[label] + 1e-9))
            assert tested == max(1, int(test * counts[label] + 1e-9))


def test_seed_matters() -> None:
    labels = _labels({"a": 50, "b": 50})
    assert by_class(labels, 0.2, 0.2, 1) != by_class(labels, 0.2, 0.2, 2)


def test_split_of_a_class_does_not_depend_on_the_others() -> None:
    alone = by_class(["a"] * 30, 0.2, 0.2, 5)
    beside = by_class(["a"] * 30 + ["b"] * 7, 0.2, 0.2, 5)
    assert beside[:30] == alone


def test_classes_are_not_shuffled_alike() -> None:
    assigned = by_class(["a"] * 40 + ["b"] * 40, 0.2, 0.2, 5)
    assert assigned[:40] != assigned[40:]


def test_downsample_gives_the_published_count() -> None:
    labels = _labels({"negative": 1_810, "neutral": 1_910, "positive": 3_427})
    kept = downsample(labels, seed=42)
    assert len(kept) == 5_430
    assert Counter(labels[row] for row in kept) == dict.fromkeys(("negative", "neutral", "positive"), 1_810)


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


def test_downsample_does_not_look_at_the_order_of_the_classes() -> None:
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
