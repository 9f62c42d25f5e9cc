"""A written folder appears atomically, replaces nothing, and comes with the command that reads it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from finsa.config import RunConfig
from finsa.data import dataset_writer
from finsa.errors import RunError

Configure = Callable[..., RunConfig]
ROWS = pl.DataFrame({"id": ["1"], "text": ["涨\n了"], "label": ["利好"]})


def test_the_folder_appears_atomically_with_the_journal_and_without_old_files(tmp_path: Path) -> None:
    partial = dataset_writer.partial_folder(str(tmp_path / "new" / "out"))
    assert partial == tmp_path / "new" / "out.partial"
    assert not partial.parent.exists(), "nothing is made before there is something to keep"
    (partial / "old").mkdir(parents=True)
    for name in ("answers.jsonl", "test.csv", "old/x"):
        (partial / name).write_text("left", encoding="utf-8")
    folder = dataset_writer.publish(partial, {"train": ROWS, "validation": ROWS}, ("recipe.json", {"种子": 1}))
    assert folder == tmp_path / "new" / "out"
    assert not partial.exists()
    assert sorted(file.name for file in folder.iterdir()) == ["answers.jsonl", "recipe.json", "train.csv", "valid.csv"]
    assert pl.read_csv(folder / "train.csv", infer_schema=False).equals(ROWS)
    assert json.loads((folder / "recipe.json").read_text(encoding="utf-8")) == {"种子": 1}


def test_an_empty_folder_is_treated_as_missing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    partial = dataset_writer.partial_folder(str(tmp_path / "out"))
    assert dataset_writer.publish(partial, {"train": ROWS}, ("recipe.json", {})) == tmp_path / "out"


@pytest.mark.parametrize("name", ["folder", "file", "file/below"])
def test_existing_files_are_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("x", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match="output: .* name another folder"):
        dataset_writer.partial_folder(str(tmp_path / name))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=sample"], "data=sample data.files=/out"),
        (["data=generated"], "data=generated data.files=/out data.generator=null"),
        (["data=openfindata_intent"], "data=openfindata_intent data.files=/out data.source=table data.extract=null "
         "data.label_map=null data.columns.id=id data.columns.text=text data.columns.label=label "
         "data.columns.parent=parent"),
        (["data=table", "data.files=x", "data.columns.text=post", "data.columns.id=null", "data.columns.group=user"],
         "data=table data.files=/out data.columns.id=id data.columns.text=text data.columns.group=null"),
    ],
)  # fmt: skip
def test_the_suggested_command_keeps_prompt_and_labels(config: Configure, overrides: list[str], expected: str) -> None:
    data = config(*overrides).data
    said = dataset_writer.overrides(data, Path("/out"), ("id", "text", "label", "domain", "parent"))
    assert said == expected
    read = config(*shlex.split(said)).data
    assert (read.prompt, read.labels, read.source, read.files) == (data.prompt, data.labels, "table", "/out")
    assert (read.columns.text, read.columns.parent, read.extract, read.generator) == ("text", "parent", None, None)
