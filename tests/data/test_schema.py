"""Columns are mapped by name; options, label maps and templates become plain text and label; corrections are noted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import Data, RunConfig
from finsa.data.readers import FATE, Raw, columnar, read
from finsa.data.schema import shape
from finsa.errors import DataError

Configure = Callable[..., RunConfig]
SHAPE = ["id", "text", "target", "label", "rejected", "domain", "parent", "group", "rationale", "time"]
SHAPE += ["_line", "_fate", "fixed"]


@pytest.fixture
def data(config: Configure) -> Data:
    """The plain table's settings."""
    return config("data=table").data


def _columns(data: Data, **changes: object) -> Data:
    return data.model_copy(update={"columns": data.columns.model_copy(update=changes)})


def _raw(**columns: list[Any]) -> Raw:
    return columnar(pl.DataFrame(columns))


def _read(folder: Path, name: str, content: str) -> Raw:
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return read(file)


def _pairs(frame: pl.DataFrame) -> list[tuple[str | None, ...]]:
    return frame.select("text", "label").rows()


# ------------------------------------------------------------------------------------------------ columns


def test_columns_are_mapped_and_others_omitted(data: Data) -> None:
    raw = _raw(
        nr=["1"],
        body=["x"],
        y=["a"],
        src=["web"],
        orig=["0"],
        firm=["f"],
        about=["t"],
        why=["r"],
        at=["2024"],
        extra=["!"],
    )
    named = _columns(data, id="nr", text="body", target="about", label="y", domain="src", parent="orig", group="firm")
    named = _columns(named, rationale="why", time="at")
    frame = shape(raw, named, "t.csv", "t")
    assert frame.columns == SHAPE
    assert frame.row(0) == ("1", "x", "t", "a", None, "web", "0", "f", "r", "2024", 1, None, 0)


def test_text_column_may_be_the_label_column_of_another_task(data: Data) -> None:
    raw = _raw(label=["x"], text=["a"])
    assert _pairs(shape(raw, _columns(data, text="label", label="text"), "t.csv", "t")) == [("x", "a")]


@pytest.mark.parametrize("stem", ["posts", "{}", "a{b}", "{{"])
def test_missing_ids_are_numbered(data: Data, stem: str) -> None:
    raw = _raw(text=["x", "y"], label=["a", "b"])
    for named in (data, _columns(data, id=None)):
        assert shape(raw, named, "t.csv", stem)["id"].to_list() == [f"{stem}-1", f"{stem}-2"]


def test_unwanted_id_column_is_not_read(data: Data) -> None:
    raw = _raw(id=["q"], text=["x"], label=["a"])
    assert shape(raw, _columns(data, id=None), "t.csv", "t")["id"].to_list() == ["t-1"]


@pytest.mark.parametrize("blank", [None, "", " "])
def test_blank_cells_are_missing(data: Data, blank: str | None) -> None:
    """CSV has no missing cells: rows without a parent or a group must not become one large family."""
    raw = _raw(
        id=[blank, "q "], text=["x", "y"], label=["a", "b"], domain=[blank, " n"], parent=[blank] * 2, firm=[blank] * 2
    )
    frame = shape(raw, _columns(data, group="firm"), "t.csv", "t")
    assert frame.select("id", "domain", "parent", "group").rows() == [("t-1", None, None, None), ("q", "n", None, None)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ("Text", "label"),
            "data.columns.text: t.csv has no column 'text'; it has Text, label. Did you mean data.columns.text=Text?",
        ),
        (
            ("text", "lable"),
            "data.columns.label: t.csv has no column 'label'; it has text, lable. "
            "Did you mean data.columns.label=lable?",
        ),
        (("q", "z"), "data.columns.text: t.csv has no column 'text'; it has q, z. Set data.columns.text=<column>."),
    ],
)
def test_a_missing_column_is_reported_with_the_closest_name(data: Data, columns: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        shape(_raw(**{name: ["x"] for name in columns}), data, "t.csv", "t")
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["id", "domain", "parent", "group"])
def test_column_that_the_user_named_must_exist(data: Data, name: str) -> None:
    with pytest.raises(DataError, match=rf"data\.columns\.{name}: t\.csv has no column 'source'; it has text, label"):
        shape(_raw(text=["x"], label=["a"]), _columns(data, **{name: "source"}), "t.csv", "t")


