"""Shortcut features that predict the label: known associations, known groups, plain sentences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from finsa.config import InspectStage, RunConfig
from finsa.evaluation import confounds

NAMES = ("利空", "中性", "利好")


@pytest.fixture
def stage(config: Callable[..., RunConfig]) -> InspectStage:
    chosen = config("stage=inspect").stage
    assert isinstance(chosen, InspectStage)
    return chosen


def _rows(ids: list[str], labels: list[int], split: str = "train", **columns: list[str | None]) -> pl.DataFrame:
    texts = columns.pop("text", ["文"] * len(ids))
    domains = columns.pop("domain", [None] * len(ids))
    return pl.DataFrame(
        {"split": [split] * len(ids), "id": ids, "label": labels, "text": texts, "domain": domains, **columns},
        schema_overrides={"domain": pl.String},
    )


@pytest.mark.parametrize(
    ("ids", "groups"),
    [
        (["wx-seed-1", "wx-test-2", "fpb-3-zh", "fpb-4-zh"], ["wx", "wx", "fpb", "fpb"]),
        (["news1", "news2", "forum_1", "forum_2"], ["news", "news", "forum", "forum"]),
        (["fe-train-1", "fe-train-2", "fe-eval-1", "fe-eval-2"], ["fe-train", "fe-train", "fe-eval", "fe-eval"]),
        (["新闻-1", "新闻-2", "股吧-1", "股吧-2"], ["新闻", "新闻", "股吧", "股吧"]),
    ],
)
def test_id_prefixes(ids: list[str], groups: list[str]) -> None:
    found = confounds.groupings(_rows(ids, [0, 1, 0, 1]), 2)
    assert {kind: of.to_list() for kind, of in found.items()} == {"id prefix": groups}


@pytest.mark.parametrize(
    "ids",
    [
        ["s7-1", "s7-2", "s7-3", "s7-4"],  # one prefix
        ["1", "2", "3", "4"],  # none
        ["a-1", "b-1", "c-1", "d-1"],  # too small
    ],
)
def test_ids_without_informative_prefixes_form_no_groups(ids: list[str]) -> None:
    assert confounds.groupings(_rows(ids, [0, 1, 0, 1]), 2) == {}


def test_many_prefixes_are_identifiers() -> None:
    ids = [f"{a}{b}-{n}" for a in "abcde" for b in "abcde" for n in range(40)]
    assert confounds.groupings(_rows(ids, [0] * len(ids)), 30) == {}


def test_small_groups_and_missing_domains_become_others() -> None:
    domains = ["news"] * 5 + ["forum"] * 4 + ["blog", None]
    found = confounds.groupings(_rows([str(n) for n in range(11)], [0] * 11, domain=domains), 3)
    assert found["domain"].to_list() == ["news"] * 5 + ["forum"] * 4 + [confounds.OTHERS] * 2


def test_cramers_v_of_known_tables() -> None:
    assert confounds.cramers_v(np.array([[50, 0], [0, 50]]))[0] == pytest.approx(1.0)
    assert confounds.cramers_v(np.array([[25, 25], [25, 25]])) == (0.0, 1.0)
    assert confounds.cramers_v(np.array([[30, 20], [10, 40]]))[0] == pytest.approx(0.40825, abs=1e-5)
    assert confounds.cramers_v(np.array([[30, 20, 0], [0, 0, 0]])) == (0.0, 1.0)


def _mixed(stage: InspectStage) -> tuple[pl.DataFrame, dict[str, object]]:
    """Headlines (wx) without a neutral class, and translations (fpb) that are mostly neutral, in train and test."""
    counts = {"wx": (40, 0, 160), "fpb": (20, 140, 40)}
    parts = []
    for split, share in (("train", 1.0), ("test", 0.5)):
        ids, labels = [], []
        for prefix, sizes in counts.items():
            for label, size in enumerate(sizes):
                labels += [label] * int(size * share)
                ids += [f"{prefix}-{split}-{label}-{n}" for n in range(int(size * share))]
        parts.append(_rows(ids, labels, split))
    rows = pl.concat(parts)
    groups = confounds.groupings(rows, stage.group_rows)["id prefix"]
    return rows, confounds.measure_groups("id prefix", groups, rows, NAMES)


def test_a_source_without_a_class_is_reported(stage: InspectStage) -> None:
    _, found = _mixed(stage)
    groups = {group["name"]: group for group in found["groups"]}  # type: ignore[attr-defined]
    assert groups["wx"]["labels"] == {"利空": 60, "中性": 0, "利好": 240}
    assert groups["wx"]["lacks"] == ["中性"]
    assert groups["fpb"]["lacks"] == []
    assert groups["fpb"]["splits"]["test"] == {"利空": 10, "中性": 70, "利好": 20}
    # Of 200 test rows, 80 are positive headlines and 70 neutral translations; 100 are positive.
    assert found["guess"] == {"on": "test", "accuracy": 0.75, "majority": 0.5, "majority_label": "利好"}


def test_sentences_of_a_confounded_source(stage: InspectStage) -> None:
    _, found = _mixed(stage)
    lacks, confounded = confounds.describe_groups(found, stage)
    assert lacks == "id prefix wx (300 rows, 50 % of all) has no 中性 rows."
    assert (
        "alone predicts the label of 75.0 % of the test rows; the majority label 利好 is correct for 50.0 %."
        in confounded
    )
    assert "100 % of the 中性 rows are id prefix fpb, which has 50 % of all rows." in confounded


def test_an_unrelated_group_is_not_reported(stage: InspectStage) -> None:
    rows = _rows([f"{'ab'[n % 2]}-{n}" for n in range(600)], [n // 2 % 3 for n in range(600)])
    groups = confounds.groupings(rows, stage.group_rows)["id prefix"]
    found = confounds.measure_groups("id prefix", groups, rows, NAMES)
    assert found["association"] == pytest.approx(0.0, abs=1e-9)
    assert confounds.describe_groups(found, stage) == []


def test_chance_associations_of_few_rows_are_not_reported(stage: InspectStage) -> None:
    rng = np.random.default_rng(3)
    reported = 0
    for _ in range(200):
        rows = _rows([f"{'abc'[n % 3]}-{n}" for n in range(90)], rng.integers(0, 3, 90).tolist())
        groups = confounds.groupings(rows, 30)["id prefix"]
        reported += (
            len(confounds.describe_groups(confounds.measure_groups("id prefix", groups, rows, NAMES), stage)) > 0
        )
    assert reported <= 8  # CHANCE of them, 2, are to be expected


def test_traits_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 400)
    texts = ["涨" * int(rng.integers(1, 9) + 4 * (label == 1)) + "a" * int(rng.integers(0, 5)) for label in labels]
    rows = _rows([str(n) for n in range(400)], labels.tolist(), text=texts)
    for name, values in (
        ("text length", [len(text) for text in texts]),
        ("share of Chinese characters", [text.count("涨") / len(text) for text in texts]),
    ):
        found = confounds.measure_trait(name, rows, NAMES, 30)
        for number, one in enumerate(found["classes"]):
            assert one["auc"] == pytest.approx(roc_auc_score(labels == number, values))
        assert 0 < found["eta_squared"] < 1


def test_a_length_that_predicts_the_class(stage: InspectStage) -> None:
    labels = [n % 3 for n in range(300)]
    texts = ["长" * (40 + n % 7) if label == 1 else "短" * (10 + n % 5) for n, label in enumerate(labels)]
    found = confounds.measure_trait("text length", _rows([str(n) for n in range(300)], labels, text=texts), NAMES, 30)
    (sentence,) = confounds.describe_trait(found, stage)
    assert sentence == (
        "text length predicts the label 中性: it is higher than in a row of another label with probability 1.00 "
        "(0.5 would be chance); median 43 characters, of the other labels 12."
    )


def test_equal_texts_and_a_missing_class_are_not_an_error(stage: InspectStage) -> None:
    rows = _rows(["a", "b", "c"], [0, 0, 2])
    for name in confounds.TRAITS:
        found = confounds.measure_trait(name, rows, NAMES, 1)
        assert found["eta_squared"] == 0.0
        assert confounds.describe_trait(found, stage) == []
        assert found["classes"][1]["quartiles"] is None
