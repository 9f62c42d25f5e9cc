"""The arms that a mixture is held against, and the paired tests, on answers that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from finsa.evaluation import moe_comparison, moe_tables, statistics

LABELS = ("low", "middle", "high")
GOLD = np.array([0, 1, 2, 0, 1, 2, 0, 1])
DOMAINS = ["news"] * 4 + ["forum"] * 4
ALONE = {"news": np.array([0, 1, 2, 0, 0, 0, 0, 0]), "forum": np.array([1, 1, 1, 1, 1, 2, 0, 1])}


def test_the_true_domains_expert_answers() -> None:
    found = moe_comparison.arms(ALONE, DOMAINS)
    assert list(found) == ["news alone", "forum alone", moe_comparison.ORACLE, moe_comparison.WRONG]
    assert found[moe_comparison.ORACLE].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert found[moe_comparison.WRONG].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_of_three_experts_the_wrong_one_is_of_another_domain() -> None:
    alone = {name: np.full(3, number) for number, name in enumerate("abc")}
    found = moe_comparison.arms(alone, ["a", "b", "c"])
    assert found[moe_comparison.ORACLE].tolist() == [0, 1, 2]
    assert found[moe_comparison.WRONG].tolist() == [1, 2, 0]


def test_without_domains_there_are_the_experts_alone() -> None:
    assert list(moe_comparison.arms(ALONE, [None] * 8)) == ["news alone", "forum alone"]


def test_records_are_paired_with_the_mixture() -> None:
    answers = {moe_comparison.MIXTURE: GOLD.copy(), moe_comparison.UNION: np.array([0, 1, 2, 0, 1, 0, 1, 0])}
    answers[moe_comparison.MIXTURE][5] = 1
    mixture, union = moe_comparison.compare(answers, GOLD, DOMAINS, LABELS)
    assert "mcnemar_p" not in mixture
    assert (union["fixed"], union["broken"]) == (2, 0)
    assert union["mcnemar_p"] == statistics.mcnemar(2, 0)
    assert union["difference"] == pytest.approx(mixture["macro_f1"] - union["macro_f1"])
    assert (mixture["macro_f1 news"], union["macro_f1 news"]) == (1.0, 1.0)
    (sheet,) = moe_tables.of("it", {"mixture": [mixture, union]})
    assert sheet.rows[0][0] == moe_comparison.MIXTURE
    assert union["verdict"] == "inconclusive"  # two rows of eight
    assert sheet.marked is None
    assert sheet.rows[1][-2:] == ["2 / 0", "inconclusive"]
    assert not any(column.startswith("McNemar") for column in sheet.columns)  # one test, one p: the report's
    assert len({len(row) for row in [*sheet.rows, sheet.columns]}) == 1


def test_only_a_mixture_that_beats_every_other_arm_is_marked() -> None:
    gold = np.tile(GOLD, 30)
    wrong = (gold + 1) % 3
    answers = {
        moe_comparison.MIXTURE: gold,
        moe_comparison.UNION: wrong,
        "news alone": np.where(np.arange(240) < 90, wrong, gold),
    }
    domains = DOMAINS * 30
    (sheet,) = moe_tables.of("it", {"mixture": moe_comparison.compare(answers, gold, domains, LABELS)})
    assert [row[-1] for row in sheet.rows] == ["-", "better", "better"]
    assert sheet.marked == 0
    answers["news alone"] = np.where(np.arange(240) < 1, wrong, gold)
    (sheet,) = moe_tables.of("it", {"mixture": moe_comparison.compare(answers, gold, domains, LABELS)})
    assert [row[-1] for row in sheet.rows] == ["-", "better", "inconclusive"]
    assert sheet.marked is None
