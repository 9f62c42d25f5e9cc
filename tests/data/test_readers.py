"""Every common table format gives the same rows; every line is a row, readable or not; nothing changes silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finsa.data import readers
from finsa.data.readers import FATE, LINE, READERS, Raw, as_text, read
from finsa.errors import DataError

LIGHT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
FRAME = pl.DataFrame(
    {
        "id": ["007", "b"],
        "text": ["净利润，同比\n增长“3%”", 'he said "no", twice\ttoday'],
        "label": ["利好", "利空"],
        "line": ["x", "y"],
        "fate": ["z", None],
    }
)


def _stream(file: Path) -> None:
    FRAME.write_ipc_stream(file)


def _workbook(file: Path, rows: list[list[Any]] | None = None, sheets: int = 1) -> Path:
    from openpyxl import Workbook

    book = Workbook()
    for row in rows if rows is not None else [FRAME.columns, *map(list, FRAME.iter_rows())]:
        book.active.append(row)
    for number in range(sheets - 1):
        book.create_sheet(f"more {number}")
    book.save(file)
    return file


WRITERS: dict[str, Callable[[Path], object]] = {
    ".csv": FRAME.write_csv,
    ".tsv": lambda file: FRAME.write_csv(file, separator="\t"),
    ".jsonl": FRAME.write_ndjson,
    ".json": FRAME.write_json,
    ".parquet": FRAME.write_parquet,
    ".arrow": FRAME.write_ipc,
    ".feather": _stream,
    ".xlsx": _workbook,
}


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return file


def _own(raw: Raw) -> pl.DataFrame:
    return raw.frame.select(raw.columns())


def _fates(raw: Raw) -> dict[int, str]:
    return dict(raw.frame.filter(pl.col(FATE).is_not_null()).select(LINE, FATE).iter_rows())


# ------------------------------------------------------------------------------------------------ all formats


def test_every_reader_is_covered() -> None:
    assert set(WRITERS) == set(READERS)


@pytest.mark.parametrize("suffix", WRITERS)
def test_format_round_trip(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"table{suffix}"
    WRITERS[suffix](file)
    raw = read(file)
    delimited = suffix in (".csv", ".tsv")  # which cannot tell empty from missing
    assert _own(raw).equals(FRAME.with_columns(pl.col("fate").fill_null("")) if delimited else FRAME)
    assert (raw.notes, _fates(raw)) == ([], {})
    assert read(file.rename(tmp_path / f"TABLE{suffix.upper()}")).frame.equals(raw.frame)


@pytest.mark.parametrize(
    ("suffix", "lines"),
    [
        (".csv", [2, 4]),
        (".tsv", [2, 4]),
        (".jsonl", [1, 2]),
        (".json", [1, 2]),
        (".parquet", [1, 2]),
        (".xlsx", [2, 3]),
    ],
)
def test_the_line_number_is_that_of_the_row_in_the_file(tmp_path: Path, suffix: str, lines: list[int]) -> None:
    file = tmp_path / f"table{suffix}"
    WRITERS[suffix](file)
    assert read(file).frame[LINE].to_list() == lines


@pytest.mark.parametrize("name", ["t.xls", "t.txt", "t"])
def test_an_unknown_format_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"is not read\. Choose from: \.arrow, \.csv, .*, \.tsv, \.xlsx\."):
        read(_file(tmp_path, name, "text,label\nx,a\n"))


@pytest.mark.parametrize("suffix", READERS)
def test_empty_file_is_reported(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.files: .*t{suffix} is empty$"):
        read(_file(tmp_path, f"t{suffix}", ""))


@pytest.mark.parametrize("suffix", [suffix for suffix in READERS if suffix not in (".csv", ".tsv")])
@pytest.mark.parametrize("content", [b"garbage", b"\x00\xff" * 300, b"PK\x03\x04garbage", b"ARROW1\x00\x00garbage"])
def test_garbage_is_reported_in_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = _file(tmp_path, f"t{suffix}", content)
    with pytest.raises(DataError) as caught:
        read(file)
    message = str(caught.value)
    assert message.startswith(f"data.files: {file} ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(("name", "content"), [("t.json", "[]"), ("t.jsonl", "\n \n"), ("t.json", "[{}, {}]")])
def test_file_without_rows_is_reported(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match=r"contains no row$"):
        read(_file(tmp_path, name, content))


def test_missing_file_and_folder_are_reported(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name in ("nowhere.csv", "folder.csv"):
        with pytest.raises(DataError, match=rf"^data\.files: .*{name} cannot be read: "):
            read(tmp_path / name)


# ------------------------------------------------------------------------------------------------ CSV


def test_digits_stay_text(tmp_path: Path) -> None:
    assert _own(read(_file(tmp_path, "t.csv", "id,text,n\n01,002,4.50\n"))).rows() == [("01", "002", "4.50")]


def test_ragged_rows_are_counted_with_their_lines(tmp_path: Path) -> None:
    raw = read(_file(tmp_path, "t.csv", 'text,label\nx,a\n"two\nlines",b\ny,b,c\nz\n\nw,a\n'))
    assert _fates(raw) == {5: "unreadable: more fields than the header", 6: "unreadable: fewer fields than the header"}
    assert raw.frame[LINE].to_list() == [2, 3, 5, 6, 8]
    assert raw.frame["text"].to_list() == ["x", "two\nlines", "y", "z", "w"]


def test_an_unclosed_quote_affects_one_row(tmp_path: Path) -> None:
    raw = read(_file(tmp_path, "t.csv", 'text,label\n"x,a\ny,b\nz,a\n'))
    assert _fates(raw) == {2: "unreadable: unexpected end of data"}
    assert raw.frame["text"].to_list() == ["", "y", "z"]


@pytest.mark.parametrize(
    "content", ["\ufefftext,label\nx,a\n", "text,label\r\nx,a\r\n", "text,label\nx,a", " text , label\nx,a"]
)
def test_byte_order_mark_line_ends_and_spaces_of_the_header(tmp_path: Path, content: str) -> None:
    assert _own(read(_file(tmp_path, "t.csv", content))).to_dicts() == [{"text": "x", "label": "a"}]


def test_table_without_rows(tmp_path: Path) -> None:
    raw = read(_file(tmp_path, "t.csv", "text,label\n"))
    assert (raw.frame.height, raw.columns()) == (0, ["text", "label"])


def test_a_duplicate_column_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the column 'text' more than once; rename one of them"):
        read(_file(tmp_path, "t.csv", "text,label,text \nx,a,y\n"))


def test_an_unnamed_column_is_named_by_its_position(tmp_path: Path) -> None:
    """A frame of pandas is often written with its index, in a column without a name."""
    assert read(_file(tmp_path, "t.csv", ",text,,label\n0,x,,a\n")).columns() == [
        "column 1",
        "text",
        "column 3",
        "label",
    ]


@pytest.mark.parametrize(("content", "line"), [('"text,label\nx,a\n', 1), ('\n"text"s,label\nx,a\n', 2), ("\n\n", 1)])
def test_header_that_cannot_be_read_is_not_replaced_by_a_row(tmp_path: Path, content: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"has no header in line {line} \("):
        read(_file(tmp_path, "t.csv", content))


def test_chunks_are_seamless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "text,label\n" + "".join(f"t{n},a{',b' * (n % 7 == 0)}\n" for n in range(25))
    files = [_file(tmp_path, "t.csv", content)]
    files.append(_file(tmp_path, "t.jsonl", "".join(json.dumps({f"k{n // 9}": n, "t": n}) + "\n" for n in range(25))))
    whole = [read(file).frame for file in files]
    monkeypatch.setattr(readers, "CHUNK", 4)
    for file, frame in zip(files, whole, strict=True):
        assert read(file).frame.select(frame.columns).equals(frame)


# ------------------------------------------------------------------------------------------------ JSON


def test_values_become_text_and_missing_ones_stay_missing(tmp_path: Path) -> None:
    lines = [
        '{"text": "x", "label": 1}',
        '{"label": "a", "text": null, "more": true}',
        '{"text": "", "more": [1, "涨"]}',
    ]
    for name, content in (("t.jsonl", "\n".join(lines)), ("t.json", f"[{','.join(lines)}]")):
        raw = read(_file(tmp_path, name, content))
        assert _own(raw).rows() == [("x", "1", None), (None, "a", "true"), ("", None, '[1, "涨"]')]
        assert raw.nested == {"more": [3]}


def test_broken_lines_are_counted_with_their_numbers(tmp_path: Path) -> None:
    lines = ['{"text": "x"}', "garbage", "", '{"text": "y"', '["x"]', "3", '{"text": "z"}', '{"text": 1, "text": 2}']
    raw = read(_file(tmp_path, "t.jsonl", "\n".join(lines)))
    assert _fates(raw) == {
        2: "unreadable: broken JSON",
        4: "unreadable: broken JSON",
        5: "unreadable: not a JSON object",
        6: "unreadable: not a JSON object",
        8: "unreadable: duplicate key",
    }
    assert raw.frame.filter(pl.col(FATE).is_null()).select("text", LINE).rows() == [("x", 1), ("z", 7)]


@pytest.mark.parametrize("inner", ['{"a": 1, "a": 2}', '[{"a": 1, "a": 2}]', '[[{"b": {"a": 1, "a": 2}}]]'])
def test_a_duplicate_key_is_found_at_any_depth(tmp_path: Path, inner: str) -> None:
    content = f'[{{"text": "x", "more": {inner}}}, {{"text": "y", "more": {{"a": 1, "b": 1}}}}]'
    assert _fates(read(_file(tmp_path, "t.json", content))) == {1: "unreadable: duplicate key"}


def test_only_broken_lines_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains no row \(unreadable: broken JSON\)"):
        read(_file(tmp_path, "t.jsonl", "garbage\nmore"))


def test_list_below_a_key(tmp_path: Path) -> None:
    raw = read(_file(tmp_path, "t.json", '{"version": 1, "data": [{"text": "x"}]}'))
    assert _own(raw).rows() == [("x",)]


@pytest.mark.parametrize("content", ['{"a": [1], "b": [2]}', '{"a": 1}', '"x"', '{"a": [{"t": 1}], "a": [{"t": 2}]}'])
def test_json_without_one_list_of_rows_is_reported(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"contains no list of rows, such as \[\{...\}, \{...\}\]"):
        read(_file(tmp_path, "t.json", content))


def test_json_lines_with_the_wrong_extension_are_reported_with_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one object a line it has to be called posts\.jsonl"):
        read(_file(tmp_path, "posts.json", '{"text": "x"}\n{"text": "y"}\n'))


def test_too_deep_nesting_is_reported(tmp_path: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    with pytest.raises(DataError, match="is nested too deeply"):
        read(_file(tmp_path, "t.json", deep))
    assert _fates(read(_file(tmp_path, "t.jsonl", f'{{"text": "x"}}\n{deep}'))) == {2: "unreadable: broken JSON"}


def test_a_lone_surrogate_is_a_damaged_character(tmp_path: Path) -> None:
    raw = read(
        _file(tmp_path, "t.jsonl", r'{"text": "涨\ud83d", "more": ["\udc4d"]}' + "\n" + r'{"text": "\ud83d\udc4d"}')
    )
    assert raw.frame["text"].to_list() == ["涨\ufffd", "👍"]
    assert raw.frame["more"].to_list() == ['["\ufffd"]', None]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(JSON)
def test_text_of_a_value_is_the_value(value: Any) -> None:
    text = as_text(value)
    if isinstance(value, str) or value is None:
        assert text == value
    else:
        assert json.loads(str(text)) == value


@LIGHT
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["text", "label", "x"]), JSON, min_size=1), min_size=1, max_size=6)
)
def test_json_and_json_lines_give_the_same_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    lines = read(_file(tmp_path, "t.jsonl", "\n".join(json.dumps(row) for row in rows)))
    whole = read(_file(tmp_path, "t.json", json.dumps(rows)))
    assert lines.frame.equals(whole.frame)
    assert lines.nested == whole.nested


# ------------------------------------------------------------------------------------------------ typed tables


def test_typed_columns_become_text_and_their_types_are_kept(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {"n": [1, None], "f": [0.5, 2.0], "b": [True, False], "l": [["x"], None], "y": [b"\xff", b"a"]}
    )
    table.write_parquet(tmp_path / "t.parquet")
    raw = read(tmp_path / "t.parquet")
    assert _own(raw).rows() == [("1", "0.5", "true", '["x"]', None), (None, "2.0", "false", None, None)]
    assert raw.kinds == {"n": "Int64", "f": "Float64", "b": "Boolean", "l": "lists or objects", "y": "Binary"}


def test_categories_are_text(tmp_path: Path) -> None:
    pl.DataFrame(
        {"c": pl.Series(["a"], dtype=pl.Categorical), "e": pl.Series(["a"], dtype=pl.Enum(["a"]))}
    ).write_parquet(tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet").kinds == {}


def test_data_set_that_the_datasets_library_saved(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert _own(read(file)).rows() == [("x", "0"), ("y", "1")]


# ------------------------------------------------------------------------------------------------ xlsx


def test_cells_of_a_sheet(tmp_path: Path) -> None:
    from datetime import date

    rows = [["text", "label", "more"], ["涨", 1, 2.5], [None, None, None], ["x", True, date(2024, 5, 1)], ["y"]]
    raw = read(_workbook(tmp_path / "t.xlsx", rows))
    assert _own(raw).rows() == [("涨", "1", "2.5"), ("x", "true", "2024-05-01 00:00:00"), ("y", None, None)]
    assert raw.frame[LINE].to_list() == [2, 4, 5]


def test_only_the_first_sheet_is_read_with_a_note(tmp_path: Path) -> None:
    assert read(_workbook(tmp_path / "t.xlsx", sheets=3)).notes == [
        "t.xlsx: has 3 sheets; only the first, 'Sheet', is read"
    ]


def test_empty_sheet_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no row"):
        read(_workbook(tmp_path / "t.xlsx", []))


# ------------------------------------------------------------------------------------------------ encodings


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json"])
@pytest.mark.parametrize("codec", ["gbk", "gb18030", "utf-8-sig", "utf-16"])
def test_text_formats_read_any_encoding_with_a_note(tmp_path: Path, name: str, codec: str) -> None:
    file = tmp_path / name
    rows = pl.DataFrame({"text": ["利好消息，股价大涨", "业绩下滑"], "label": ["利好", "利空"]})
    {".csv": rows.write_csv, ".tsv": lambda f: rows.write_csv(f, separator="\t"), ".jsonl": rows.write_ndjson}.get(
        file.suffix, rows.write_json
    )(file)
    file.write_bytes(file.read_text(encoding="utf-8").encode(codec))
    raw = read(file)
    assert _own(raw).equals(rows)
    assert len(raw.notes) == 1
    assert raw.notes[0].startswith(f"{name}: ")