@pytest.mark.parametrize(("values", "kind"), [([1, 2], "Int64"), ([0.5], "Float64"), ([["x"]], "lists or objects")])
def test_text_column_of_another_type_is_reported(data: Data, values: list[Any], kind: str) -> None:
    with pytest.raises(
        DataError, match=rf"data\.columns\.text: column 'text' of t\.csv contains {kind}, not text\. Name another"
    ):
        shape(_raw(text=values, label=["a"] * len(values)), data, "t.csv", "t")


def test_a_single_non_text_is_unreadable_and_a_whole_column_is_an_error(data: Data, tmp_path: Path) -> None:
    mixed = _read(tmp_path, "t.jsonl", '{"text": "x", "label": "a"}\n{"text": ["y"], "label": "b"}\n')
    frame = shape(mixed, data, "t.jsonl", "t")
    assert frame[FATE].to_list() == [None, "unreadable: the text is a list or object"]
    nested = _read(tmp_path, "n.json", '[{"text": {"a": 1}, "label": "a"}]')
    with pytest.raises(DataError, match="column 'text' of n.json contains lists or objects, not text"):
        shape(nested, data, "n.json", "n")


# ------------------------------------------------------------------------------------------------ labels


def test_a_label_map_keeps_unlisted_values(data: Data) -> None:
    mapped = data.model_copy(update={"label_map": {"0": "bearish", "1": "bullish"}})
    raw = _raw(text=["x"] * 5, label=[0, 1, 2, None, 1])
    assert shape(raw, mapped, "t.csv", "t")["label"].to_list() == ["bearish", "bullish", "2", None, "bullish"]


def test_a_label_map_ignores_spelling_variants_with_a_note(data: Data) -> None:
    mapped = data.model_copy(update={"label_map": {"mildly positive": "positive"}, "labels": ("positive", "negative")})
    raw = _raw(text=["x"] * 4, label=["mildly positive", " Mildly  Positive", "ＭILDLY positive", "positive"])
    assert shape(raw, mapped, "/d/t.csv", "t")["label"].to_list() == ["positive"] * 4
    assert sorted(raw.notes) == [
        "t.csv: label ' Mildly  Positive' (1 row) is read as 'mildly positive'",
        "t.csv: label 'ＭILDLY positive' (1 row) is read as 'mildly positive'",
    ]


@pytest.mark.parametrize(
    "written", [["-1.0", "0.0", "1.0"], [-1, 0, 1], [-1.0, 0.0, 1.0], ["−1", " 0 ", "+1"], ["-1e0", "0", "１"]]
)
def test_label_map_takes_numbers_by_value(data: Data, written: list[Any]) -> None:
    mapped = data.model_copy(update={"label_map": {"-1": "利空", "0": "中性", "1": "利好"}})
    raw = _raw(text=["x"] * 3, label=written)
    assert shape(raw, mapped, "t.csv", "t")["label"].to_list() == ["利空", "中性", "利好"]
    assert raw.mapped == {"-1", "0", "1"}


def test_a_label_map_does_not_change_existing_classes(data: Data) -> None:
    """'a' is a class and, but for its case, a value of the map: the class wins."""
    mapped = data.model_copy(update={"label_map": {"A": "first"}, "labels": ("a", "first")})
    raw = _raw(text=["x"] * 3, label=["A", "a", " a "])
    assert shape(raw, mapped, "t.csv", "t")["label"].to_list() == ["first", "a", "a"]


