"""Rows with a rejected label: read from tables, instruction rows and chats, and never a pair of equal labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.data.dataset import Dataset
from finsa.errors import DataError

Configure = Callable[..., RunConfig]
LABELS = "data.labels=['利空','中性','利好']"
TABLE = ("data=table", "data.columns.rejected=rejected", LABELS, "data.cache=null")
INSTRUCTION, INPUT = "判断情绪", "甲公司跌停"


def load(config: Configure, folder: Path, *words: str, **splits: list[dict[str, Any]]) -> Dataset:
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return dataset.load(config(*words, f"data.files={folder}").data)


def row(number: int, label: str, rejected: str | None) -> dict[str, Any]:
    return {"text": f"第{number}条", "label": label, **({"rejected": rejected} if rejected is not None else {})}


def test_pairs_are_read_and_those_that_are_none_are_counted(config: Configure, tmp_path: Path) -> None:
    training = [
        row(1, "利空", "利好"),
        row(2, "利好", " 利空 "),  # written differently
        row(3, "利好", "利好"),
        row(4, "利好", "上涨"),
        row(5, "中性", ""),
        row(6, "中性", None),
    ]
    held_out = [row(7, "利空", None), row(8, "利好", "中性")]
    words = (*TABLE, "data.on_unknown_label=drop")
    found = load(config, tmp_path, *words, train=training, valid=held_out, test=[row(9, "中性", None)])
    assert found.splits["train"].select("text", "label", "rejected").rows() == [("第1条", 0, 2), ("第2条", 2, 0)]
    assert found.splits["validation"]["rejected"].to_list() == [None, 1]
    dropped = {"pair of equal labels": 1, "unknown rejected label": 1, "no rejected label": 2}
    assert {fate: count for fate, count in found.ledger.buckets.items() if fate != "used"} == dropped


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        ("利好", r"1 row has the same label as chosen and as rejected. .*\n.*train.jsonl:2"),
        ("上涨", r"1 row has a rejected label that is none: '上涨'; 利空, 中性, 利好"),
        ("", "1 row has no text in the column 'rejected'"),
    ],
)
def test_a_pair_that_is_none_is_one_message(rejected: str, message: str, config: Configure, tmp_path: Path) -> None:
    training = [row(1, "利空", "利好"), row(2, "利好", rejected)]
    with pytest.raises(DataError, match=message):
        load(config, tmp_path, *TABLE, train=training, valid=[row(3, "利空", None)], test=[row(4, "中性", None)])


def test_a_missing_column_is_one_message(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.columns.rejected: no row has a label in a column 'rejected'"):
        load(config, tmp_path, *TABLE, train=[row(1, "利空", None), row(2, "利好", None)])


def test_labels_of_pairs_are_translated_alike(config: Configure, tmp_path: Path) -> None:
    words = (*TABLE, "data.label_map={neg: '利空', pos: '利好', neu: '中性'}")
    training = [row(1, "neg", "pos"), row(2, "pos", "neu"), row(3, "neu", "neg")]
    found = load(config, tmp_path, *words, train=training, valid=[row(4, "neg", "pos")], test=[row(5, "pos", "neg")])
    assert found.splits["train"].select("label", "rejected").rows() == [(0, 2), (2, 1), (1, 0)]


def test_the_fingerprint_of_rows_without_pairs_does_not_change(config: Configure, tmp_path: Path) -> None:
    """It identifies the rows of older runs."""
    splits = {"train": [row(1, "利空", "利好"), row(2, "利好", "利空")], "valid": [row(3, "利空", "利好")]}
    with_pairs = load(config, tmp_path, *TABLE, **splits, test=[row(4, "中性", "利空")])
    plain = load(config, tmp_path, "data=table", LABELS, "data.cache=null", **splits, test=[row(4, "中性", "利空")])
    assert plain.fingerprint == "ff5630e2349e2011"  # by the version without pairs
    assert with_pairs.fingerprint != plain.fingerprint


def alpaca(number: int) -> dict[str, Any]:
    return {"instruction": INSTRUCTION, "input": f"{INPUT}{number}", "chosen": "利空", "rejected": "利好"}


def chat(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{INPUT}{number}"}]
    chosen, rejected = ({"from": "gpt", "value": label} for label in ("利空", "利好"))
    return {"conversations": turns, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(("source", "make"), [("alpaca", alpaca), ("messages", chat)])
def test_pairs_of_llama_factory_are_read(
    source: str, make: Callable[[int], dict[str, Any]], config: Configure, tmp_path: Path
) -> None:
    columns = "data.columns={label: chosen, rejected: rejected}"
    words = (f"data={source}", columns, LABELS, "data.cache=null")
    found = load(config, tmp_path, *words, train=[make(1), make(2)], valid=[make(3)], test=[make(4)])
    assert found.splits["train"].select("label", "rejected").rows() == [(0, 2), (0, 2)]
    text = f"{INPUT}1" if source == "messages" else f"{INSTRUCTION}\n{INPUT}1"
    assert found.splits["train"]["text"][0] == text
