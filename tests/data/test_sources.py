"""Rows of all files have one schema; hub data sets are read like tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from finsa.config import Data, RunConfig, command_line
from finsa.data import sources
from finsa.data.dataset import load
from finsa.data.discovery import find_files
from finsa.data.readers import FATE, LINE
from finsa.data.sources import Rows, collect
from finsa.errors import DataError

Configure = Callable[..., RunConfig]


def _data(config: Configure, files: object, **changes: object) -> Data:
    written = str(files) if isinstance(files, Path) else files
    return config("data=table").data.model_copy(update={"files": written, **changes})


def _file(folder: Path, name: str, content: str | bytes = "text,label\nx,a\n") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


# ------------------------------------------------------------------------------------------------ all rows


def test_files_are_concatenated_with_split_and_line(config: Configure, tmp_path: Path) -> None:
    _file(tmp_path, "train.csv", "text,label,domain\nx,a,news\n\ny,b,\n")
    _file(tmp_path, "test.jsonl", '{"label": "a", "text": "z", "id": 7, "extra": 1}\n')
    data = _data(config, tmp_path)
    rows = collect(data, find_files(data))
    assert rows.frame.select("id", "text", "label", "domain", "split", LINE).rows() == [
        ("7", "z", "a", None, "test", 1),
        ("train-1", "x", "a", "news", "train", 2),
        ("train-2", "y", "b", None, "train", 4),
    ]
    assert rows.declared == {"train", "test"}
    assert rows.counts() == Counter({str(tmp_path / "test.jsonl"): 1, str(tmp_path / "train.csv"): 2})


def test_column_that_only_one_file_lacks_is_reported_with_that_file(config: Configure, tmp_path: Path) -> None:
    _file(tmp_path, "a.csv")
    _file(tmp_path, "b.csv", "text,lable\nx,a\n")
    data = _data(config, tmp_path)
    with pytest.raises(
        DataError, match=rf"data\.columns\.label: {tmp_path}/b\.csv has no column 'label'; it has text, lable"
    ):
        collect(data, find_files(data))


def test_notes_of_all_files_are_kept(config: Configure, tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        _file(tmp_path, name, "\ufefftext,label\n涨,a\n")
    data = _data(config, tmp_path)
    notes = collect(data, find_files(data)).notes
    assert notes == [f"{name}: begins with a byte order mark, read as UTF-8" for name in ("a.csv", "b.csv")]


def test_rows_of_all_sources_have_the_same_schema() -> None:
    frame = pl.DataFrame({FATE: ["x"], LINE: [3], "more": [1], "text": ["t"]})
    rows = Rows(frame, set())
    assert tuple(rows.frame.columns) == sources.SHAPE
    assert rows.frame.row(0, named=True) == dict.fromkeys(sources.SHAPE) | {FATE: "x", LINE: 3, "text": "t", "fixed": 0}


@pytest.mark.parametrize("data", ["sample", "generated", "finnf_joint", "aidf_news"])
def test_all_files_are_those_that_are_read(config: Configure, data: str, tmp_path: Path) -> None:
    section = config(f"data={data}").data
    if data == "finnf_joint":
        parts = {
            name: part.model_copy(update={"files": str(_file(tmp_path, f"{name}.csv"))})
            for name, part in (section.parts or {}).items()
        }
        section = section.model_copy(update={"parts": parts})
    if data == "aidf_news":
        _file(tmp_path, "news.json", "[]")
        _file(tmp_path, "labels.json", "[]")
        section = section.model_copy(update={"files": str(tmp_path)})
    expected = {
        "sample": ["test.csv", "train.csv", "valid.csv"],
        "generated": [],
        "finnf_joint": ["news.csv", "forum.csv"],
        "aidf_news": ["news.json", "labels.json"],
    }
    assert [file.name for file in sources.all_files(section)] == expected[data]
    assert sources.only_files(section) == (data != "generated")


# ------------------------------------------------------------------------------------------------ the hub


def _hub(config: Configure, folder: Path, *overrides: str) -> Data:
    return config("data=hub", f"data.hub.id={folder}", "data.labels=[bad,good]", *overrides).data


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder in the hub's format, with numeric class labels; -1 means no label."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in {"train": [("x", 0), ("y", 1), ("w", -1)], "validation": [("v", 1)], "test": [("t", 0)]}.items():
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        datasets.Dataset.from_dict(columns, features=kinds).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def test_hub_set_reads_like_a_table(config: Configure, hub_folder: Path) -> None:
    rows = sources.collect_hub(_hub(config, hub_folder))
    assert rows.frame.select("id", "text", "label", "split", "file").rows() == [
        ("train-1", "x", "bad", "train", f"{hub_folder}:train"),
        ("train-2", "y", "good", "train", f"{hub_folder}:train"),
        ("train-3", "w", None, "train", f"{hub_folder}:train"),
        ("validation-1", "v", "good", "validation", f"{hub_folder}:validation"),
        ("test-1", "t", "bad", "test", f"{hub_folder}:test"),
    ]
    assert rows.declared == {"train", "validation", "test"}


@pytest.mark.parametrize("word", ["~data.hub.splits.{}", "data.hub.splits.{}=null"])
@pytest.mark.parametrize("lacking", [("validation",), ("validation", "test")])
def test_a_split_missing_on_the_hub_is_split_off(
    config: Configure, hub_folder: Path, word: str, lacking: tuple[str, ...]
) -> None:
    """With command-line arguments: the check accepts them, and the training rows are split."""
    import datasets

    rows = {"text": [f"text {number}" for number in range(40)], "label": ["bad", "good"] * 20}
    datasets.Dataset.from_dict(rows).to_parquet(str(hub_folder / "train-00000-of-00001.parquet"))
    kept = {"text": ["t", "u"], "label": ["bad", "good"]}
    datasets.Dataset.from_dict(kept).to_parquet(str(hub_folder / "test-00000-of-00001.parquet"))
    for split in lacking:
        (hub_folder / f"{split}-00000-of-00001.parquet").unlink()
    words = [word.format(split) for split in lacking]
    command_line.check(["data=hub", f"data.hub.id={hub_folder}", "data.labels=[bad,good]", *words])
    table = load(_hub(config, hub_folder, *words))
    expected = (
        {"train": 36, "validation": 4, "test": 2} if len(lacking) == 1 else {"train": 32, "validation": 4, "test": 4}
    )
    assert {split: frame.height for split, frame in table.splits.items()} == expected


def test_test_split_alone_of_a_hub_set_is_not_divided(config: Configure, hub_folder: Path) -> None:
    table = load(_hub(config, hub_folder, "data.hub.splits.train=null", "~data.hub.splits.validation"))
    assert {split: frame.height for split, frame in table.splits.items()} == {"train": 0, "validation": 0, "test": 1}


def test_split_that_the_hub_set_lacks_is_reported_with_the_fix(config: Configure, hub_folder: Path) -> None:
    (hub_folder / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"\(split validation\) cannot be .* data\.hub\.splits\.validation=null\."):
        sources.collect_hub(_hub(config, hub_folder))


def test_a_missing_hub_data_set_is_reported(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.hub: .*nowhere \(split train\) cannot be loaded: .* data\.hub\.id=<folder>"
    ):
        sources.collect_hub(_hub(config, tmp_path / "nowhere"))


def test_hub_without_splits_is_reported(config: Configure, hub_folder: Path) -> None:
    data = _hub(config, hub_folder)
    assert data.hub is not None
    with pytest.raises(DataError, match=r"data\.hub\.splits: names no split of "):
        sources.collect_hub(data.model_copy(update={"hub": data.hub.model_copy(update={"splits": {}})}))


def test_a_public_set_of_the_hub_is_read_from_files_that_are_given(config: Configure, tmp_path: Path) -> None:
    """data=tfns: the hub's validation split is the test split, its numbers are classes; files have words."""
    import datasets

    words = {"0": "negative", "1": "positive", "2": "neutral"}
    for split, theirs in (("train", "train"), ("validation", "test")):
        rows = [{"text": f"{split} {number}", "label": number % 3} for number in range(30)]
        (tmp_path / "hub").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "hub" / f"{split}-00000-of-00001.parquet"))
        (tmp_path / "files").mkdir(exist_ok=True)
        lines = [f"{row['text']},{words[str(row['label'])]}" for row in rows]
        (tmp_path / "files" / f"{theirs}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    hub = load(config("data=tfns", f"data.hub.id={tmp_path / 'hub'}", "data.cache=null").data)
    files = load(config("data=tfns", f"data.files={tmp_path / 'files'}", "data.cache=null").data)
    assert {split: len(part) for split, part in files.splits.items()} == {"train": 27, "validation": 3, "test": 30}
    for split, part in files.splits.items():
        assert set(part["text"]) == set(hub.splits[split]["text"])
        assert dict(part.select("text", "label").iter_rows()) == dict(
            hub.splits[split].select("text", "label").iter_rows()
        )
    assert files.labels.names == hub.labels.names == ("negative", "neutral", "positive")


PUBLIC = {  # columns as the hub's set has them, a label of it, and what becomes of it
    "nwgi": ({"train": 30, "test": 6}, "news", "label", "mildly positive", "neutral"),
    "finfe": ({"train": 30, "test": 6}, "sentence", "label", 2, "positive"),
    "openfindata_intent": ({"train": 30, "validation": 6, "test": 6}, "instruction", "output", "B", "个股问询"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_set_is_read_with_the_columns_of_the_hub(config: Configure, tmp_path: Path, name: str) -> None:
    """A folder in the hub's format; its test rows are the test split, and none of them is trained on."""
    import datasets

    heights, text, label, written, meant = PUBLIC[name]
    for split, rows in heights.items():
        made = [{text: f"问句: {split} {number}\n\n选项", label: written, "input": ""} for number in range(rows)]
        datasets.Dataset.from_list(made).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    words = (f"data={name}", "data.files=null", f"data.hub.id={tmp_path}", "data.hub.revision=main", "data.cache=null")
    table = load(config(*words).data)
    assert {table.labels.names[label] for label in table.splits["test"]["label"]} == {meant}
    assert table.splits["test"].height == heights["test"]
    assert table.splits["train"].height + table.splits["validation"].height == sum(heights.values()) - heights["test"]
    assert not set(table.splits["test"]["text"]) & set(table.splits["train"]["text"])
    if name == "openfindata_intent":
        assert table.splits["test"]["text"][0] == "test 0"  # cut out of the wording


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "folder", "heights"),
    [("nwgi", "published_nwgi_en", (0, 0, 4047)), ("finfe", "finfe_forum", (9198, 1150, 1150))],
)
def test_copies_of_public_sets_give_the_same_classes(
    config: Configure, shared_data: Path, name: str, folder: str, heights: tuple[int, ...]
) -> None:
    words = (f"data={name}", f"data.files={shared_data / folder}", "data.columns.text=text", "data.cache=null")
    table = load(config(*words).data)
    assert tuple(table.splits[split].height for split in ("train", "validation", "test")) == heights
    assert table.ledger.notes == []
    if name == "nwgi":  # the fold of FinGPT: 646 + 534 mild ones are neutral
        assert table.ledger.splits["test"] == {"negative": 733 + 75, "neutral": 491 + 646 + 534, "positive": 1522 + 46}


def test_the_commit_of_a_hub_set_is_noted() -> None:
    folder = "/root/.cache/huggingface/datasets/owner___name/default/0.0.0"
    kept = [{"filename": f"{folder}/{'0a' * 20}/name-train.arrow"}]
    assert sources._commits(kept) == {"0a" * 20}
    assert sources._commits([{"filename": f"{folder}/0123456789abcdef/name-train.arrow"}]) == set()
