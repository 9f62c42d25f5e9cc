"""Row files: every format, faulty rows with their lines, invalid inputs, and round trips."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finsa.data.schema import Reading
from finsa.errors import DataError
from finsa.inference import row_files

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)


def read(source: str, column: str = "text", form: str | None = None) -> tuple[list[dict[str, Any]], list[Any]]:
    """All rows with their texts, and the rejected ones as line and reason."""
    reading = Reading(column)
    stream = row_files.open_stream(source, row_files.input_format(source, form), reading)
    good, bad = [], []
    for item in stream.rows:
        text, _, fault = ("", 0, item.fault) if item.fault else reading.text_of(item.values)
        if fault is None:
            good.append({**item.values, column: text})
        else:
            bad.append((item.line, fault))
    return good, bad


def test_csv_keeps_columns_and_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text('id,text\n1,"涨,\n了"\n2\n3, 跌 \n4,\n5,a,b\n6,好\n', encoding="utf-8")
    good, bad = read(str(file))
    assert good == [{"id": "1", "text": "涨,\n了"}, {"id": "3", "text": "跌"}, {"id": "6", "text": "好"}]
    assert [(line, reason.split(":")[0]) for line, reason in bad] == [
        (4, "unreadable"),
        (6, "empty text"),
        (7, "unreadable"),
    ]


def test_an_unclosed_quote_affects_no_other_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "LONGEST", 100)
    file = tmp_path / "in.csv"
    file.write_text('text\n"开始\n' + "涨了\n" * 200, encoding="utf-8")
    good, bad = read(str(file))
    assert len(good) == 200
    assert [line for line, _ in bad] == [2]


@pytest.mark.parametrize("codec", ["utf-8-sig", "gb18030", "utf-16"])
def test_encodings_are_those_of_training(tmp_path: Path, codec: str) -> None:
    file = tmp_path / "in.tsv"
    file.write_bytes(("text\tid\n" + "股市上涨了\t1\n" * 5).encode(codec))
    assert read(str(file))[0] == [{"text": "股市上涨了", "id": "1"}] * 5


def test_json_lines_may_differ_and_break(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [
        '{"text": "涨", "n": 1}',
        "{broken",
        '{"n": 2}',
        '{"text": 3}',
        '{"text": "\\ud83d"}',
        '{"text": "跌", "m": [1]}',
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    good, bad = read(str(file))
    assert good == [{"text": "涨", "n": 1}, {"text": "跌", "m": [1]}]
    assert [line for line, _ in bad] == [2, 3, 4, 5]
    assert row_files.keys_of(str(file)) == ["text", "n", "m"]


def test_lines_of_text_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("涨\n\n跌\n", encoding="utf-8")
    assert read(str(tmp_path / "in.txt")) == ([{"text": "涨"}, {"text": "跌"}], [(2, "empty text")])
    pl.DataFrame({"n": [1, 2], "text": ["涨", None]}).write_parquet(tmp_path / "in.parquet")
    assert read(str(tmp_path / "in.parquet")) == ([{"n": 1, "text": "涨"}], [(2, "no text")])


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("id,text\n1,涨\n", [{"id": "1", "text": "涨"}]),
        ("text\tid\n涨\t1\n", [{"text": "涨", "id": "1"}]),
        ('{"text": "涨"}\n', [{"text": "涨"}]),
        ("涨, 跌\n平\n", [{"text": "涨, 跌"}, {"text": "平"}]),
        ("\ufefftext\n涨\n", [{"text": "涨"}]),
    ],
)
def test_the_format_of_a_pipe_is_detected(
    monkeypatch: pytest.MonkeyPatch, content: str, rows: list[dict[str, str]]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
    assert read("-")[0] == rows


def test_invalid_inputs_are_reported(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("texts,id\na,1\n", encoding="utf-8")
    (tmp_path / "rows.doc").write_text("a")
    (tmp_path / "rows.parquet").write_text("a")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"content": "a"}))
    (tmp_path / "empty.csv").write_text("")
    for name, message in {
        "row.csv": r"there is no file .* Did you mean 'rows\.csv'",
        "rows.csv": r"no column 'text'\. Did you mean 'texts'\? Name it with stage\.text_column",
        "rows.doc": "has no known format. Choose from: csv",
        "rows.parquet": "cannot be read",
        "rows.jsonl": "no column 'text'",
        "empty.csv": "it is empty",
    }.items():
        with pytest.raises(DataError, match=message):
            read(str(tmp_path / name))
    with pytest.raises(DataError, match="cannot be read from a pipe"):
        row_files.input_format("-", "parquet")


@pytest.mark.parametrize("name", ["csv", "tsv"])
@given(
    rows=st.lists(
        st.fixed_dictionaries({"id": TEXT, "text": TEXT | st.sampled_from(["a\rb", "\r", "\n", '"', "\r\n"])})
    )
)
def test_every_cell_is_restored(name: str, rows: list[dict[str, str]]) -> None:
    """Including lone carriage returns, which Python 3.11 does not quote."""
    made = row_files.CsvWriter(name, ["id", "text"]).encode(rows).decode()
    read = csv.reader(io.StringIO(made, newline=""), delimiter="\t" if name == "tsv" else ",", strict=True)
    assert [tuple(row) for row in read] == [(row["id"], row["text"]) for row in rows]


def test_an_empty_row_of_the_only_column_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text('text\n涨\n""\n\n跌\n', encoding="utf-8")
    assert read(str(file)) == ([{"text": "涨"}, {"text": "跌"}], [(3, "empty text")])
