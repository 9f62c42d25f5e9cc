"""Class order is fixed once: as configured, or sorted; spellings of one class are one class."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_frames import fates, row_frame

from finsa.config import Data, RunConfig
from finsa.data import labels
from finsa.data.cleaning import clean_texts
from finsa.data.labels import LabelSpace
from finsa.data.readers import FATE
from finsa.errors import DataError

Configure = Callable[..., RunConfig]
ABC = LabelSpace(("a", "b", "c"), ("a", "b", "c"))


@pytest.fixture
def data(config: Configure) -> Data:
    """The plain table's settings; unknown labels are dropped."""
    return config("data=table").data.model_copy(update={"on_unknown_label": "drop"})


def test_labels_found_are_sorted_and_distinct(config: Configure) -> None:
    found = LabelSpace.of(config("data=table").data, iter(["b", "c", "a", "b"]))
    assert found == ABC
    assert len(found) == 3


def test_configured_order_is_kept(config: Configure) -> None:
    data = config("data=table", "data.labels=[positive,negative,neutral]").data
    assert LabelSpace.of(data, ["neutral"]) == LabelSpace(
        ("positive", "negative", "neutral"), ("positive", "negative", "neutral")
    )


def test_map_gives_names_and_words(config: Configure) -> None:
    data = config("data=table", "data.labels={2: '看涨', 0: '看跌'}").data
    assert LabelSpace.of(data, ["0", "1"]) == LabelSpace(("2", "0"), ("看涨", "看跌"))


def test_sample_has_the_published_order(config: Configure) -> None:
    assert LabelSpace.of(config().data, []).names == ("利空", "中性", "利好")


@pytest.mark.parametrize(
    ("written", "name"), [("a", "a"), (" a\n", "a"), ("A", "a"), ("ａ", "a"), (" Ａ ", "a"), ("d", "d"), (" d ", "d")]
)
def test_spelling(written: str, name: str) -> None:
    respelled, notes = labels.respell(pl.Series("label", [written, None]), ABC.names)
    assert respelled.to_list() == [name, None]
    changed = name in ABC.names and written != name
    assert notes == [f"label '{written}' (1 row) is read as '{name}'"] * changed


def test_classes_that_differ_in_case_are_written_exactly() -> None:
    respelled, _ = labels.respell(pl.Series("label", ["Up", "up", " up ", "UP"]), ("up", "Up"))
    assert respelled.to_list() == ["Up", "up", "up", "UP"]


def test_many_spellings_are_summarized() -> None:
    spellings = [" " * n + "a" for n in range(1, 9)]
    respelled, notes = labels.respell(pl.Series("label", spellings), ABC.names)
    assert respelled.to_list() == ["a"] * 8
    assert len(notes) == 6
    assert notes[-1] == "3 more spellings of labels are read as another"


@settings(deadline=None)
@given(written=st.lists(st.none() | st.text(max_size=4) | st.sampled_from(["a", " A", "b", "Ｂ"]), max_size=10))
def test_spelling_is_idempotent(written: list[str | None]) -> None:
    once, notes = labels.respell(pl.Series("label", written, dtype=pl.String), ABC.names)
    again, none = labels.respell(once, ABC.names)
    assert again.equals(once, null_equal=True)
    assert none == []
    changed = sum(old != new and new in ABC.names for old, new in zip(written, once, strict=True))
    assert bool(notes) == (changed > 0)
    assert [label is None for label in written] == once.is_null().to_list()


def test_found_spellings_of_one_class_are_one_class(data: Data) -> None:
    written = ["Positive", "positive", "positive", "POSITIVE ", "negative"]
    frame = clean_texts(row_frame(*((str(number), label) for number, label in enumerate(written))))
    space = labels.find_labels(frame, data)
    assert space.names == ("negative", "positive")
    assert labels.mark_unknown(frame, data, space)[0]["label"].to_list() == ["positive"] * 4 + ["negative"]


def test_labels_are_those_of_the_training_split(data: Data) -> None:
    frame = row_frame(("x", "a", "train"), ("y", "b", "train"), ("z", "c", "test"), columns=("text", "label", "split"))
    assert labels.find_labels(frame, data).names == ("a", "b")
    assert labels.find_labels(frame.with_columns(split=pl.lit(None, pl.String)), data).names == ("a", "b", "c")


def test_labels_of_unused_rows_do_not_count(data: Data) -> None:
    frame = row_frame(("x", "a"), ("y", "b"), ("", "c"))
    assert labels.find_labels(clean_texts(frame), data).names == ("a", "b")


def test_too_few_labels_are_reported_unless_it_is_a_part(data: Data) -> None:
    frame = row_frame(("x", "a"))
    assert labels.find_labels(frame, data, 0).names == ("a",)
    with pytest.raises(DataError, match=r"at least two labels are needed, found \['a'\] in data=table\. Name another"):
        labels.find_labels(frame, data)


def test_too_many_labels_are_reported_also_if_all_are_kept(data: Data) -> None:
    frame = row_frame(*((f"t{n}", f"label {n:02d}") for n in range(60)))
    with pytest.raises(
        DataError, match="column 'label' has 60 distinct values in 60 rows, .* that is not a label column"
    ):
        labels.find_labels(frame, data)
    listed = data.model_copy(update={"labels": tuple(f"label {n:02d}" for n in range(60))})
    assert len(labels.find_labels(frame, listed)) == 60
    listed = data.model_copy(update={"labels": ("label 00", "label 01"), "on_unknown_label": "keep"})
    with pytest.raises(DataError, match="column 'label' has 58 distinct values in 58 rows"):
        labels.with_unlisted(labels.find_labels(frame, listed), frame, listed)


def test_unknown_labels_by_policy(data: Data) -> None:
    frame = row_frame(("x", "a"), ("y", "strange"), ("z", None), ("w", "Strange "), ("v", ""))
    dropped, _ = labels.mark_unknown(frame, data, ABC)
    assert fates(dropped) == [None, *["unknown label"] * 4]
    keep = data.model_copy(update={"on_unknown_label": "keep"})
    kept, notes = labels.mark_unknown(frame, keep, ABC)
    assert fates(kept) == [None, None, "unknown label", None, "unknown label"], "no label at all is no class"
    assert len(notes) == 1
    assert "2 rows have an unknown label" in notes[0]
    assert labels.with_unlisted(ABC, kept, keep).names == ("a", "b", "c", "Strange", "strange")
    assert labels.with_unlisted(ABC, dropped, data) == ABC
    with pytest.raises(
        DataError, match=r"data\.on_unknown_label: 4 rows have an unknown label: .*'\(none\)' \(1 row\)"
    ):
        labels.mark_unknown(frame, data.model_copy(update={"on_unknown_label": "error"}), ABC)


def test_labels_that_are_kept_keep_the_task_and_the_answers(data: Data) -> None:
    frame = pl.DataFrame({"label": ["a", "c"], FATE: [None, None]}, schema_overrides={FATE: pl.String})
    space = LabelSpace(("a", "b"), ("A", "B"), "ordinal", ("{label}: yes", "{label}: no"))
    kept = labels.with_unlisted(space, frame, data.model_copy(update={"on_unknown_label": "keep"}))
    assert kept == LabelSpace(("a", "b", "c"), ("A", "B", "c"), "ordinal", ("{label}: yes", "{label}: no"))
