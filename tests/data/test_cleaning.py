"""Every row gets at most one fate; policies hold in every place: error tells, drop counts, keep keeps and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import Data, RunConfig, SplitRows
from finsa.data import cleaning
from finsa.data.labels import LabelSpace
from finsa.data.readers import FATE, LINE
from finsa.data.sources import Rows
from finsa.errors import DataError

Configure = Callable[..., RunConfig]
ABC = LabelSpace(("a", "b", "c"), ("a", "b", "c"))
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


def _frame(*rows: tuple[str | None, ...], columns: tuple[str, ...] = ("text", "label"), **more: Any) -> pl.DataFrame:
    schema = dict.fromkeys(columns, pl.String())
    numbered = pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.lit("/d/t.csv").alias("file"),
        pl.int_range(2, pl.len() + 2).alias(LINE),
        *(pl.lit(value).alias(name) for name, value in more.items()),
    )
    if "id" not in columns:
        numbered = numbered.with_columns(pl.int_range(pl.len()).cast(pl.String).alias("id"))
    return Rows(numbered, set()).frame


def _fates(frame: pl.DataFrame) -> list[str | None]:
    return frame[FATE].to_list()


def _keyed(frame: pl.DataFrame) -> pl.DataFrame:
    return cleaning.texts(frame)


# ------------------------------------------------------------------------------------------------ fates


def test_first_fate_stays() -> None:
    frame = cleaning.mark(_frame(("x", "a"), ("y", "a")), pl.col("text") == "x", "first")
    assert _fates(cleaning.mark(frame, pl.lit(True), "second")) == ["first", "second"]


def test_unknown_condition_is_not_met() -> None:
    assert _fates(cleaning.mark(_frame((None, "a")), pl.col("text") == "x", "first")) == [None]


def test_policies_on_the_same_rows() -> None:
    frame, met = _frame(("x", "a"), ("y", None)), pl.col("text") == "y"
    assert _fates(cleaning.decide(frame, met, "drop", "data.on_x", "gone", "are y")[0]) == [None, "gone"]
    kept, notes = cleaning.decide(frame, met, "keep", "data.on_x", "gone", "are y")
    assert _fates(kept) == [None, None]
    assert notes == ["1 rows are y; kept, because data.on_x=keep"]
    with pytest.raises(DataError) as caught:
        cleaning.decide(frame, met, "error", "data.on_x", "gone", "are y", " Look again.")
    assert str(caught.value) == (
        "data.on_x: 1 rows are y. Look again. Set data.on_x=drop (counted) or data.on_x=keep"
        "\n  /d/t.csv:3: y [no label]"
    )


@pytest.mark.parametrize("policy", ["error", "drop", "keep"])
def test_nothing_met_is_nothing_said(policy: Any) -> None:
    frame = _frame(("x", "a"))
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
    assert _fates(cleaning.texts(_frame((text, "a")))) == [fate]


def test_white_space_around_a_text_goes() -> None:
    assert cleaning.texts(_frame(("\u3000x y\n", "a")))["text"].to_list() == ["x y"]


def test_other_domains_are_filtered(data: Data) -> None:
    frame = _frame(("x", "a", "news"), ("y", "a", "forum"), ("z", "a", None), columns=("text", "label", "domain"))
    news = data.model_copy(update={"domain": "news"})
    assert _fates(cleaning.of_domain(frame, news)) == [None, *["filtered: not of domain news"] * 2]
    with pytest.raises(DataError, match=r"data\.domain: no row is of domain 'nwes'\. Did you mean 'news'\?"):
        cleaning.of_domain(frame, data.model_copy(update={"domain": "nwes"}))


def test_table_without_domains_is_of_the_domain(data: Data) -> None:
    assert _fates(cleaning.of_domain(_frame(("x", "a")), data.model_copy(update={"domain": "news"}))) == [None]


def test_rows_of_one_file_with_one_id_are_noted() -> None:
    rows = [("1", "/d/a.csv"), ("1", "/d/b.csv"), ("2", "/d/a.csv"), ("1", "/d/a.csv"), ("1", "/d/a.csv")]
    frame = Rows(pl.DataFrame(rows, schema=["id", "file"], orient="row"), set()).frame
    assert cleaning.doubled_ids(frame) == ["3 rows share their id with another row of their file, such as '1'"]
    assert cleaning.doubled_ids(frame[:3]) == []


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("written", "name"), [("a", "a"), (" a\n", "a"), ("A", "a"), ("ａ", "a"), (" Ａ ", "a"), ("d", "d"), (" d ", "d")]
)
def test_spelling(written: str, name: str) -> None:
    labels, notes = cleaning.spelt(pl.Series("label", [written, None]), ABC.names)
    assert labels.to_list() == [name, None]
    mended = name in ABC.names and written != name
    assert notes == [f"label '{written}' (1 rows) is read as '{name}'"] * mended


def test_classes_that_differ_in_case_are_written_exactly() -> None:
    labels, _ = cleaning.spelt(pl.Series("label", ["Up", "up", " up ", "UP"]), ("up", "Up"))
    assert labels.to_list() == ["Up", "up", "up", "UP"]


def test_many_spellings_are_told_in_short() -> None:
    spellings = [" " * n + "a" for n in range(1, 9)]
    labels, notes = cleaning.spelt(pl.Series("label", spellings), ABC.names)
    assert labels.to_list() == ["a"] * 8
    assert len(notes) == 6
    assert notes[-1] == "3 more spellings of labels are read as another"


@settings(deadline=None)
@given(labels=st.lists(st.none() | st.text(max_size=4) | st.sampled_from(["a", " A", "b", "Ｂ"]), max_size=10))
def test_spelling_again_changes_nothing(labels: list[str | None]) -> None:
    once, notes = cleaning.spelt(pl.Series("label", labels, dtype=pl.String), ABC.names)
    again, none = cleaning.spelt(once, ABC.names)
    assert again.equals(once, null_equal=True)
    assert none == []
    changed = sum(old != new and new in ABC.names for old, new in zip(labels, once, strict=True))
    assert bool(notes) == (changed > 0)
    assert [label is None for label in labels] == once.is_null().to_list()


def test_found_spellings_of_one_class_are_one_class(data: Data) -> None:
    labels = ["Positive", "positive", "positive", "POSITIVE ", "negative"]
    frame = _keyed(_frame(*((str(number), label) for number, label in enumerate(labels))))
    space = cleaning.label_space(frame, data)
    assert space.names == ("negative", "positive")
    assert cleaning.classes(frame, data, space)[0]["label"].to_list() == ["positive"] * 4 + ["negative"]


def test_labels_are_those_of_the_training_split(data: Data) -> None:
    frame = _frame(("x", "a", "train"), ("y", "b", "train"), ("z", "c", "test"), columns=("text", "label", "split"))
    assert cleaning.label_space(frame, data).names == ("a", "b")
    assert cleaning.label_space(frame.with_columns(split=pl.lit(None, pl.String)), data).names == ("a", "b", "c")


def test_labels_of_rows_that_are_not_used_are_none(data: Data) -> None:
    frame = _frame(("x", "a"), ("y", "b"), ("", "c"))
    assert cleaning.label_space(_keyed(frame), data).names == ("a", "b")


def test_too_few_labels_are_told_unless_it_is_a_part(data: Data) -> None:
    frame = _frame(("x", "a"))
    assert cleaning.label_space(frame, data, 0).names == ("a",)
    with pytest.raises(DataError, match=r"at least two labels are needed, found \['a'\] in data=table\. Name another"):
        cleaning.label_space(frame, data)


def test_too_many_labels_are_told_also_where_all_are_kept(data: Data) -> None:
    frame = _frame(*((f"t{n}", f"label {n:02d}") for n in range(60)))
    with pytest.raises(DataError, match="column 'label' has 60 distinct values in 60 rows, .* that is no label column"):
        cleaning.label_space(frame, data)
    listed = data.model_copy(update={"labels": tuple(f"label {n:02d}" for n in range(60))})
    assert len(cleaning.label_space(frame, listed)) == 60
    listed = data.model_copy(update={"labels": ("label 00", "label 01"), "on_unknown_label": "keep"})
    with pytest.raises(DataError, match="column 'label' has 58 distinct values in 58 rows"):
        cleaning.widened(frame, cleaning.label_space(frame, listed), listed)


def test_unknown_labels_by_policy(data: Data) -> None:
    frame = _frame(("x", "a"), ("y", "strange"), ("z", None), ("w", "Strange "), ("v", ""))
    dropped, _ = cleaning.classes(frame, data, ABC)
    assert _fates(dropped) == [None, *["unknown label"] * 4]
    keep = data.model_copy(update={"on_unknown_label": "keep"})
    kept, notes = cleaning.classes(frame, keep, ABC)
    assert _fates(kept) == [None, None, "unknown label", None, "unknown label"], "no label at all is no class"
    assert len(notes) == 1
    assert "2 rows have an unknown label" in notes[0]
    assert cleaning.widened(kept, ABC, keep).names == ("a", "b", "c", "Strange", "strange")
    assert cleaning.widened(dropped, ABC, data) == ABC
    with pytest.raises(
        DataError, match=r"data\.on_unknown_label: 4 rows have an unknown label: .*'\(none\)' \(1 rows\)"
    ):
        cleaning.classes(frame, data.model_copy(update={"on_unknown_label": "error"}), ABC)


# ------------------------------------------------------------------------------------------------ copies


SAME = [("净利 润", "a"), ("净利润", "a"), ("NET up", "b"), ("ｎｅｔ　ＵＰ", "b"), ("x", "a"), ("x ", "b"), ("y", "c")]


def test_copies_by_policy(data: Data) -> None:
    frame = _keyed(_frame(*SAME))
    assert _fates(cleaning.copies(frame, data)[0]) == [
        None,
        "duplicate",
        None,
        "duplicate",
        "conflicting label",
        "conflicting label",
        None,
    ]
    keep = data.model_copy(update={"on_duplicate": "keep", "on_conflict": "keep"})
    kept, notes = cleaning.copies(frame, keep)
    assert _fates(kept) == [None] * 7
    assert notes == [
        "2 rows have the text of another row and a different label; kept, because data.on_conflict=keep",
        "2 rows have text and label of an earlier row; kept, because data.on_duplicate=keep",
    ]


@pytest.mark.parametrize(("policy", "count"), [("on_conflict", 2), ("on_duplicate", 2)])
def test_copies_can_stop_the_run(data: Data, policy: str, count: int) -> None:
    frame = _keyed(_frame(*SAME))
    with pytest.raises(DataError, match=rf"data\.{policy}: {count} rows have .*\n  /d/t\.csv:\d"):
        cleaning.copies(frame, data.model_copy(update={policy: "error"}))


def test_copies_are_looked_for_within_a_split(data: Data) -> None:
    frame = _frame(
        ("x", "a", "train"),
        ("x", "a", "test"),
        ("y", "a", "train"),
        ("y", "b", "test"),
        columns=("text", "label", "split"),
    )
    assert _fates(cleaning.copies(_keyed(frame), data)[0]) == [None] * 4


def test_copy_of_a_row_that_is_not_used_is_none(data: Data) -> None:
    frame = cleaning.mark(_frame(("x", "a"), ("x", "a"), ("x", "b")), pl.col("id") == "0", "gone")
    frame = cleaning.mark(frame, pl.col("id") == "2", "gone too")
    assert _fates(cleaning.copies(_keyed(frame), data)[0]) == ["gone", None, "gone too"]


# ------------------------------------------------------------------------------------------------ leaks


COLUMNS = ("id", "text", "split", "parent", "group", "part")


def _leaks(data: Data, *rows: tuple[str | None, ...]) -> dict[str, str | None]:
    frame = _keyed(_frame(*(row + (None,) * (6 - len(row)) for row in rows), columns=COLUMNS))
    return dict(cleaning.without_leaks(frame, data)[0].select("id", FATE).iter_rows())


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
def test_variants_of_held_out_rows_at_any_remove(data: Data, held: str) -> None:
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


def test_same_id_alone_makes_no_family(data: Data) -> None:
    """FinNF numbers the rows of every split from 1."""
    frame = _keyed(_frame(("1", "x", "train"), ("1", "y", "test"), columns=("id", "text", "split")))
    assert _fates(cleaning.without_leaks(frame, data)[0]) == [None, None]


def test_ids_of_two_parts_of_a_mixture_are_different(data: Data) -> None:
    rows = [
        ("t", "x", "train", "1", None, "news"),
        ("1", "y", "test", None, None, "forum"),
        ("s", "z", "train", "1", None, "forum"),
    ]
    assert _leaks(data, *rows) == {"t": None, "1": None, "s": "leak: training variant of a test row"}


def test_group_that_the_files_tear_apart_leaks(data: Data) -> None:
    rows = [
        ("t", "x", "train", None, "A"),
        ("s", "y", "test", None, "A"),
        ("u", "z", "train", None, "B"),
        ("n", "w", "train", None, None),
    ]
    assert _leaks(data, *rows) == {"t": "leak: training row of a test row's group", "s": None, "u": None, "n": None}


def test_leaks_by_policy(data: Data) -> None:
    rows = [("t", "x", "train"), ("s", "x", "test")]
    frame = _keyed(_frame(*rows, columns=("id", "text", "split")))
    kept, notes = cleaning.without_leaks(frame, data.model_copy(update={"on_leak": "keep"}))
    assert _fates(kept) == [None, None]
    assert notes == ["1 rows are a training copy of a test row; kept, because data.on_leak=keep"]
    with pytest.raises(
        DataError, match=r"data\.on_leak: 1 rows are a training copy of a test row\. Set data\.on_leak=drop"
    ):
        cleaning.without_leaks(frame, data.model_copy(update={"on_leak": "error"}))


# ------------------------------------------------------------------------------------------------ mixtures


def _parts(counts: dict[str, int]) -> pl.DataFrame:
    rows = [(f"{part}{n}", part, "train") for part, count in counts.items() for n in range(count)]
    rows += [(f"{part} test", part, "test") for part in counts]
    return _frame(*rows, columns=("text", "part", "split"))


def _kept(frame: pl.DataFrame, split: str) -> dict[str, int]:
    used = frame.filter(cleaning.OPEN & (pl.col("split") == split))
    return dict(used.group_by("part").len().iter_rows())


@settings(deadline=None)
@given(
    counts=st.fixed_dictionaries({"x": st.integers(1, 60), "y": st.integers(1, 60), "z": st.integers(1, 60)}),
    ratios=st.fixed_dictionaries({"x": st.integers(1, 5), "y": st.integers(1, 5), "z": st.integers(1, 5)}),
)
def test_ratios_hold_in_training_and_the_scarcest_part_is_whole(
    config: Configure, counts: dict[str, int], ratios: dict[str, int]
) -> None:
    settings = config("data=table").data.model_copy(update={"ratios": ratios})
    frame = cleaning.in_proportion(_parts(counts), settings)
    scarcest = min(counts, key=lambda part: counts[part] / ratios[part])
    kept = _kept(frame, "train")
    for part in counts:
        assert kept.get(part, 0) == counts[scarcest] * ratios[part] // ratios[scarcest]
    assert kept[scarcest] == counts[scarcest]
    assert _kept(frame, "test") == dict.fromkeys(counts, 1)
    assert cleaning.in_proportion(_parts(counts), settings).equals(frame)


def test_part_without_training_rows_is_told(data: Data) -> None:
    ratios = data.model_copy(update={"ratios": {"x": 1.0, "y": 1.0}})
    with pytest.raises(DataError, match=r"data\.ratios: part y has no training row"):
        cleaning.in_proportion(_parts({"x": 3, "y": 0}), ratios)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=4), most=st.integers(1, 60))
def test_a_limited_split_keeps_the_proportions_of_its_classes(config: Configure, counts: list[int], most: int) -> None:
    limit = config("data=table").data
    rows_kept = SplitRows(train=most, validation=None, test=None)
    limit = limit.model_copy(update={"split": limit.split.model_copy(update={"rows": rows_kept})})
    rows = [(f"{label} {n}", f"label {label}", "train") for label, count in enumerate(counts) for n in range(count)]
    frame = _frame(*rows, ("held", "label 0", "test"), columns=("text", "label", "split"))
    limited = cleaning.limited(frame, limit)
    used = limited.filter(cleaning.OPEN & (pl.col("split") == "train"))
    kept = dict(used.group_by("label").len().iter_rows())
    assert used.height == min(most, sum(counts))
    for label, count in enumerate(counts):
        assert abs(kept.get(f"label {label}", 0) - count * min(1, most / sum(counts))) < 1
    assert limited.filter(pl.col("split") == "test")[FATE].null_count() == 1
    fates = limited[FATE].drop_nulls().unique().to_list()
    assert fates == ([] if most >= sum(counts) else [f"filtered: data.split.rows.train={most}"])
    assert cleaning.limited(frame, limit).equals(limited)
