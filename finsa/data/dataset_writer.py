"""Folders of rows that a stage writes: prepared beside their place, and put there whole by a rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Data
from finsa.errors import RunError
from finsa.runs import files, locks

FILE_OF_SPLIT = {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"}
ANSWERS = "answers.jsonl"


def preparing(output: str | None) -> Path:
    """Name the folder in which an output is prepared, ``<output>.partial``; nothing is made yet.

    Raises:
        RunError: where the output is there already.
    """
    place = Path(str(output)).absolute()
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise RunError(f"output: {place} is there already; name another folder, or remove it")
    if any(parent.is_file() for parent in place.parents):
        raise RunError(f"output: {place} lies below a file; name another folder")
    return place.with_name(f"{place.name}.partial")


@contextmanager
def claimed(output: str | None) -> Iterator[Path]:
    """Name the folder in which an output is prepared, and keep other processes away from it.

    Raises:
        RunError: where the output is there already, or another process is making it.
    """
    partial = preparing(output)
    with locks.making(_finished(partial)):
        yield partial


def _finished(partial: Path) -> Path:
    return partial.with_name(partial.name.removesuffix(".partial"))


def publish(partial: Path, splits: Mapping[str, pl.DataFrame], recipe: tuple[str, Mapping[str, Any]]) -> Path:
    """Write rows and recipe, and put the folder in its place.

    Args:
        partial: from `preparing`; the journal of answers in it is kept, the rest of a stopped command is not.
        splits: rows by split.
        recipe: a file's name and content.

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


def reading(data: Data, folder: Path, columns: Iterable[str]) -> str:
    """Say how a written folder is read with the prompt and the labels of the data set that it was made for.

    Args:
        data: that data set.
        folder: what was written.
        columns: its columns.

    Returns:
        The overrides of a command.
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
