"""The published split rules give the published counts, row for row; families and groups stay together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import RunConfig, Split
from finsa.data.splits import SPLITS, at_random, by_class, divide, families, stratified
from finsa.errors import DataError

Configure = Callable[..., RunConfig]

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
def test_a_share_is_rounded_down_but_not_to_zero(n: int, share: float, held: int) -> None:
    assert _cells(["a"] * n, by_class(["a"] * n, share, share, 0)) == {"a": (n - 2 * held, held, held)}


def test_a_share_of_zero_omits_the_split() -> None:
    labels = _labels({"a": 10, "b": 20})
    assert _cells(labels, by_class(labels, 0.1, 0.0, 1)) == {"a": (9, 1, 0), "b": (18, 2, 0)}
    assert _cells(labels, by_class(labels, 0.0, 0.1, 1)) == {"a": (9, 0, 1), "b": (18, 0, 2)}


def test_no_rows() -> None:
    assert by_class([], 0.1, 0.1, 0) == []


def test_class_of_one_or_two_rows_is_not_counted_twice() -> None:
    assert sorted(by_class(["a"], 0.1, 0.1, 0)) == ["validation"]
    assert sorted(by_class(["a", "a"], 0.1, 0.1, 0)) == ["test", "validation"]


@settings(deadline=None)
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


def test_classes_are_shuffled_independently() -> None:
    assigned = by_class(["a"] * 40 + ["b"] * 40, 0.2, 0.2, 5)
    assert assigned[:40] != assigned[40:]


# ------------------------------------------------------------------------------------------------ the rule of AIDF


def _published(n: int, test: float, validation_of_rest: float, seed: int) -> list[str]:
    """Two calls of the datasets library, as AIDF made them."""
    import datasets

    first = datasets.Dataset.from_dict({"row": list(range(n))}).train_test_split(test, seed=seed)
    second = first["train"].train_test_split(validation_of_rest, seed=seed)
    split_of = dict.fromkeys(first["test"]["row"], "test")
    split_of |= dict.fromkeys(second["test"]["row"], "validation") | dict.fromkeys(second["train"]["row"], "train")
    return [split_of[row] for row in range(n)]


def test_random_rule_is_the_published_one_row_for_row(config: Configure) -> None:
    split = config("data=aidf_news").data.split
    assert (split.rule, split.validation, split.test, split.seed) == ("random", 0.1125, 0.1, 42)
    assigned = at_random(9_076, split.validation, split.test, split.seed)
    assert Counter(assigned) == {"train": 7_147, "validation": 1_021, "test": 908}
    assert assigned == _published(9_076, 0.1, 0.125, 42)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(8, 300),
    test=st.sampled_from([0.1, 0.2, 0.3]),
    rest=st.sampled_from([0.125, 0.25]),
    seed=st.integers(0, 99),
)
def test_random_rule_is_that_of_the_datasets_library(n: int, test: float, rest: float, seed: int) -> None:
    assert at_random(n, rest * (1 - test), test, seed) == _published(n, test, rest, seed)


@settings(deadline=None)
@given(n=st.integers(0, 200), validation=SHARES, test=SHARES, seed=st.integers(0, 9))
def test_random_rule_gives_every_row_one_split(n: int, validation: float, test: float, seed: int) -> None:
    counts = Counter(at_random(n, validation, test, seed))
    assert counts.total() == n
    assert abs(counts["test"] - test * n) < 1
    assert abs(counts["validation"] - validation * n) < 2


def test_random_rule_omits_a_split() -> None:
    assert Counter(at_random(100, 0.1, 0.0, 1)) == {"train": 90, "validation": 10}
    assert Counter(at_random(100, 0.0, 0.2, 1)) == {"train": 80, "test": 20}


# ------------------------------------------------------------------------------------------------ in proportion


@settings(deadline=None)
@given(counts=st.dictionaries(st.sampled_from("abcd"), st.integers(20, 90), min_size=2), seed=st.integers(0, 99))
def test_stratified_keeps_the_proportions(counts: dict[str, int], seed: int) -> None:
    labels = _labels(counts)
    cells = _cells(labels, stratified(labels, 0.1, 0.2, seed))
    assert {label: sum(row) for label, row in cells.items()} == dict(sorted(counts.items()))
    for label, (_, held, tested) in cells.items():
        assert abs(tested - 0.2 * counts[label]) < 2
        assert abs(held - 0.1 * counts[label]) < 2
    assert stratified(labels, 0.1, 0.2, seed) == stratified(labels, 0.1, 0.2, seed)


def test_class_too_small_to_be_stratified_is_reported() -> None:
    with pytest.raises(DataError, match=r"data\.split: .*Use data\.split\.rule=by_class, or more rows"):
        stratified([*"aaaaaaaaaa", "b"], 0.1, 0.1, 0)


# ------------------------------------------------------------------------------------------------ families and groups


def _rows(*rows: tuple[str | None, ...]) -> pl.DataFrame:
    """Rows with id, label, parent, group, part and a text with several targets."""
    schema = dict.fromkeys(("id", "label", "parent", "group", "part", "_text"), pl.String)
    return pl.DataFrame([row + (None,) * (6 - len(row)) for row in rows], schema=schema, orient="row")


def _together(numbers: pl.Series) -> list[set[int]]:
    found: dict[int, set[int]] = {}
    for row, number in enumerate(numbers):
        found.setdefault(number, set()).add(row)
    return sorted(found.values(), key=min)


def test_variants_of_variants_are_one_family_and_groups_join_families() -> None:
    rows = _rows(
        ("1", "a"),
        ("2", "a", "1"),
        ("3", "a", "2"),
        ("4", "a", "gone"),
        ("5", "a", "gone", "firm"),
        ("6", "a", None, "firm"),
        ("1", "a"),  # the other row of that id may be the original as well
        ("7", "a"),
        ("7", "a"),  # nobody's original: two rows that happen to have one id
    )
    assert _together(families(rows, "parent")) == [{0, 1, 2, 6}, {3, 4}, {5}, {7}, {8}]
    assert _together(families(rows, "parent", "group")) == [{0, 1, 2, 6}, {3, 4, 5}, {7}, {8}]


def test_ids_of_different_parts_are_different() -> None:
    rows = _rows(("1", "a", None, None, "x"), ("2", "a", "1", None, "x"), ("3", "a", "1", None, "y"))
    assert _together(families(rows, "parent")) == [{0, 1}, {2}]


def test_without_links_every_row_is_a_family() -> None:
    assert _together(families(_rows(("1", "a"), ("1", "a")), "parent", "group")) == [{0}, {1}]
    assert families(_rows(), "parent").to_list() == []


LINKS = st.lists(
    st.tuples(st.integers(0, 9), st.none() | st.integers(0, 12), st.none() | st.integers(0, 3)), min_size=1, max_size=25
)


@settings(deadline=None)
@given(links=LINKS, seed=st.integers(0, 99), rule=st.sampled_from(["by_class", "random"]))
def test_no_family_is_split(
    config: Configure, links: list[tuple[int, int | None, int | None]], seed: int, rule: str
) -> None:
    """Checked link by link: a row is in the split of its originals and of its group."""
    text = [tuple(None if value is None else str(value) for value in link) for link in links]
    rows = _rows(*((name, "ab"[int(name or 0) % 2], parent, group) for name, parent, group in text))
    split = config().data.split.model_copy(update={"rule": rule, "seed": seed})
    assigned = divide(rows, split, 0.2, 0.2)
    assert assigned == divide(rows, split, 0.2, 0.2)
    assert len(assigned) == rows.height
    for (_, parent, group), own in zip(text, assigned, strict=True):
        for (other, other_parent, other_group), theirs in zip(text, assigned, strict=True):
            if (parent is not None and parent in (other, other_parent)) or (group is not None and group == other_group):
                assert own == theirs


def test_splitting_families_splits_their_first_rows(config: Configure) -> None:
    """With two variants per row, originals are in the same splits as without variants."""
    split, names = config().data.split, [f"r{n}" for n in range(60)]
    alone = _rows(*((name, "abc"[n % 3]) for n, name in enumerate(names)))
    variants = [(f"{name}-{number}", "abc"[n % 3], name) for n, name in enumerate(names) for number in range(2)]
    both = pl.concat([alone, _rows(*variants)])
    plain, assigned = divide(alone, split, 0.2, 0.1), divide(both, split, 0.2, 0.1)
    assert assigned[:60] == plain
    assert assigned[60:] == list(np.repeat(plain, 2))


@pytest.mark.parametrize("rule", ["by_class", "random", "stratified"])
def test_splitting_no_rows_gives_empty_splits(config: Configure, rule: str) -> None:
    split: Split = config().data.split.model_copy(update={"rule": rule})
    assert divide(_rows(), split, 0.1, 0.1) == []


@pytest.mark.parametrize("rule", ["by_class", "random", "stratified"])
def test_rule_of_the_configuration_is_the_one_that_is_used(config: Configure, rule: str) -> None:
    labels = _labels({"a": 40, "b": 20})
    split = config().data.split.model_copy(update={"rule": rule, "seed": 3})
    direct = {
        "by_class": by_class(labels, 0.2, 0.1, 3),
        "random": at_random(60, 0.2, 0.1, 3),
        "stratified": stratified(labels, 0.2, 0.1, 3),
    }
    assert divide(_rows(*((str(n), label) for n, label in enumerate(labels))), split, 0.2, 0.1) == direct[rule]
