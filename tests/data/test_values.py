"""Numbers and sets of labels, from files to splits: what is read, what is refused, and how rows are counted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finsa.config import RunConfig
from finsa.config.data import finite_number
from finsa.data import dataset, values
from finsa.data.dataset import Dataset
from finsa.errors import ConfigError, DataError

Configure = Callable[..., RunConfig]
SCALE = ("data=table", "data.task=regression", "data.labels={-1: bad, 0: so, 1: good}", "data.cache=null")
TOPICS = (
    *("data=table", "data.task=multi_label", "data.labels=[price,risk,news]", "data.cache=null", "method=lora_label"),
    "data.answers=['{label}: yes','{label}: no']",
)


def _load(config: Configure, folder: Path, words: tuple[str, ...], **splits: list[Any]) -> Dataset:
    for split, cells in splits.items():
        rows = [{"text": f"{split} {number}", "label": cell} for number, cell in enumerate(cells)]
        rows = [cell if isinstance(cell, dict) else row for cell, row in zip(cells, rows, strict=True)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return dataset.load(config(*words, f"data.files={folder}").data)


def test_numbers_in_any_spelling(config: Configure, tmp_path: Path) -> None:
    spelled = [0.25, "-0.5", "\uff10.75", "\u22121", "1e-1", 1, "+0.3"]
    data = _load(config, tmp_path, SCALE, train=spelled, valid=[0], test=[0.1, -0.9])
    train = data.splits["train"]
    assert values.matrix(train, 1)[:, 0].tolist() == [0.25, -0.5, 0.75, -1.0, 0.1, 1.0, 0.3]
    nearest = ["0", "-1", "1", "-1", "0", "1", "0"]  # the nearest anchor, the first of two that are equally near
    assert [data.labels.names[number] for number in train["label"]] == nearest
    assert data.ledger.splits["train"] == {"-1": 2, "0": 3, "1": 2}
    assert data.ledger.rows == {"train": 7, "validation": 1, "test": 2}


@pytest.mark.parametrize("cell", [1.5, "-1.01", "high", "nan", "inf", None, "", "0,5"])
def test_a_number_that_is_out_of_range_or_unreadable_is_refused_with_its_line(
    config: Configure, tmp_path: Path, cell: Any
) -> None:
    with pytest.raises(DataError) as error:
        _load(config, tmp_path, SCALE, train=[0.1, 0.2, cell, 0.4], valid=[0], test=[0])
    text = str(error.value)
    assert "data.on_unknown_label: 1 row has a label that is not a number from -1 to 1" in text
    assert "train.jsonl:3: train 2" in text
    assert "Set data.on_unknown_label=drop (counted)\n" in text  # and not keep, which adds a class
    data = _load(config, tmp_path, (*SCALE, "data.on_unknown_label=drop"), train=[0.1, cell], valid=[0], test=[0])
    assert data.ledger.buckets["label out of range or not a number"] == 1
    assert data.splits["train"].height == 1


def test_different_numbers_of_one_text_conflict_although_their_anchor_is_the_same(
    config: Configure, tmp_path: Path
) -> None:
    rows = [{"text": "same", "label": 0.1}, {"text": "same", "label": 0.2}, {"text": "twice", "label": "0.50"}]
    rows += [{"text": "twice", "label": 0.5}, {"text": "other", "label": 0.3}]
    data = _load(config, tmp_path, SCALE, train=rows, valid=[0], test=[0])
    assert (data.ledger.buckets["conflicting label"], data.ledger.buckets["duplicate"]) == (2, 1)
    assert values.matrix(data.splits["train"], 1)[:, 0].tolist() == [0.5, 0.3]


def test_the_fingerprint_depends_on_the_number(config: Configure, tmp_path: Path) -> None:
    prints = []
    for number, cell in enumerate((0.1, 0.2)):  # of one anchor
        folder = tmp_path / str(number)
        folder.mkdir()
        prints.append(_load(config, folder, SCALE, train=[cell], valid=[0], test=[0]).fingerprint)
    assert prints[0] != prints[1]


def test_cells_with_several_labels(config: Configure, tmp_path: Path) -> None:
    cells = ["price;risk", ["news", "price"], " risk ; price; risk", "[]", ["PRICE"], '["risk"]', ["price;news"]]
    data = _load(config, tmp_path, TOPICS, train=cells, valid=["news"], test=["risk"])
    expected = [[1, 1, 0], [1, 0, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert values.matrix(data.splits["train"], 3).tolist() == expected
    assert data.ledger.splits["train"] == {"price": 5, "risk": 3, "news": 2}
    assert data.ledger.rows["train"] == 7  # fewer than the counts of the labels


def test_equal_sets_are_duplicates_in_any_order(config: Configure, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "price;risk"}, {"text": "a", "label": ["risk", "price"]}]
    data = _load(config, tmp_path, TOPICS, train=[*rows, {"text": "b", "label": "news"}], valid=["news"], test=["risk"])
    assert data.ledger.buckets["duplicate"] == 1


def test_a_missing_or_unlisted_label_is_refused_or_counted(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 row has an empty label cell; a row without labels has the empty list"):
        _load(config, tmp_path, TOPICS, train=["price", None], valid=["news"], test=["risk"])
    with pytest.raises(DataError, match=r"labels that are not in data.labels: 'rsk' \(1 row\)[^\n]*'risk'"):
        _load(config, tmp_path, TOPICS, train=["price", "news;rsk"], valid=["news"], test=["risk"])
    words = (*TOPICS, "data.on_unknown_label=drop")
    data = _load(config, tmp_path, words, train=["price", None, "news;rsk", "rsk"], valid=["news"], test=["risk"])
    assert data.ledger.buckets["no label"] == 1
    assert values.matrix(data.splits["train"], 3).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert "1 unlisted label of 2 rows is ignored: 'rsk' (2 rows)" in data.ledger.notes


@pytest.mark.parametrize(
    "cell", [{"text": "x", "label": {"price": True}}, ["price", None], ["price", math.nan], [["price"]]]
)
def test_a_cell_that_cannot_be_split_is_counted(config: Configure, tmp_path: Path, cell: Any) -> None:
    data = _load(config, tmp_path, TOPICS, train=["price", cell], valid=["news"], test=["risk"])
    assert data.ledger.buckets[values.NOT_LABELS] == 1
    assert data.splits["train"].height == 1


def test_labels_are_translated_one_by_one(config: Configure, tmp_path: Path) -> None:
    words = (*TOPICS, "data.label_map={falling: price, rising: price}", "data.separator=/")
    data = _load(config, tmp_path, words, train=["risk/falling", "rising/falling"], valid=["news"], test=["risk"])
    assert values.matrix(data.splits["train"], 3).tolist() == [[1, 1, 0], [1, 0, 0]]


def test_rows_are_split_by_their_rarest_label(config: Configure, tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "price;risk" if n % 5 == 0 else "price"} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = dataset.load(config(*TOPICS, f"data.files={tmp_path / 'rows.jsonl'}", "data.split.rule=by_class").data)
    counts = {split: values.matrix(part, 3).sum(axis=0).tolist() for split, part in data.splits.items()}
    assert counts == {"train": [80, 16, 0], "validation": [10, 2, 0], "test": [10, 2, 0]}
    for part in data.splits.values():
        assert part["label"].to_list() == [int(has[1]) for has in values.matrix(part, 3)]  # risk if it has it, or price


def test_the_cache_keeps_values_and_labels(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset.cache, "worthwhile", lambda files: True)
    words = (*TOPICS[:3], *TOPICS[4:], f"data.cache={tmp_path / 'cache'}")
    first, again = (
        _load(config, tmp_path, words, train=["price;news", "[]"], valid=["news"], test=["risk"]) for _ in range(2)
    )
    assert list((tmp_path / "cache").rglob("table.json"))
    assert first is not again
    assert again.labels == first.labels
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(*(values.matrix(data.splits["train"], 3) for data in (first, again)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.task=ordinal",), "task=ordinal needs data.labels, the levels"),
        (("data.task=regression",), "task=regression needs data.labels, the words of some numbers"),
        (
            ("data.task=regression", "data.labels=[low,high]"),
            "needs data.labels to be numbers in ascending order; they are low",
        ),
        (("data.task=regression", "data.labels=['1','0']"), "needs data.labels to be numbers in ascending order"),
        (("data.task=regression", "data.labels=['0','0.0']"), "needs data.labels to be numbers in ascending order"),
        ((*SCALE[1:3], "data.on_unknown_label=keep"), "does not support on_unknown_label=keep"),
        ((*SCALE[1:3], "data.options=[A,B]"), "does not support data.options"),
        ((*SCALE[1:3], "method=classifier"), "choose method=regression_head"),
        ((*SCALE[1:3], "method=lora_focal"), "leave out loss.name=focal"),
        ((*SCALE[1:3], "method=classifier_label_words"), "does not suit data.task=regression"),
        ((*SCALE[1:3], "method=lexicon"), "choose a method that learns"),
        ((*SCALE[1:3], "train.select_by=macro_f1"), "set it to rmse, mae, pearson, spearman, cosine or loss"),
        ((*SCALE[1:3], "evaluation.metrics=[mcc]"), "evaluation.metrics are for one class per row"),
        ((*SCALE[1:3], "stage=augment", "output=x"), "stage=augment needs one class per row"),
        (("train.select_by=rmse",), "train.select_by=rmse is not a measure of task=classification"),
        ((*TOPICS[1:3], "method=lora_label"), "set data.answers, as in"),
        ((*TOPICS[1:3], TOPICS[-1]), "choose method=lora_label, which asks for each label"),
        (
            (*TOPICS[1:3], TOPICS[-1], "method=few_shot"),
            "few-shot examples support one class per row; choose lora_label",
        ),
        ((*TOPICS[1:3], TOPICS[-1], "method=lora_label", "method.balance=downsample"), "leave out method.balance"),
        ((*TOPICS[1:3], TOPICS[-1], "method=lora_label", "data.separator=ri"), "contains the separator 'ri'"),
        ((*TOPICS[1:3], "method=lora_label", "data.answers=['yes','no']"), "needs {label} exactly once"),
        ((*SCALE[1:3], "stage=moe_joint"), "stage=moe_joint needs one class per row"),
        (
            ("data=mixture", "data.parts.first.task=regression", "data.parts.first.labels={0: a, 1: b}"),
            "data set of its",
        ),
    ],
)
def test_settings_that_do_not_suit_the_task(config: Configure, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("data=table", "data.files=x", *words)


def test_a_loss_for_numbers_needs_numbers(config: Configure) -> None:
    from finsa.session import Session
    from finsa.training import preflight

    cfg = config("method=regression_head", "data=sample")
    with pytest.raises(ConfigError, match="method.loss.name=huber: is for task=regression; set data.task=regression"):
        preflight.require_trainable(cfg, dataset.load(cfg.data), Session())


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ([1, 2], [1, 1, 0]),
        ([True, 1.0], [1, 0, 1]),
        ("['1', '2']", [1, 1, 0]),
        ("[1, true]", [1, 0, 1]),
        ("[]", [0, 0, 0]),
    ],
)
def test_lists_of_numbers_and_lists_in_python_are_read(
    config: Configure, tmp_path: Path, cell: Any, labels: list[int]
) -> None:
    words = (*TOPICS, "data.labels=[1,2,true]")
    data = _load(config, tmp_path, words, train=[cell, "1;2;true"], valid=["1;2;true"], test=["1"])
    assert values.matrix(data.splits["train"], 3)[0].tolist() == labels


@pytest.mark.parametrize("policy", ["error", "drop"])
@pytest.mark.parametrize(
    ("cells", "found"), [(["Preis", "Risiko;Preis"], "they have 'Preis', 'Risiko'"), (["[]", []], "all have the empty")]
)
def test_rows_without_any_listed_label_are_refused(
    config: Configure, tmp_path: Path, policy: str, cells: list[Any], found: str
) -> None:
    words = (*TOPICS, f"data.on_unknown_label={policy}")
    with pytest.raises(DataError, match=f"data.labels: no row has any of price, risk, news; {found}"):
        _load(config, tmp_path, words, train=cells, valid=cells, test=cells)


def test_rows_that_are_dropped_do_not_count_as_labeled(config: Configure, tmp_path: Path) -> None:
    words = (*TOPICS, "data.on_unknown_label=drop")
    (tmp_path / "rows.csv").write_text("text,label\na,Preis\nb,Preis\n,price\n", encoding="utf-8")
    with pytest.raises(DataError, match="no row has any of price, risk, news; they have 'Preis'"):
        dataset.load(config(*words, f"data.files={tmp_path}").data)


def test_labels_without_rows_are_noted(config: Configure, tmp_path: Path) -> None:
    data = _load(config, tmp_path, TOPICS, train=["price;news", "news"], valid=["price"], test=["risk"])
    assert "no training row has the label 'risk'" in data.ledger.notes
    assert "no validation row has any of the labels 'risk', 'news'; the threshold stays 0.5" in data.ledger.notes
    words = ("data=table", "data.labels=[a,b,c]", "data.cache=null")
    data = _load(config, tmp_path, words, train=["a", "b"], valid=["a"], test=["c"])
    assert [note for note in data.ledger.notes if note.startswith("no ")] == ["no training row has the label 'c'"]


@pytest.mark.parametrize("text", ["1_0", "0_5", "5²", "½"])
def test_what_only_python_reads_as_a_number_is_none(text: str) -> None:
    assert finite_number(text) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.task=ordinal", "data.labels=[a,b]", "data.on_unknown_label=keep"), "adds labels without an order"),
        (
            ("data.answers=['{label}: yes','{label}: yes']", *TOPICS[:3], TOPICS[4]),
            "data.answers: the two answers must",
        ),
        (("data.answers=['{label} yes','{label}  yes']", *TOPICS[:3], TOPICS[4]), "data.answers: the two answers must"),
        (("data.answers=['{label}: yes']", *TOPICS[:3], TOPICS[4]), "data.answers: needs two answers, that a label"),
        (("data.answers=['{label}','{label}x','x{label}']", *TOPICS[:3], TOPICS[4]), "data.answers: needs two answers"),
        (("data.answers=['{label}: yes','no']", *TOPICS[:3], TOPICS[4]), "data.answers: each of the two answers needs"),
        (("data.answers=['{label}: yes','{label}: no']",), "data.answers is for task=multi_label"),
    ],
)
def test_settings_that_do_not_suit_the_task_are_refused(
    config: Configure, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config("data=table", *(word for word in words if word != "data=table"))