def test_an_option_is_looked_up_in_its_row(data: Data) -> None:
    chosen = data.model_copy(update={"options": ("A", "B")})
    raw = _raw(
        text=["x"] * 7,
        label=["A", "A", "b", " B", "C", None, "Ａ"],
        A=["p", " q ", "p", "p", "p", "p", "p"],
        B=["q", "p", "q", "q", "q", "q", "q"],
    )
    assert shape(raw, chosen, "t.csv", "t")["label"].to_list() == ["p", "q", "q", "q", "C", None, "p"]
    assert len(raw.notes) == 3, "b, ' B' and the wide A were mended, and that is said"


@pytest.mark.parametrize("cell", ["null", '""'])
def test_option_without_a_text_gives_no_class(data: Data, tmp_path: Path, cell: str) -> None:
    raw = _read(tmp_path, "t.jsonl", f'{{"text": "x", "label": "A", "A": {cell}, "B": "p"}}')
    (label,) = shape(raw, data.model_copy(update={"options": ("A", "B")}), "t", "t")["label"]
    assert label == ("A" if cell == "null" else ""), "neither is a class: the row is an unknown label"


def test_missing_option_column_is_reported(data: Data) -> None:
    chosen = data.model_copy(update={"options": ("A", "B")})
    with pytest.raises(DataError, match=r"t\.csv has no field 'B', which data\.options needs; it has text, label, A"):
        shape(_raw(text=["x"], label=["A"], A=["p"]), chosen, "t.csv", "t")


# ------------------------------------------------------------------------------------------------ text templates


def test_the_text_is_extracted_from_its_template(data: Data) -> None:
    """With all features of Python's regular expressions, including look-around."""
    taken = data.model_copy(update={"extract": r"(?<=问句[:：])\s*(\S[^\n]*)(?=\n)"})
    raw = _raw(text=["说明\n问句：涨吗\n答", "问句: 跌吗\n", "没有", None, " "], label=["a"] * 5)
    frame = shape(raw, taken, "t.csv", "t")
    assert frame["text"].to_list() == ["涨吗", "跌吗", "没有", None, " "]
    assert frame[FATE].to_list() == [None, None, "unreadable: data.extract finds nothing", None, None]


def test_an_unmatched_group_extracts_nothing(data: Data) -> None:
    frame = shape(_raw(text=["xy", "x"], label=["a", "b"]), data.model_copy(update={"extract": "x(y)?"}), "t.csv", "t")
    assert frame["text"].to_list() == ["y", "x"]
    assert frame[FATE].is_null().to_list() == [True, False]


@settings(deadline=None)
@given(text=st.text(max_size=20))
def test_extracting_everything_changes_nothing(config: Configure, text: str) -> None:
    plain = config("data=table").data
    raw = _raw(text=[text], label=["a"])
    everything = shape(raw, plain.model_copy(update={"extract": "(.*)"}), "t.csv", "t")
    assert everything.equals(shape(raw, plain, "t.csv", "t"))


def test_alpaca(config: Configure) -> None:
    raw = _raw(
        instruction=["判断", "判断", None, "判断"], input=["  涨 ", None, "跌", ""], output=["a", "b", "a", None]
    )
    frame = shape(raw, config("data=alpaca").data, "t.json", "t")
    assert _pairs(frame) == [("判断\n涨", "a"), ("判断", "b"), ("跌", "a"), ("判断", None)]
    assert frame["fixed"].to_list() == [3, 0, 0, 0], "an instruction without an input is the text"
    without = shape(_raw(instruction=["判断"], output=["a"]), config("data=alpaca").data, "t.json", "t")
    assert _pairs(without) == [("判断", "a")]


def test_alpaca_needs_its_fields(config: Configure) -> None:
    with pytest.raises(
        DataError, match=r"t\.json has no field 'output', which data\.source=alpaca needs; it has instruction, answer"
    ):
        shape(_raw(instruction=["x"], answer=["a"]), config("data=alpaca").data, "t.json", "t")


