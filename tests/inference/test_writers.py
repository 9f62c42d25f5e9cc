"""Rows that are written can be read back."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finsa.inference import writers

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)


@pytest.mark.parametrize("name", ["csv", "tsv"])
@given(
    rows=st.lists(
        st.fixed_dictionaries({"id": TEXT, "text": TEXT | st.sampled_from(["a\rb", "\r", "\n", '"', "\r\n"])})
    )
)
def test_every_cell_comes_back(name: str, rows: list[dict[str, str]]) -> None:
    """Carriage returns alone, too, which Python 3.11 leaves unquoted."""
    made = writers.Delimited(name, ["id", "text"]).chunk(rows).decode()
    read = csv.reader(io.StringIO(made, newline=""), delimiter="\t" if name == "tsv" else ",", strict=True)
    assert [tuple(row) for row in read] == [(row["id"], row["text"]) for row in rows]
