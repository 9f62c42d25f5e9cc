"""Corrections are applied to the rows that they name, each is accounted for, and one that fits no row is an error."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from finsa.config import RunConfig
from finsa.data import corrections, dataset
from finsa.errors import ConfigError, DataError

Configure = Callable[..., RunConfig]
TEXTS = {f"r{n}": f"第{n}条消息" for n in range(40)}


def _load(config: Configure, folder: Path, lines: list[tuple[str, ...]]) -> dataset.Dataset:
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("id", "text", "label"), *((one, text, "ab"[n % 2]) for n, (one, text) in enumerate(TEXTS.items()))]
        )
    with (folder / "corrections.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([corrections.COLUMNS, *lines])
    words = ("data=table", f"data.files={folder / 'rows.csv'}", f"data.corrections={folder / 'corrections.csv'}")
    return dataset.load(config(*words, f"output_dir={folder}").data)


def _line(one: str, action: str, label: str = "", given: str | None = None) -> tuple[str, ...]:
    given = given or "ab"[int(one[1:]) % 2]
    return one, corrections.fingerprint(TEXTS[one], None), given, action, label


def _labels(data: dataset.Dataset) -> dict[str, str]:
    return {
        one: data.labels.names[label]
        for part in data.splits.values()
        for one, label in part.select("id", "label").iter_rows()
    }


def test_each_correction_is_accounted_for(config: Configure, tmp_path: Path) -> None:
    before = _load(config, tmp_path, [])
    lines = [_line("r0", "relabel", "b"), _line("r2", "relabel", "b"), _line("r3", "drop"), _line("r4", "keep")]
    after = _load(config, tmp_path, lines)
    expected = {**_labels(before), "r0": "b", "r2": "b"}
    del expected["r3"]
    assert _labels(after) == expected
    assert after.ledger.buckets == {"used": 39, "correction: dropped": 1}
    assert "corrections.csv: 4 corrections: 1 kept, 2 relabeled (a to b 2), 1 dropped" in after.ledger.notes
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("r0", "0" * 16, "a", "drop", ""), "line 2, id 'r0' with the label 'a': no row with that id and text"),
        (("r99", "0" * 16, "a", "drop", ""), "id 'r99' with the label 'a': no row with that id and text"),
        (_line("r0", "drop", given="b"), "id 'r0' with the label 'b': now has the label 'a'"),
        (_line("r0", "relabel", "c"), "corrections.csv:2 has the label 'c'; the labels are a, b. Choose from: a, b."),
        (_line("r0", "relabel"), "corrections.csv:2 has no label; the labels are a, b."),
        (_line("r0", "delete"), "corrections.csv:2 has the action 'delete'; an action is keep, relabel, drop."),
    ],
)
def test_a_correction_that_cannot_be_applied_is_an_error(
    config: Configure, tmp_path: Path, line: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError) as raised:
        _load(config, tmp_path, [line])
    assert message in str(raised.value)


def test_two_corrections_of_one_row_are_an_error(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corrections\.csv:3 has the id 'r0' a second time"):
        _load(config, tmp_path, [_line("r0", "keep"), _line("r0", "drop")])


def test_a_file_that_is_missing_or_another_table(config: Configure, tmp_path: Path) -> None:
    _load(config, tmp_path, [])
    words = ("data=table", f"data.files={tmp_path / 'rows.csv'}", f"output_dir={tmp_path}")
    with pytest.raises(DataError, match="data.corrections: no such file"):
        dataset.load(config(*words, f"data.corrections={tmp_path / 'none.csv'}").data)
    with pytest.raises(DataError, match="is not a CSV file with the columns id, fingerprint, given, action, label"):
        dataset.load(config(*words, f"data.corrections={tmp_path / 'rows.csv'}").data)
    with pytest.raises(ConfigError, match="data.corrections are for one class per row"):
        config(*words, "data.corrections=x.csv", "data.task=multi_label", "data.labels=[a,b]")