def test_alpaca_instruction_that_is_a_list_is_unreadable(config: Configure, tmp_path: Path) -> None:
    rows = '{"instruction": "x", "output": "a"}\n{"instruction": "y", "input": ["z"], "output": "a"}\n'
    frame = shape(_read(tmp_path, "t.jsonl", rows), config("data=alpaca").data, "t.jsonl", "t")
    assert frame[FATE].to_list() == [None, "unreadable: the text is a list or object"]


OPENAI = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "a"}]
LONGER = [*OPENAI, {"role": "user", "content": "y"}, {"role": "assistant", "content": "b"}]
TOOL = [*LONGER[:-1], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
TOOL += [{"role": "tool", "content": "3"}, LONGER[-1]]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}, SHAREGPT[1]]
IMAGE = [
    {"role": "user", "content": [{"type": "image_url", "image_url": "u"}, {"type": "text", "text": "x"}]},
    OPENAI[2],
]


@pytest.mark.parametrize(
    ("name", "chat", "text", "last", "label"),
    [
        ("messages", OPENAI, "system: s\nuser: x", "x", "a"),
        ("messages", OPENAI[1:], "x", "x", "a"),
        ("conversations", SHAREGPT, "x", "x", "a"),
        ("messages", LONGER, "system: s\nuser: x\nassistant: a\nuser: y", "y", "b"),
        (
            "messages",
            TOOL,
            'system: s\nuser: x\nassistant: a\nuser: y\nassistant: [{"name": "f"}]\ntool: 3',
            "3",
            "b",
        ),
        ("messages", PARTS, "xy", "xy", "a"),
    ],
)
def test_a_chat_is_read_whole_in_its_roles(
    config: Configure, name: str, chat: list[dict[str, Any]], text: str, last: str, label: str
) -> None:
    raw = _raw(**{name: [json.dumps(chat)]})
    frame = shape(raw, config("data=messages").data, "t", "t")
    assert (_pairs(frame), frame[FATE].to_list()) == ([(text, label)], [None])
    assert (text[frame["fixed"][0] :], raw.notes) == (last, [])


def test_last_turn_of_a_chat_by_choice_and_the_rest_is_counted(config: Configure) -> None:
    raw = _raw(messages=[json.dumps(chat) for chat in (LONGER, OPENAI, OPENAI[1:])])
    frame = shape(raw, config("data=messages", "data.turns=last").data, "d/t.json", "t")
    assert (_pairs(frame), frame["fixed"].to_list()) == ([("y", "b"), ("x", "a"), ("x", "a")], [0, 0, 0])
    assert raw.notes == ["t.json: not read: system turns of 2 rows, earlier turns of 1 row (data.turns=last)"]


@pytest.mark.parametrize(
    ("chat", "fate"),
    [
        (LONGER[:-1], "the last turn is not an answer, and there is no label"),
        (SHAREGPT[1:], "no user turn"),
        ([], "not a list of turns"),
        (None, "not a list of turns"),
        ("hello", "not a list of turns"),
        ({"role": "user"}, "not a list of turns"),
        ([3], "not a list of turns"),
        ([{"role": "user", "content": [1]}, OPENAI[2]], "a turn has a part of type 'int', which is not text"),
        (IMAGE, "a turn has a part of type 'image_url', which is not text"),
        ([{"role": "user", "content": None}, OPENAI[2]], "a turn has no text"),
        ([{"content": "x"}, OPENAI[2]], "a turn has no role"),
    ],
)
def test_chat_that_cannot_be_read_is_reported_and_counted(config: Configure, chat: object, fate: str) -> None:
    frame = shape(_raw(messages=[json.dumps(chat)]), config("data=messages").data, "t", "t")
    assert frame[FATE].to_list() == [f"unreadable: {fate}"]


