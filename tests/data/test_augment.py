"""Variants: drawn, made in one pass, linked to their originals, and filtered with every drop counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finsa.config import AugmentStage, RunConfig
from finsa.data import augment, dataset
from finsa.data.augment import NO_OTHER, NO_WORD, replace_words
from finsa.data.readers import FATE

Configure = Callable[..., RunConfig]
# Every word that the dictionary knows or writes, by the direction it has.
UP = """
利好 利多 看好 看多 看涨 上涨 走高 上扬 上行 大涨 飙升 猛涨 反弹 回升 回弹 攀升 上升 增长 提升 增加 上调 调高 提高
高于 超过 超出 盈利 获利 强劲 强势 旺盛 加仓 增仓 补仓
"""
DOWN = """
利空 利淡 看空 看跌 唱空 下跌 走低 下挫 下行 下探 大跌 重挫 猛跌 跳水 急跌 骤跌 回落 负增长 下降 下滑 减少 缩减 降低
下调 调低 低于 少于 亏损 亏空 低迷 疲软 不振 减仓 降仓 减码 抛售 甩卖 抛出
"""


def _words(config: Configure) -> Mapping[str, Sequence[str]]:
    stage = config("stage=augment", "output=somewhere").stage
    assert isinstance(stage, AugmentStage)
    assert stage.synonyms is not None
    return stage.synonyms.words


def _rows(*rows: tuple[str, str], parents: Sequence[str | None] = ()) -> pl.DataFrame:
    filled = [(*row, "利好", "news", parent) for row, parent in zip(rows, parents or [None] * len(rows), strict=True)]
    return pl.DataFrame(filled, schema=dict.fromkeys(augment.COLUMNS, pl.String), orient="row")


def _replace_words(text: str, words: Mapping[str, Sequence[str]], count: int = 100) -> set[str]:
    variants = replace_words(text, words, count, random.Random(1))
    assert len(variants) == len(set(variants))
    return set(variants)


# ------------------------------------------------------------------------------------------------ synonyms


def test_every_word_is_replaced_in_every_combination() -> None:
    words = {"涨": ["升", "扬"], "跌": ["落", "挫"]}
    assert _replace_words("先涨后跌", words) == {"先升后落", "先升后挫", "先扬后落", "先扬后挫"}
    assert len(_replace_words("先涨后跌", words, 3)) == 3
    assert _replace_words("涨涨", words) == {"升升", "升扬", "扬升", "扬扬"}


def test_replacements_do_not_chain_and_the_longest_match_comes_first() -> None:
    assert _replace_words("看好后市", {"看好": ["看多"], "看多": ["看好"]}) == {"看多后市"}
    assert _replace_words("利润负增长", {"增长": ["提升"], "负增长": ["下滑"]}) == {"利润下滑"}
    assert _replace_words("a+b", {"a+": ["c"]}) == {"cb"}, "a word is no pattern"


def test_a_text_without_a_word_has_no_variant() -> None:
    assert _replace_words("横盘", {"涨": ["升"]}) == set()


@given(st.text("涨跌平", max_size=60), st.integers(1, 5), st.integers(0, 99))
def test_number_of_variants(text: str, count: int, seed: int) -> None:
    words = {"涨": ["升", "扬"], "跌": ["落"]}
    variants = replace_words(text, words, count, random.Random(seed))
    ups, hits = text.count("涨"), text.count("涨") + text.count("跌")
    assert len(set(variants)) == len(variants) == (min(count, 2**ups) if hits else 0)
    back = str.maketrans({"升": "涨", "扬": "涨", "落": "跌"})
    assert {variant.translate(back) for variant in variants} <= {text}


def test_the_dictionary_keeps_sign_and_direction(config: Configure) -> None:
    words = _words(config)
    assert 25 <= len(words) <= 35
    up, down = set(UP.split()), set(DOWN.split())
    assert up.isdisjoint(down)
    assert [word for word, others in words.items() if not any({word, *others} <= side for side in (up, down))] == []


def test_the_dictionary_has_words_of_the_sample(config: Configure) -> None:
    train = dataset.load(config().data).splits["train"]
    hit = train.filter(pl.col("text").str.contains_any(list(_words(config))))
    assert hit.height / train.height > 0.2


def test_synonyms_account_for_every_wanted_variant() -> None:
    rows = _rows(("a", "涨了"), ("b", "横盘"), ("c", "跌了"))
    made = augment.propose_synonyms(rows, {"涨": ["升", "扬", "攀"], "跌": ["落"]}, 2, seed=7)
    assert made["id"].to_list() == ["a-s1", "a-s2", "b-s1", "b-s2", "c-s1", "c-s2"]
    assert made["parent"].to_list() == ["a", "a", "b", "b", "c", "c"]
    assert made[FATE].to_list() == [None, None, NO_WORD, NO_WORD, None, NO_OTHER]
    assert set(made["text"][:2]) < {"升了", "扬了", "攀了"}
    assert made["text"][4] == "落了"
    assert set(made["label"]) == {"利好"}


def test_variants_of_a_row_do_not_depend_on_the_others() -> None:
    words = {"涨": [str(number) for number in range(9)]}
    both = augment.propose_synonyms(_rows(("a", "涨涨"), ("b", "涨涨涨")), words, 3, seed=7)
    alone = augment.propose_synonyms(_rows(("b", "涨涨涨")), words, 3, seed=7)
    assert both.filter(pl.col("parent") == "b").equals(alone)
    assert not alone.equals(augment.propose_synonyms(_rows(("b", "涨涨涨")), words, 3, seed=8))


# ------------------------------------------------------------------------------------------------ row selection


@pytest.mark.parametrize(("share", "size"), [(0.2, 20), (0.805, 80), (1.0, 100), (0.001, 0)])
def test_share_of_the_rows(share: float, size: int) -> None:
    rows = _rows(*((str(number), f"第{number}条") for number in range(100)))
    for last in (False, True):
        drawn = augment.draw(rows, share, 42, last)
        assert drawn.height == drawn["id"].n_unique() == size
        assert drawn.equals(augment.draw(rows, share, 42, last))
    assert share in (1.0, 0.001) or not drawn.equals(augment.draw(rows, share, 43, True))


def test_two_draws_are_disjoint_if_their_shares_sum_to_one() -> None:
    rows = _rows(*((str(number), f"第{number}条") for number in range(99)))
    first, second = augment.draw(rows, 0.2, 42), augment.draw(rows, 0.8, 42, last=True)
    assert sorted([*first["id"], *second["id"]]) == sorted(rows["id"])


def test_ids_that_are_not_unique_become_so() -> None:
    rows = _rows(
        ("a", "一"), ("b", "二"), ("a", "三"), ("v", "四"), ("w", "五"), parents=[None, None, None, "b", "held"]
    )
    made = augment.with_unique_ids(rows, {"b", "b-2"})
    assert made["id"].to_list() == ["a", "b-3", "a-2", "v", "w"]
    assert made["parent"].to_list() == [None, None, None, "b-3", "held"]
    assert made["text"].equals(rows["text"])


def test_a_new_variant_does_not_reuse_an_id() -> None:
    variants = _rows(("a-s1", "一"), ("a-s2", "二"), ("b-s1", "三"))
    assert augment.unique_ids(variants["id"], {"a-s1", "b-s1", "b-s1-2"}).to_list() == ["a-s1-2", "a-s2", "b-s1-3"]


# ------------------------------------------------------------------------------------------------ filters


def test_every_filter_and_its_count() -> None:
    train = _rows(("a", "公司业绩ABC大涨"), ("b", "公司  亏损了"), ("c", "股价走高"))
    texts: list[tuple[str, str | None]] = [
        ("业绩大涨，公司ABC", None),
        ("  \n", None),
        ("公司业绩 ａｂｃ大涨", None),
        ("大涨", None),
        ("公司业绩ABC大涨" * 3, None),
        ("测试集 里的那句话", None),
        ("公司亏损了", None),
        ("业绩大涨， 公司abc", None),
        ("公司业绩\ufffdC大涨", None),
        ("", "malformed answer"),
    ]
    proposed = augment.propose(train[:1], "paraphrase", [texts])
    judged = augment.judge(proposed, train, pl.Series(["测试集里的那句话"]), 0.4, 2.0)
    assert judged[FATE].to_list() == [
        None,
        "empty",
        "unchanged",
        "too short",
        "too long",
        "leak: text of a validation or test row",
        "equal to a training text",
        "equal to another variant",
        "unreadable: damaged characters",
        "malformed answer",
    ]
    numbers = augment.count(judged)
    assert (numbers["wanted"], numbers["made"]) == (10, 1)
    assert numbers["wanted"] == numbers["made"] + sum(numbers["dropped"].values())
    assert judged.columns == proposed.columns
    assert judged["id"][0] == "a-p1"


def test_lengths_at_the_bounds_stay() -> None:
    train = _rows(("a", "一二三四"))
    proposed = augment.propose(train, "p", [[("五六", None), ("五六七八九十百千", None), ("五", None)]])
    judged = augment.judge(proposed, train, pl.Series([], dtype=pl.String), 0.5, 2.0)
    assert judged[FATE].to_list() == [None, None, "too short"]


def test_a_dropped_variant_does_not_exclude_another() -> None:
    train = _rows(("a", "一二三四五六七八"), ("b", "一二"))
    proposed = augment.propose(train, "p", [[("三四", None)], [("三四", None)]])
    judged = augment.judge(proposed, train, pl.Series([], dtype=pl.String), 0.5, 2.0)
    assert judged[FATE].to_list() == ["too short", None]
