"""The CSV format is detected if it is unambiguous; every line belongs to exactly one record with its line number."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import RunConfig
from finsa.data.dataset import Dataset, load
from finsa.data.delimited import Record, open_delimited, records
from finsa.data.readers import PLAIN
from finsa.errors import ConfigError, DataError

Configure = Callable[..., RunConfig]

CELL = st.text(st.sampled_from('ab,"\t 涨'), max_size=6) | st.sampled_from(["two\nlines", "three\r\nlines\n", ""])
LINE = st.lists(st.sampled_from(['"', '""', ",", "a", " ", "涨"]), max_size=7).map("".join)


def _records(text: str, delimiter: str = ",") -> list[Record]:
    return list(records(io.StringIO(text, newline=""), delimiter))


@settings(deadline=None)
@given(rows=st.lists(st.lists(CELL, min_size=2, max_size=4), max_size=8), delimiter=st.sampled_from([",", "\t"]))
def test_written_records_are_read_with_line_numbers(rows: list[list[str]], delimiter: str) -> None:
    stream = io.StringIO(newline="")
    writer, starts = csv.writer(stream, delimiter=delimiter), []
    for row in rows:
        starts.append(len(stream.getvalue().replace("\r\n", "\n").split("\n")))
        writer.writerow(row)
    expected = [(row, line, None) for row, line in zip(rows, starts, strict=True)]
    assert _records(stream.getvalue(), delimiter) == expected


@settings(max_examples=400, deadline=None)
@given(lines=st.lists(LINE, max_size=10))
def test_every_line_belongs_to_exactly_one_record(lines: list[str]) -> None:
    """A readable record equals what csv parses from its lines alone; an unreadable one is a single line."""
    found = _records("".join(f"{line}\n" for line in lines))
    starts = [line for _, line, _ in found] + [len(lines) + 1]
    assert starts == sorted(set(starts))
    assert "".join(lines[: starts[0] - 1]).strip(' "') == ""
    for (values, start, fate), end in zip(found, starts[1:], strict=True):
        own = [f"{line}\n" for line in lines[start - 1 : end - 1]]
        if fate is None:
            parsed = list(csv.reader(own, strict=True))
            assert parsed[0] == values
            rest = [cell for row in parsed[1:] for cell in row]
        else:
            with pytest.raises(csv.Error):
                list(csv.reader(own[:1], strict=True))
            rest = own[1:]
        assert "".join(rest).strip(' "\n') == "", "what belongs to no record is blank"


def test_a_stray_quote_affects_no_other_row() -> None:
    found = _records('id,text\n1,"open\n2,fine\n3,"fine, too"\n4,fine\n')
    assert [(values, line, fate is None) for values, line, fate in found] == [
        (["id", "text"], 1, True),
        ([], 2, False),
        (["2", "fine"], 3, True),
        (["3", "fine, too"], 4, True),
        (["4", "fine"], 5, True),
    ]


def test_blank_lines_are_not_records_but_count_as_lines() -> None:
    assert _records("a,b\n\n  \n1,2\n\n") == [(["a", "b"], 1, None), (["1", "2"], 4, None)]


def test_field_of_a_megabyte() -> None:
    text = "涨" * 1_000_000
    assert _records(f'"{text}",a\n') == [([text, "a"], 1, None)]


# ------------------------------------------------------------------------------------------------ detection

ROWS = [(f"company {number}, a text", "ab"[number % 2]) for number in range(40)]


def _written(delimiter: str, rows: list[tuple[str, str]] = ROWS, header: str = "text{}label\n") -> str:
    return header.format(delimiter) + "".join(f"{text}{delimiter}{label}\n" for text, label in rows)


def _load(config: Configure, file: Path, content: str | bytes, *overrides: str) -> Dataset:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(config("data=table", f"data.files={file}", *overrides).data)


def _texts(table: Dataset) -> set[str]:
    return {text for frame in table.splits.values() for text in frame["text"]}


ALL = {text for text, _ in ROWS}
QUOTED = [(f'"{text}"', label) for text, label in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("t.csv", _written(";"), ["t.csv: fields are separated by semicolon"]),
        ("t.csv", _written("\t"), ["t.csv: fields are separated by tab"]),
        ("t.csv", _written("|"), ["t.csv: fields are separated by pipe"]),
        ("t.tsv", _written(",", QUOTED), ["t.tsv: fields are separated by comma"]),
        ("t.csv", "sep=;\n" + _written(";"), []),
        ("t.csv", "\ufeffsep=\t\r\n" + _written("\t"), ["t.csv: begins with a byte order mark, read as UTF-8"]),
        (
            "t.csv",
            "Labels of 2024,\n\n" + _written(",", QUOTED),
            ["t.csv: the header is line 3, below 2 lines of title"],
        ),
        (
            "t.csv",
            "Labels of 2024\n" + _written(";"),
            ["t.csv: fields are separated by semicolon", "t.csv: the header is line 2, below 1 lines of title"],
        ),
    ],
)
def test_an_unambiguous_file_is_read_with_a_note(
    config: Configure, tmp_path: Path, name: str, content: str, note: list[str]
) -> None:
    table = _load(config, tmp_path / name, content)
    assert (_texts(table), table.ledger.notes, table.ledger.buckets) == (ALL, note, {"used": 40})


def test_lines_are_those_of_the_file(config: Configure, tmp_path: Path) -> None:
    table = _load(config, tmp_path / "t.csv", "sep=;\n" + _written(";", [*ROWS, ("", "a")]))
    assert table.dropped["line"].to_list() == [43]


def test_delimiter_is_found_without_knowing_the_columns(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no column 'text'; it has sentence, mood\. Set data\.columns\.text="):
        _load(config, tmp_path / "t.csv", _written("|", header="sentence{}mood\n"))


def test_an_ambiguous_delimiter_must_be_configured(config: Configure, tmp_path: Path) -> None:
    rows = "".join(f"{label};{text}\n" for text, label in ROWS)
    with pytest.raises(
        DataError, match=r"fields of t\.csv may be separated by comma or semicolon; set data\.csv\.delimi"
    ):
        _load(config, tmp_path / "t.csv", rows)
    overrides = ("data.csv.delimiter=semicolon", "data.csv.header=[label,text]")
    assert _texts(_load(config, tmp_path / "t.csv", rows, *overrides)) == ALL


def test_quotes_of_a_tsv_that_are_text(config: Configure, tmp_path: Path) -> None:
    """As the sets of GLUE and TweetEval are written; read as CSV, rows would be lost or run into each other."""
    rows = [(f'"up" says CEO {number}' if number % 2 else f'"open {number}', "ab"[number % 2]) for number in range(40)]
    table = _load(config, tmp_path / "t.tsv", _written("\t", rows))
    assert _texts(table) == {text for text, _ in rows}
    assert table.ledger.notes == ["t.tsv: double quotes are part of the text"]


@pytest.mark.parametrize("rows", [QUOTED, [(f'"two\nlines, {text}"', label) for text, label in ROWS]])
def test_quotes_of_a_tsv_that_enclose_fields(config: Configure, tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    table = _load(config, tmp_path / "t.tsv", _written("\t", rows))
    assert _texts(table) == {text.strip('"') for text, _ in rows}
    plain = _load(config, tmp_path / "u.tsv", _written("\t", QUOTED), "data.csv.quotes=false")
    assert _texts(plain) == {text for text, _ in QUOTED}


def test_a_missing_header_is_reported_with_the_setting_for_it(config: Configure, tmp_path: Path) -> None:
    rows = "".join(f"{label};{text.replace(',', '')}\n" for text, label in ROWS)
    with pytest.raises(
        DataError, match=r'is not a header, name the columns: "data\.csv\.header=\[label,text\]"'
    ) as caught:
        _load(config, tmp_path / "t.csv", rows)
    assert len(str(caught.value).splitlines()) == 1
    for overrides in (
        ["data.csv.header=[label,text]"],
        ["data.csv.header=false", "data.columns.text='column 2'", "data.columns.label='column 1'"],
    ):
        table = _load(config, tmp_path / "t.csv", rows, *overrides)
        assert _texts(table) == {text.replace(",", "") for text in ALL}


def test_encoding_that_was_detected_reads_every_row(config: Configure, tmp_path: Path) -> None:
    rows = [(text.replace("company", "Café"), label) for text, label in ROWS]
    table = _load(config, tmp_path / "t.csv", _written(";", rows).encode("cp1252"))
    assert _texts(table) == {text for text, _ in rows}


def test_configured_values_are_followed(config: Configure, tmp_path: Path) -> None:
    content = ("a title\n" + _written(";", [(text.replace("company", "Цена"), label) for text, label in ROWS])).encode(
        "cp1251"
    )
    table = _load(config, tmp_path / "t.csv", content, "data.csv.encoding=cp1251", "data.csv.header=2")
    assert "Цена 0, a text" in _texts(table)
    assert table.ledger.notes == ["t.csv: fields are separated by semicolon"]
    jsonl = "".join(f'{{"text": "Цена {number}", "label": "{"ab"[number % 2]}"}}\n' for number in range(40))
    table = _load(config, tmp_path / "t.jsonl", jsonl.encode("cp1251"), "data.csv.encoding=cp1251")
    assert "Цена 0" in _texts(table)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.csv.delimiter=ab", "data.csv.delimiter: needs one character, or comma, semicolon, tab, pipe"),
        (
            "data.csv.encoding=utf-x",
            "data.csv.encoding: unknown encoding 'utf-x'; known ones are utf-8, utf-16, gb18030",
        ),
        ("data.csv.encoding=base64", "data.csv.encoding: unknown encoding 'base64'"),
    ],
)
def test_wrong_values_are_reported(config: Configure, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config("data=table", override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("above", "overrides"),
    [
        ([], []),
        ([["2024年一季度 情绪标注"], [None]], []),
        ([["a", "b"]], ["data.csv.header=2"]),
        (None, ["data.csv.header=[text,label]"]),
        (None, ["data.csv.header=false", "data.columns.text='column 1'", "data.columns.label='column 2'"]),
    ],
)
def test_header_of_a_sheet(
    config: Configure, tmp_path: Path, above: list[list[str | None]] | None, overrides: list[str]
) -> None:
    from openpyxl import Workbook  # type: ignore[import-untyped]

    book = Workbook()
    for row in [*([*above, ["text", "label"]] if above is not None else []), *ROWS]:
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    table = load(config("data=table", f"data.files={tmp_path / 't.xlsx'}", *overrides).data)
    assert _texts(table) == ALL
    assert table.ledger.notes == (["t.xlsx: the header is row 3"] if above and not overrides else [])


def test_an_empty_quoted_line_is_a_row_of_a_file_with_one_column() -> None:
    def rows(text: str, **format: Any) -> list[Record]:
        lines = iter(text.splitlines(keepends=True))
        return list(
            open_delimited(lines, ",", PLAIN.model_copy(update=format), lambda names: "text" in names, "x").rows
        )

    assert rows('text\na\n""\n\nb\n') == [(["a"], 2, None), ([""], 3, None), (["b"], 5, None)]
    assert rows('a\n""\n', header=("text",)) == [(["a"], 1, None), ([""], 2, None)]
    assert rows('text,label\na,1\n""\n\nb,2\n') == [(["a", "1"], 2, None), (["b", "2"], 5, None)]
    assert rows('""\ntext,label\na,1\n') == [(["a", "1"], 3, None)]