def test_a_label_column_next_to_a_chat_as_in_ms_swift(config: Configure, tmp_path: Path) -> None:
    """The label of a chat without an answer; an answer in the last turn is the label, and the field is noted."""
    rows = [
        {"messages": OPENAI[1:2], "label": 1},
        {"messages": OPENAI[1:2], "label": [1, 2]},
        {"messages": OPENAI[1:], "label": True, "tools": [{"name": "f"}]},
        {"messages": OPENAI[1:], "images": ["a.png"]},
    ]
    raw = _read(tmp_path, "t.json", json.dumps(rows))
    frame = shape(raw, config("data=messages").data, "t.json", "t")
    assert frame["label"].to_list() == ["1", None, "a", None]
    unanswered = "unreadable: the last turn is not an answer, and there is no label"
    media = "unreadable: images, video or audio belong to the row"
    assert frame[FATE].to_list() == [None, unanswered, None, media]
    assert raw.notes == [
        "t.json: not read: the field 'label' (the last turn is the label) of 1 row, the field 'tools' of 1 row"
    ]


def test_system_and_history_of_an_instruction_row_are_read(config: Configure, tmp_path: Path) -> None:
    row = {"instruction": "判断", "input": "涨", "output": "a", "system": "空头", "history": [["你好", "好"]]}
    rows = [row, {**row, "history": [], "system": None}, {**row, "history": [["x"]]}]
    raw = _read(tmp_path, "t.json", json.dumps(rows))
    frame = shape(raw, config("data=alpaca").data, "t.json", "t")
    text = "system: 空头\nuser: 你好\nassistant: 好\nuser: 判断\n涨"
    assert _pairs(frame) == [(text, "a"), ("判断\n涨", "a"), (None, None)]
    assert frame["fixed"].to_list() == [len(text) - 1, 3, 0]
    assert frame[FATE].to_list() == [None, None, "unreadable: history is not a list of [question, answer]"]
    last = shape(raw, config("data=alpaca", "data.turns=last").data, "t.json", "t")
    assert _pairs(last)[0] == ("判断\n涨", "a")
    assert raw.notes[-1] == "t.json: not read: system turns of 1 row, earlier turns of 1 row (data.turns=last)"


def test_a_text_extracted_from_its_template_may_be_truncated(config: Configure) -> None:
    chosen = config("data=alpaca").data.model_copy(update={"extract": "问：(.*)"})
    frame = shape(_raw(instruction=["判断"], input=["问：涨吗"], output=["a"]), chosen, "t.json", "t")
    assert frame.select("text", "fixed").row(0) == ("涨吗", 0)


def test_empty_turns_are_empty_and_not_unreadable(config: Configure) -> None:
    chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    frame = shape(_raw(messages=[chat]), config("data=messages").data, "t", "t")
    assert (_pairs(frame), frame[FATE].to_list()) == ([("", "")], [None])


@pytest.mark.parametrize(
    ("words", "columns", "message"),
    [
        ("data=table", {"messages": ["x"]}, "These are chats, which data=messages data.files=<files> reads"),
        ("data=table", {"instruction": ["x"], "output": ["a"]}, "These are instruction rows, which data=alpaca"),
        ("data=alpaca", {"conversations": ["x"]}, "These are chats, which data=messages"),
        ("data=messages", {"instruction": ["x"], "output": ["a"]}, "These are instruction rows, which data=alpaca"),
    ],
)
def test_rows_of_another_format_are_reported_with_the_choice_that_reads_them(
    config: Configure, words: str, columns: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        shape(_raw(**columns), config(words).data, "t", "t")


def test_chats_may_be_in_a_column_of_any_name(config: Configure) -> None:
    named = _columns(config("data=messages").data, text="dialog")
    assert _pairs(shape(_raw(dialog=[json.dumps(SHAREGPT)]), named, "t", "t")) == [("x", "a")]


def test_messages_need_their_field(config: Configure) -> None:
    with pytest.raises(DataError, match="has no field 'messages', which data.source=messages needs; it has chat"):
        shape(_raw(chat=["x"]), config("data=messages").data, "t", "t")
