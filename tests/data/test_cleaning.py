"""Every row gets at most one fate; policies apply everywhere: error reports, drop counts, keep keeps with a note."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_frames import fates, row_frame

from finsa.config import Data, RunConfig, SplitRows
from finsa.data import cleaning
from finsa.data.readers import FATE
from finsa.data.sources import Rows
from finsa.errors import DataError

Configure = Callable[..., RunConfig]
FATES = {
    "on_unknown_label": "unknown label",
    "on_conflict": "conflicting label",
    "on_duplicate": "duplicate",
    "on_leak": "leak: training copy of a test row",
}


@pytest.fixture
def data(config: Configure) -> Data:
    """The plain table's settings, all policies drop."""
    return config("data=table").data.model_copy(update=dict.fromkeys(FATES, "drop"))


# ------------------------------------------------------------------------------------------------ fates


def test_the_first_fate_is_kept() -> None:
    frame = cleaning.mark(row_frame(("x", "a"), ("y", "a")), pl.col("text") == "x", "first")
    assert fates(cleaning.mark(frame, pl.lit(True), "second")) == ["first", "second"]


def test_unknown_condition_is_not_met() -> None:
    assert fates(cleaning.mark(row_frame((None, "a")), pl.col("text") == "x", "first")) == [None]


def test_policies_on_the_same_rows() -> None:
    frame, met = row_frame(("x", "a"), ("y", None)), pl.col("text") == "y"
    assert fates(cleaning.decide(frame, met, "drop", "data.on_x", "gone", "are y")[0]) == [None, "gone"]
    kept, notes = cleaning.decide(frame, met, "keep", "data.on_x", "gone", "are y")
    assert fates(kept) == [None, None]
    assert notes == ["1 row is y; kept, because data.on_x=keep"]
    with pytest.raises(DataError) as caught:
        cleaning.decide(frame, met, "error", "data.on_x", "gone", "are y", " Look again.")
    assert str(caught.value) == (
        "data.on_x: 1 row is y. Look again. Set data.on_x=drop (counted) or data.on_x=keep\n  /d/t.csv:3: y [no label]"
    )


@pytest.mark.parametrize("policy", ["error", "drop", "keep"])
def test_no_affected_rows_give_no_notes(policy: Any) -> None:
    frame = row_frame(("x", "a"))
    same, notes = cleaning.decide(frame, pl.lit(False), policy, "k", "f", "w")
    assert same.equals(frame)
    assert notes == []


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("text", "fate"),
    [
        ("x", None),
        (None, "empty text"),
        ("", "empty text"),
        (" \n\u3000\t", "empty text"),
        ("x\x00y", "unreadable: NUL byte in the text"),
        ("x\ufffdy", "unreadable: damaged characters"),
        ("\x00", "unreadable: NUL byte in the text"),
        ("涨" * 1_000_000, None),
    ],
)
def test_text_that_cannot_be_used(text: str | None, fate: str | None) -> None:
    assert fates(cleaning.clean_texts(row_frame((text, "a")))) == [fate]


def test_surrounding_whitespace_is_stripped() -> None:
    assert cleaning.clean_texts(row_frame(("\u3000x y\n", "a")))["text"].to_list() == ["x y"]


def test_columns_and_single_texts_lose_the_same_characters() -> None:
    every = [chr(number) for number in range(0x10000) if not 0xD800 <= number < 0xE000]
    around = [f"{sign}涨 了{sign}" for sign in every]
    frame = pl.DataFrame({"text": around, FATE: pl.Series([None] * len(every), dtype=pl.String)})
    wanted = [cleaning.normalize(text) for text in around]
    assert cleaning.clean_texts(frame)["text"].to_list() == wanted
    assert [sign for sign, text in zip(every, wanted, strict=True) if text == "涨 了"] == sorted(cleaning.WHITE_SPACE)


def test_other_domains_are_filtered(data: Data) -> None:
    frame = row_frame(("x", "a", "news"), ("y", "a", "forum"), ("z", "a", None), columns=("text", "label", "domain"))
    news = data.model_copy(update={"domain": "news"})
    assert fates(cleaning.keep_domain(frame, news)) == [None, *["filtered: not of domain news"] * 2]
    with pytest.raises(DataError, match=r"data\.domain: no row is of domain 'nwes'\. Did you mean 'news'\?"):
        cleaning.keep_domain(frame, data.model_copy(update={"domain": "nwes"}))


def test_table_without_domains_is_of_the_domain(data: Data) -> None:
    assert fates(cleaning.keep_domain(row_frame(("x", "a")), data.model_copy(update={"domain": "news"}))) == [None]


