"""Mixtures: the router's gates, and the comparison with its parts, on made-up answers."""

from __future__ import annotations

import numpy as np
import pytest

from finsa.errors import DataError
from finsa.evaluation import moe, statistics

NAMES = ("news", "forum")
GATES = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])


def test_counts_and_means() -> None:
    found = moe.analyze_gates(GATES, ["news", "news", "news", "forum"], NAMES)
    assert found["accuracy"] == 0.75
    assert found["accuracy_by_domain"] == {"news": pytest.approx(2 / 3), "forum": 1.0}
    assert found["confusion"] == {"news": {"news": 2, "forum": 1}, "forum": {"news": 0, "forum": 1}}
    assert found["load"] == {"news": pytest.approx(0.6), "forum": pytest.approx(0.4)}
    assert found["chosen"] == {"news": 0.5, "forum": 0.5}
    assert found["mean_gates"]["news"] == {"news": pytest.approx(0.7), "forum": pytest.approx(0.3)}
    assert found["warnings"] == []


def test_entropy_is_between_one_hot_and_uniform() -> None:
    sure = moe.analyze_gates(np.eye(2), NAMES, NAMES)
    assert (sure["entropy"], sure["load_entropy"]) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert moe.analyze_gates(np.full((3, 2), 0.5), [None] * 3, NAMES)["entropy"] == pytest.approx(1)


def test_domains_without_an_expert_have_no_accuracy() -> None:
    found = moe.analyze_gates(GATES, ["weibo", "weibo", None, None], NAMES)
    assert found["accuracy"] is None
    assert set(found["confusion"]) == {"weibo", "(none)"}


def test_collapse_is_reported() -> None:
    unused = moe.analyze_gates(np.array([[0.99, 0.01], [0.98, 0.02]]), NAMES, NAMES)["warnings"]
    assert any("Expert forum is hardly used" in warning for warning in unused)
    assert any("does not distinguish the domains" in warning for warning in unused)
    flat = moe.analyze_gates(np.array([[0.51, 0.49], [0.49, 0.51]]), NAMES, NAMES)["warnings"]
    assert len(flat) == 1


def test_an_unknown_domain(config: object) -> None:
    stage = config("stage=moe_joint").stage  # type: ignore[operator]
    moe.require_known_domains(stage, NAMES, ["news", None, "forum"])
    moe.require_known_domains(stage.model_copy(update={"domain_weight": 0.0}), NAMES, ["weibo"])
    with pytest.raises(DataError, match="domain 'weibo'"):
        moe.require_known_domains(stage, NAMES, ["news", "weibo"])


# ------------------------------------------------------------------------------------------------ comparison

LABELS = ("low", "middle", "high")
GOLD = np.array([0, 1, 2, 0, 1, 2, 0, 1])
DOMAINS = ["news"] * 4 + ["forum"] * 4
ALONE = {"news": np.array([0, 1, 2, 0, 0, 0, 0, 0]), "forum": np.array([1, 1, 1, 1, 1, 2, 0, 1])}


def test_the_true_domains_expert_answers() -> None:
    found = moe.expert_answers(ALONE, DOMAINS)
    assert list(found) == ["news alone", "forum alone", moe.ORACLE, moe.WRONG]
    assert found[moe.ORACLE].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert found[moe.WRONG].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_the_wrong_expert_of_three_is_that_of_another_domain() -> None:
    alone = {name: np.full(3, number) for number, name in enumerate("abc")}
    found = moe.expert_answers(alone, ["a", "b", "c"])
    assert found[moe.ORACLE].tolist() == [0, 1, 2]
    assert found[moe.WRONG].tolist() == [1, 2, 0]


def test_without_domains_only_single_experts_are_compared() -> None:
    assert list(moe.expert_answers(ALONE, [None] * 8)) == ["news alone", "forum alone"]


def test_records_are_paired_with_the_mixture() -> None:
    answers = {moe.MIXTURE: GOLD.copy(), moe.UNION: np.array([0, 1, 2, 0, 1, 0, 1, 0])}
    answers[moe.MIXTURE][5] = 1
    mixture, union = moe.compare(answers, GOLD, DOMAINS, LABELS)
    assert "mcnemar_p" not in mixture
    assert (union["fixed"], union["broken"]) == (2, 0)
    assert union["mcnemar_p"] == statistics.mcnemar(2, 0)
    assert union["difference"] == pytest.approx(mixture["macro_f1"] - union["macro_f1"])
    assert (mixture["macro_f1 news"], union["macro_f1 news"]) == (1.0, 1.0)
    (table,) = moe.tables("it", {"mixture": [mixture, union]})
    assert table.rows[0][0] == moe.MIXTURE
    assert union["verdict"] == "inconclusive"  # two rows of eight
    assert table.marked is None
    assert table.rows[1][-2:] == ["2 / 0", "inconclusive"]
    assert not any(column.startswith("McNemar") for column in table.columns)  # one test, one p: the report's
    assert len({len(row) for row in [*table.rows, table.columns]}) == 1


def test_only_a_mixture_that_beats_every_other_model_is_marked() -> None:
    gold = np.tile(GOLD, 30)
    wrong = (gold + 1) % 3
    answers = {
        moe.MIXTURE: gold,
        moe.UNION: wrong,
        "news alone": np.where(np.arange(240) < 90, wrong, gold),
    }
    domains = DOMAINS * 30
    (table,) = moe.tables("it", {"mixture": moe.compare(answers, gold, domains, LABELS)})
    assert [row[-1] for row in table.rows] == ["-", "better", "better"]
    assert table.marked == 0
    answers["news alone"] = np.where(np.arange(240) < 1, wrong, gold)
    (table,) = moe.tables("it", {"mixture": moe.compare(answers, gold, domains, LABELS)})
    assert [row[-1] for row in table.rows] == ["-", "better", "inconclusive"]
    assert table.marked is None
