"""Every line of a CSV file belongs to exactly one record, and the record says where it begins."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.data.delimited import Record, records

CELL = st.text(st.sampled_from('ab,"\t 涨'), max_size=6) | st.sampled_from(["two\nlines", "three\r\nlines\n", ""])
LINE = st.lists(st.sampled_from(['"', '""', ",", "a", " ", "涨"]), max_size=7).map("".join)


def _records(text: str, delimiter: str = ",") -> list[Record]:
    return list(records(io.StringIO(text, newline=""), delimiter))


@settings(deadline=None)
@given(rows=st.lists(st.lists(CELL, min_size=2, max_size=4), max_size=8), delimiter=st.sampled_from([",", "\t"]))
def test_what_was_written_is_read_with_its_lines(rows: list[list[str]], delimiter: str) -> None:
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
    """A readable record is what csv makes of its own lines alone; an unreadable one is a single line."""
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


def test_stray_quote_takes_no_other_row_along() -> None:
    found = _records('id,text\n1,"open\n2,fine\n3,"fine, too"\n4,fine\n')
    assert [(values, line, fate is None) for values, line, fate in found] == [
        (["id", "text"], 1, True),
        ([], 2, False),
        (["2", "fine"], 3, True),
        (["3", "fine, too"], 4, True),
        (["4", "fine"], 5, True),
    ]


def test_blank_lines_are_no_records_but_count_as_lines() -> None:
    assert _records("a,b\n\n  \n1,2\n\n") == [(["a", "b"], 1, None), (["1", "2"], 4, None)]


def test_field_of_a_megabyte() -> None:
    text = "涨" * 1_000_000
    assert _records(f'"{text}",a\n') == [([text, "a"], 1, None)]
