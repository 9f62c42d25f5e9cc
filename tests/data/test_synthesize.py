"""Texts parsed from a model's answers, and the rows built from them."""

from __future__ import annotations

import pytest

from finsa.data.synthesize import Harvest, in_blocks, texts_of


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("今天大盘怎么样\n\n  上证还能涨吗  \n", ["今天大盘怎么样", "上证还能涨吗"]),
        ("好的，以下是3条：\n1. 甲\n2、乙\n（3）丙\n希望有帮助！", ["甲", "乙", "丙"]),
        ("以下是文本：\n甲\n乙", ["甲", "乙"]),
        ("① 甲\n② 乙", ["甲", "乙"]),
        ("- 甲\n* 乙\n-5%了怎么办", ["甲", "乙"]),
        ("3.5%的涨幅\n10:30开盘\n2024年报", ["3.5%的涨幅", "10:30开盘", "2024年报"]),
        ("1.3.5%的涨幅\n2.乙", ["乙"]),
        ("1. 3.5%的涨幅\n2. 乙", ["3.5%的涨幅", "乙"]),
        ('“甲”\n“乙”说\n"丙"', ["甲", "“乙”说", "丙"]),
        ('```json\n["甲", " 乙 ", "", 3, null]\n```', ["甲", "乙"]),
        ('{"texts": ["甲", "乙"]}', ["甲", "乙"]),
        ('[{"text": "甲", "label": "x"}, {"text": "乙"}]', ["甲", "乙"]),
        ('["甲", "乙', []),
        ('{"a": "甲", "b": "乙"}', []),
        ("[微笑]涨了\n[哭]跌了", ["[微笑]涨了", "[哭]跌了"]),
        ("", []),
        ("```\n```", []),
    ],
)
def test_texts_of_an_answer(answer: str, texts: list[str]) -> None:
    assert texts_of(answer) == texts


def test_every_text_is_counted_once() -> None:
    harvest = Harvest.of(["涨", "跌"], 2)
    harvest.add("涨", "甲A\n甲ａ\n坏\ufffd字")
    harvest.add("跌", "甲 a\n乙")
    harvest.add("涨", "")
    harvest.add("涨", "丙\n丁\n丁")
    assert harvest.texts == {"涨": ["甲A", "丙"], "跌": ["乙"]}
    assert harvest.counts == {
        "answers": 4,
        "answers without a text": 1,
        "kept": 3,
        "dropped: repeated": 2,
        "dropped: unreadable": 1,
        "dropped: more than wanted": 2,
    }
    assert [harvest.missing("涨"), harvest.missing("跌")] == [0, 1]


def test_blocks_alternate_and_the_last_may_be_smaller() -> None:
    texts = {label: [f"{label}{number}" for number in range(9)] for label in "ab"}
    rows = in_blocks(texts, 2, 7, 3, "train")
    assert rows["text"].to_list() == ["a2", "a3", "a4", "b2", "b3", "b4", "a5", "a6", "b5", "b6"]
    assert rows["label"].to_list() == list("aaabbbaabb")
    assert rows["id"].to_list() == [f"train-{number:05}" for number in range(1, 11)]