def test_rows_of_one_file_with_one_id_are_noted() -> None:
    rows = [("1", "/d/a.csv"), ("1", "/d/b.csv"), ("2", "/d/a.csv"), ("1", "/d/a.csv"), ("1", "/d/a.csv")]
    frame = Rows(pl.DataFrame(rows, schema=["id", "file"], orient="row"), set()).frame
    assert cleaning.repeated_ids(frame) == ["3 rows share their id with another row of their file, such as '1'"]
    assert cleaning.repeated_ids(frame[:3]) == []


# ------------------------------------------------------------------------------------------------ copies


SAME = [("净利 润", "a"), ("净利润", "a"), ("NET up", "b"), ("ｎｅｔ　ＵＰ", "b"), ("x", "a"), ("x ", "b"), ("y", "c")]


def test_duplicates_by_policy(data: Data) -> None:
    frame = cleaning.clean_texts(row_frame(*SAME))
    assert fates(cleaning.mark_copies(frame, data)[0]) == [
        None,
        "duplicate",
        None,
        "duplicate",
        "conflicting label",
        "conflicting label",
        None,
    ]
    keep = data.model_copy(update={"on_duplicate": "keep", "on_conflict": "keep"})
    kept, notes = cleaning.mark_copies(frame, keep)
    assert fates(kept) == [None] * 7
    assert notes == [
        "2 rows have the text of another row and a different label; kept, because data.on_conflict=keep",
        "2 rows have text and label of an earlier row; kept, because data.on_duplicate=keep",
    ]


@pytest.mark.parametrize(("policy", "count"), [("on_conflict", 2), ("on_duplicate", 2)])
def test_duplicates_can_stop_the_run(data: Data, policy: str, count: int) -> None:
    frame = cleaning.clean_texts(row_frame(*SAME))
    with pytest.raises(DataError, match=rf"data\.{policy}: {count} rows have .*\n  /d/t\.csv:\d"):
        cleaning.mark_copies(frame, data.model_copy(update={policy: "error"}))


def test_duplicates_are_searched_within_a_split(data: Data) -> None:
    frame = row_frame(
        ("x", "a", "train"),
        ("x", "a", "test"),
        ("y", "a", "train"),
        ("y", "b", "test"),
        columns=("text", "label", "split"),
    )
    assert fates(cleaning.mark_copies(cleaning.clean_texts(frame), data)[0]) == [None] * 4


def test_a_copy_of_an_unused_row_is_not_a_duplicate(data: Data) -> None:
    frame = cleaning.mark(row_frame(("x", "a"), ("x", "a"), ("x", "b")), pl.col("id") == "0", "gone")
    frame = cleaning.mark(frame, pl.col("id") == "2", "gone too")
    assert fates(cleaning.mark_copies(cleaning.clean_texts(frame), data)[0]) == ["gone", None, "gone too"]


# ------------------------------------------------------------------------------------------------ leaks


COLUMNS = ("id", "text", "split", "parent", "group", "part")


def _leaks(data: Data, *rows: tuple[str | None, ...]) -> dict[str, str | None]:
    frame = cleaning.clean_texts(row_frame(*(row + (None,) * (6 - len(row)) for row in rows), columns=COLUMNS))
    return dict(cleaning.mark_leaks(frame, data)[0].select("id", FATE).iter_rows())


def test_copies_of_held_out_rows(data: Data) -> None:
    rows = [
        ("t", "x", "train"),
        ("v", "X", "validation"),
        ("s", "x ", "test"),
        ("u", "y", "train"),
        ("w", "y", "validation"),
    ]
    assert _leaks(data, *rows) == {
        "t": "leak: training copy of a test row",
        "v": "leak: validation copy of a test row",
        "s": None,
        "u": "leak: training copy of a validation row",
        "w": None,
    }


@pytest.mark.parametrize("held", ["test", "validation"])
def test_indirect_variants_of_held_out_rows_are_leaks(data: Data, held: str) -> None:
    """The original of a held-out variant, its siblings, and variants of variants are all of one family."""
    rows = [
        ("original", "0", "train", None),
        ("sibling", "1", "train", "original"),
        ("held", "2", held, "original"),
        ("grandchild", "3", "train", "held"),
        ("other", "4", "train", "elsewhere"),
        ("alone", "5", "train", None),
    ]
    leak = f"leak: training variant of a {held} row"
    assert _leaks(data, *rows) == {
        "original": leak,
        "sibling": leak,
        "held": None,
        "grandchild": leak,
        "other": None,
        "alone": None,
    }


def test_an_equal_id_alone_does_not_form_a_family(data: Data) -> None:
    """FinNF numbers the rows of every split from 1."""
    frame = cleaning.clean_texts(row_frame(("1", "x", "train"), ("1", "y", "test"), columns=("id", "text", "split")))
    assert fates(cleaning.mark_leaks(frame, data)[0]) == [None, None]


