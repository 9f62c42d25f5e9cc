"""Data sets that a stage writes: prepared in a folder next to the output, which is renamed when it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Data
from finsa.runs import files, locks

FILE_OF_SPLIT = {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"}
ANSWERS = "answers.jsonl"


def partial_folder(output: str | None) -> Path:
    """The folder in which an output is prepared, ``<output>.partial``; it is not created yet.

    Raises:
        RunError: if the output already exists.
    """
    place = Path(str(output)).absolute()
    files.require_new(place)
    return place.with_name(f"{place.name}.partial")


@contextmanager
def claimed(output: str | None) -> Iterator[Path]:
    """The folder in which an output is prepared, with a lock against other processes.

    Raises:
        RunError: if the output already exists, or another process is writing it.
    """
    partial = partial_folder(output)
    with locks.creating(_finished(partial)):
        yield partial


def _finished(partial: Path) -> Path:
    return partial.with_name(partial.name.removesuffix(".partial"))


def publish(partial: Path, splits: Mapping[str, pl.DataFrame], recipe: tuple[str, Mapping[str, Any]]) -> Path:
    """Write rows and recipe, and rename the folder to its final name.

    Args:
        partial: from `partial_folder`; of an interrupted command, only the journal of answers is kept.
        splits: rows by split.
        recipe: name and content of a JSON file.

    Returns:
        The finished folder.
    """
    partial.mkdir(parents=True, exist_ok=True)
    for left in partial.iterdir():
        if left.name != ANSWERS:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    for split, rows in splits.items():
        rows.write_csv(partial / FILE_OF_SPLIT[split])
    name, content = recipe
    (partial / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    files.sync_tree(partial)
    finished = partial.rename(_finished(partial))
    files.sync(finished.parent)
    return finished


def overrides(data: Data, folder: Path, columns: Iterable[str]) -> str:
    """Overrides of a command that reads a written folder, with prompt and labels of the original data set.

    Args:
        data: the original data set.
        folder: the written folder.
        columns: of its files.
    """
    words = [f"data={data.name}", f"data.files={folder}"]
    if data.source != "table":
        words.append("data.source=table")
    for key in ("generator", "options", "extract", "label_map", "ratios"):
        if getattr(data, key) is not None:
            words.append(f"data.{key}=null")
    for column in columns:
        if getattr(data.columns, column) not in (column, None if column == "domain" else column):
            words.append(f"data.columns.{column}={column}")
    return " ".join([*words, *["data.columns.group=null"] * (data.columns.group is not None)])
