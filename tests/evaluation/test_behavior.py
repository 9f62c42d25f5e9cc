"""Rules of behavior: what they change, which rows they apply to, and how failures are counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from scipy.stats import binomtest

from finsa.config import ROOT, Behavior, BehaviorRule
from finsa.config.behavior import Poles
from finsa.errors import ConfigError, DataError
from finsa.evaluation import behavior

LABELS = ("利空", "中性", "利好")


def rules(name: str) -> Behavior:
    text = (ROOT / "conf" / "behavior" / f"{name}.yaml").read_text(encoding="utf-8")
    return Behavior.model_validate_json(json.dumps(yaml.safe_load(text)))


def rule(**values: Any) -> BehaviorRule:
    return BehaviorRule.model_validate_json(json.dumps({"expect": "stay", "about": "a change", **values}))


def custom(**of_rules: Any) -> Behavior:
    opposites = [{"positive": "利好", "negative": "利空"}]
    values = {"name": "mine", "opposites": opposites, "rules": {k: {"about": "", **v} for k, v in of_rules.items()}}
    return Behavior.model_validate_json(json.dumps(values))


@pytest.mark.parametrize(
    ("language", "name", "text", "changed"),
    [
        (
            "zh",
            "order",
            "一边是订单不足，一边是费用走低，后者才是关键。",
            "一边是费用走低，一边是订单不足，后者才是关键。",
        ),
        ("zh", "order", "浮亏从55.3%变成27.6%", "浮亏从27.6%变成55.3%"),
        ("zh", "order", "不是利好而是利空", "不是利空而是利好"),
        ("zh", "direction", "净利同比增长5%", "净利同比下降5%"),
        ("zh", "direction", "净利增长，股价下跌", "净利增长，股价下跌"),  # both directions: what a swap does is unclear
        ("zh", "negation", "公司中标3亿元项目", "公司未能中标3亿元项目"),
        ("zh", "negation_removed", "没有收回31.2亿元货款", "已收回31.2亿元货款"),
        ("zh", "scale", "净利3.5亿元，合同20亿元", "净利35000万元，合同200000万元"),
        ("zh", "sign", "股价+5%", "股价-5%"),
        ("zh", "traditional", "业务扩张", "業務擴張"),
        ("zh", "full_width", "涨5%", "涨５％"),
        ("zh", "neutral_sentence", "涨了", "涨了。以上内容来自公开资料。"),
        ("zh", "neutral_sentence", "涨了吗？", "涨了吗？以上内容来自公开资料。"),
        ("en", "direction", "Sales rose by 5 %", "Sales fell by 5 %"),
        ("en", "direction", "Higher sales", "Lower sales"),
        ("en", "direction", "Sales rose, costs fell", "Sales rose, costs fell"),
        (
            "en",
            "order",
            "Profit was EUR 1.6 mn compared to EUR 5.9 mn .",
            "Profit was EUR 5.9 mn compared to EUR 1.6 mn .",
        ),
        ("en", "negation", "Metso has won a contract", "Metso has not won a contract"),
        ("en", "sign", "Okta -2% on downgrade", "Okta +2% on downgrade"),
        ("en", "sign", "a yield of 8%-10%", "a yield of 8%-10%"),
        ("en", "scale", "EUR 1.5 mn and 3 billion", "EUR 1,500 thousand and 3 billion"),
        ("en", "entity", "$TSLA and Nokia", "$ACME and Elisa"),
        ("en", "typo", "The company said", "The cmopany said"),
    ],
)
def test_a_rule_changes_a_text(language: str, name: str, text: str, changed: str) -> None:
    assert rules(language).rules[name].changed(text) == changed


def test_what_is_around_a_swapped_word_stays() -> None:
    one = BehaviorRule(expect="stay", about="", swap={"公司": "企业"}, around=("(该|本)", ""))
    assert one.changed("该公司和本企业，还有公司") == "该企业和本公司，还有公司"


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_swap_is_its_own_inverse(language: str) -> None:
    """Swapping twice gives the text back, so a swap has one opposite per word."""
    for one in rules(language).rules.values():
        for word, other in one.swap.items():
            bare = BehaviorRule(expect=one.expect, about="", swap=one.swap, around=one.around)
            form = " {} 5%" if word.isalpha() else " {}5%"
            assert bare.changed(form.format(word)) == form.format(other)
            assert bare.changed(form.format(other)) == form.format(word)


def test_order_keeps_every_character() -> None:
    """The rules called order only move characters, so a model that counts characters cannot see the change."""
    texts = [
        "一边是订单不足，一边是费用走低，后者才是关键。",
        "浮亏从55.3%变成27.6%",
        "由3亿元变为5亿元",
        "不是涨，而是跌",
    ]
    english = [
        "Profit was EUR 1.6 mn compared to EUR 5.9 mn in 2004 .",
        "Sales totaled EUR 17.7 mn , against EUR 17.6 mn .",
    ]
    for language, of_language in (("zh", texts), ("en", english)):
        for text in of_language:
            changed = rules(language).rules["order"].changed(text)
            assert changed != text
            assert sorted(changed) == sorted(text)


def test_expected_labels() -> None:
    """Stay: all rows with their label; flip: rows with an opposite; ``of``: one side of the pair."""
    texts, gold = ["涨", "涨", "涨", "平"], ["利好", "利空", "中性", "中性"]
    flip = {"expect": "flip", "swap": {"涨": "跌"}}
    made = behavior.cases(
        texts, gold, LABELS, custom(a={**flip, "expect": "stay"}, b=flip, c={**flip, "of": "negative"}), None
    )
    assert [(case.rule, case.row, case.text, case.expected) for case in made] == [
        *(("a", row, "跌", gold[row]) for row in range(3)),
        ("b", 0, "跌", "利空"),
        ("b", 1, "跌", "利好"),
        ("c", 1, "跌", "利好"),
    ]
    assert {case.rule for case in behavior.cases(texts, gold, LABELS, custom(a=flip, b=flip), ["b"])} == {"b"}


def test_rates_and_pairs_are_those_of_their_definitions() -> None:
    """Ten rows, of which each run answers eight correctly: pairs need rows that both answer."""
    made = [behavior.Case("r", row, "t", "利好") for row in range(10)]
    failed = {"a": {row: row < 6 for row in range(8)}, "b": {row: row == 9 for row in range(2, 10)}}
    first, second = behavior.rates(made, failed)
    assert (first["rows"], first["tested"], first["failures"], first["rate"]) == (10, 8, 6, 0.75)
    interval = binomtest(6, 8).proportion_ci(method="wilson")
    assert (first["rate_low"], first["rate_high"]) == pytest.approx((interval.low, interval.high))
    assert second["failures"] == 1
    (pair,) = behavior.paired(made, failed)
    assert (pair["tested"], pair["only_first"], pair["only_second"]) == (6, 4, 0)
    assert pair["mcnemar_p"] == pair["mcnemar_p_holm"] == pytest.approx(2 * 0.5**4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "changes nothing; it needs swap, replace, characters or append"),
        ({"append": "x", "when": "("}, r"the regular expression '\(' does not compile: missing \)"),
        ({"replace": {"a": r"\2"}}, r"the replacement .* does not fit 'a': invalid group reference 2"),
        ({"replace": {"[": "b"}}, r"the regular expression '\[' does not compile"),
        ({"characters": ["ab", "c"]}, "characters: 2 against 1"),
        ({"append": "x", "expects": "stay"}, "Extra inputs are not permitted"),
        ({"append": "x", "expect": "change"}, "Input should be 'stay' or 'flip'"),
    ],
)
def test_wrong_rules(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rule(**values)


def test_opposite_labels_differ() -> None:
    with pytest.raises(ValidationError, match="the same label twice, up"):
        Poles(positive="up", negative="up")


def test_rules_that_do_not_fit_the_rows() -> None:
    flip, stay = {"expect": "flip", "append": "!"}, {"expect": "stay", "append": "!"}
    with pytest.raises(
        ConfigError,
        match=r"behavior mine: the rules a need opposite labels, and up, down have none .* stage.only=\[b\]",
    ):
        behavior.cases(["x"], ["up"], ["up", "down"], custom(a=flip, b=stay), None)
    assert len(behavior.cases(["x"], ["up"], ["up", "down"], custom(a=flip, b=stay), ["b"])) == 1
    with pytest.raises(ConfigError, match=r"stage.only: there is no rule 'ab'. Did you mean 'a'\?|Choose from: a"):
        behavior.cases(["x"], ["利好"], LABELS, custom(a=flip), ["ab"])
    with pytest.raises(DataError, match="behavior mine: no rule applies to any of the 1 test rows"):
        behavior.cases(["x"], ["利好"], LABELS, custom(a={"expect": "stay", "swap": {"涨": "跌"}}), None)


def test_the_language_of_texts() -> None:
    assert behavior.language(["公司增持", "ABC股份上涨", "Nokia rose"]) == "zh"
    assert behavior.language(["Nokia rose by 5 %", "公司 of the year award goes to them"]) == "en"
    assert behavior.language(["Газпром вырос"]) is None