def test_ids_of_two_parts_of_a_mixture_are_different(data: Data) -> None:
    rows = [
        ("t", "x", "train", "1", None, "news"),
        ("1", "y", "test", None, None, "forum"),
        ("s", "z", "train", "1", None, "forum"),
    ]
    assert _leaks(data, *rows) == {"t": None, "1": None, "s": "leak: training variant of a test row"}


def test_a_group_split_across_files_is_a_leak(data: Data) -> None:
    rows = [
        ("t", "x", "train", None, "A"),
        ("s", "y", "test", None, "A"),
        ("u", "z", "train", None, "B"),
        ("n", "w", "train", None, None),
    ]
    assert _leaks(data, *rows) == {"t": "leak: training row of a test row's group", "s": None, "u": None, "n": None}


def test_leaks_by_policy(data: Data) -> None:
    rows = [("t", "x", "train"), ("s", "x", "test")]
    frame = cleaning.clean_texts(row_frame(*rows, columns=("id", "text", "split")))
    kept, notes = cleaning.mark_leaks(frame, data.model_copy(update={"on_leak": "keep"}))
    assert fates(kept) == [None, None]
    assert notes == ["1 row is a training copy of a test row; kept, because data.on_leak=keep"]
    with pytest.raises(
        DataError, match=r"data\.on_leak: 1 row is a training copy of a test row\. Set data\.on_leak=drop"
    ):
        cleaning.mark_leaks(frame, data.model_copy(update={"on_leak": "error"}))


# ------------------------------------------------------------------------------------------------ mixtures


def _parts(counts: dict[str, int]) -> pl.DataFrame:
    rows = [(f"{part}{n}", part, "train") for part, count in counts.items() for n in range(count)]
    rows += [(f"{part} test", part, "test") for part in counts]
    return row_frame(*rows, columns=("text", "part", "split"))


def _kept(frame: pl.DataFrame, split: str) -> dict[str, int]:
    used = frame.filter(cleaning.OPEN & (pl.col("split") == split))
    return dict(used.group_by("part").len().iter_rows())


@settings(deadline=None)
@given(
    counts=st.fixed_dictionaries({"x": st.integers(1, 60), "y": st.integers(1, 60), "z": st.integers(1, 60)}),
    ratios=st.fixed_dictionaries({"x": st.integers(1, 5), "y": st.integers(1, 5), "z": st.integers(1, 5)}),
)
def test_ratios_hold_in_training_and_the_scarcest_part_is_used_completely(
    config: Configure, counts: dict[str, int], ratios: dict[str, int]
) -> None:
    settings = config("data=table").data.model_copy(update={"ratios": ratios})
    frame = cleaning.mix(_parts(counts), settings)
    scarcest = min(counts, key=lambda part: counts[part] / ratios[part])
    kept = _kept(frame, "train")
    for part in counts:
        assert kept.get(part, 0) == counts[scarcest] * ratios[part] // ratios[scarcest]
    assert kept[scarcest] == counts[scarcest]
    assert _kept(frame, "test") == dict.fromkeys(counts, 1)
    assert cleaning.mix(_parts(counts), settings).equals(frame)


def test_part_without_training_rows_is_reported(data: Data) -> None:
    ratios = data.model_copy(update={"ratios": {"x": 1.0, "y": 1.0}})
    with pytest.raises(DataError, match=r"data\.ratios: part y has no training row"):
        cleaning.mix(_parts({"x": 3, "y": 0}), ratios)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=4), most=st.integers(1, 60))
def test_a_limited_split_keeps_the_proportions_of_its_classes(config: Configure, counts: list[int], most: int) -> None:
    limit = config("data=table").data
    rows_kept = SplitRows(train=most, validation=None, test=None, seed=None)
    limit = limit.model_copy(update={"split": limit.split.model_copy(update={"rows": rows_kept})})
    rows = [(f"{label} {n}", f"label {label}", "train") for label, count in enumerate(counts) for n in range(count)]
    frame = row_frame(*rows, ("held", "label 0", "test"), columns=("text", "label", "split"))
    limited = cleaning.limit_splits(frame, limit)
    used = limited.filter(cleaning.OPEN & (pl.col("split") == "train"))
    kept = dict(used.group_by("label").len().iter_rows())
    assert used.height == min(most, sum(counts))
    for label, count in enumerate(counts):
        assert abs(kept.get(f"label {label}", 0) - count * min(1, most / sum(counts))) < 1
    assert limited.filter(pl.col("split") == "test")[FATE].null_count() == 1
    fates = limited[FATE].drop_nulls().unique().to_list()
    assert fates == ([] if most >= sum(counts) else [f"filtered: data.split.rows.train={most}"])
    assert cleaning.limit_splits(frame, limit).equals(limited)
