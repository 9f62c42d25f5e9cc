"""Find a data set's files, read them, or load a set of the hub; all rows in one shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Data, locate
from finsa.data import cleaning
from finsa.data.discovery import find_files, origin
from finsa.data.hub import cache_alone, refusal
from finsa.data.readers import FATE, LINE, columnar, first_line
from finsa.data.readers import read as read_raw
from finsa.data.schema import FIXED, has_text, shape
from finsa.errors import DataError

SHAPE = ("id", "text", "label", "domain", "parent", "group", "split", "file", "part", LINE, FATE, FIXED)


def all_files(data: Data) -> list[Path]:
    """All files that a data set is read from, those of a mixture's parts included."""
    if data.source == "mixture":
        found = list[Path]()
        for name, part in (data.parts or {}).items():
            with telling_part(name):
                found += all_files(part)
        return found
    if not only_files(data):
        return []
    return list(article_files(data) if data.source == "articles" else find_files(data))


@contextmanager
def telling_part(name: str) -> Iterator[None]:
    """Errors within are those of a mixture's part."""
    try:
        yield
    except DataError as error:
        raise DataError(of_part(str(error), name)) from None


def of_part(text: str, name: str) -> str:
    """Write the keys in a message as they have to be written to mean this part of a mixture."""
    return re.sub(rf"(?<![\w./])data\.(?=({'|'.join(Data.model_fields)})\b)", f"data.parts.{name}.", text)


def only_files(data: Data) -> bool:
    """Whether all rows come from files; others are drawn, or fetched by a library that keeps its own files."""
    return data.generator is None and not data.from_hub and all(map(only_files, (data.parts or {}).values()))


def article_files(data: Data) -> tuple[Path, Path]:
    """The file of articles and the file of their labels, in the one folder ``data.files``.

    Raises:
        DataError: where there is no such folder, or a file is missing in it.
    """
    assert data.articles is not None
    written = (data.files,) if isinstance(data.files, str) else tuple(data.files or ())
    if len(written) != 1 or isinstance(data.files, dict) or locate(written[0]).is_file():
        names = f"{data.articles.news} and {data.articles.labels}"
        raise DataError(
            f"data.files: data={data.name} needs one folder that holds {names} (data.articles.news, "
            f"data.articles.labels), not {data.files}{origin(data)}"
        )
    news, labels = (locate(written[0]) / name for name in (data.articles.news, data.articles.labels))
    for file in (news, labels):
        if not file.is_file():
            raise DataError(f"data.files: no such file: {file}.{origin(data)}")
    return news, labels


@dataclass
class Rows:
    """Rows in one shape, before anything is decided about them.

    Args:
        frame: text columns id, text, label, domain, parent, group, split, file, ``FATE``, part (of a mixture), and the
            number ``LINE``; of these, what is not there is null, and others are left out. ``FIXED`` counts the leading
            characters of the text that are never truncated; 0 where it is not there.
        declared: splits that have a file of their own.
        notes: what the user should know about the files.
    """

    frame: pl.DataFrame
    declared: set[str]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        missing = [pl.lit(None, dtype=pl.String).alias(name) for name in SHAPE if name not in self.frame.columns]
        fixed = pl.col(FIXED).cast(pl.Int64).fill_null(0)
        self.frame = self.frame.with_columns(missing).with_columns(fixed).select(SHAPE)

    def counts(self) -> Counter[str]:
        """Rows per file."""
        return Counter(dict(self.frame.group_by("file", maintain_order=True).len().iter_rows()))


def collect(data: Data, files: dict[Path, str | None]) -> Rows:
    """Read all files of a data set.

    Raises:
        DataError: for an unknown format, an unreadable file, or a missing column.
    """
    parts, notes, used = [], list[str](), set[str]()
    for file, split in files.items():
        raw = read_raw(file, data.csv, partial(has_text, data))
        parts.append(_placed(shape(raw, data, str(file), file.stem), split, str(file)))
        notes += raw.notes
        used |= raw.mapped
    frame = pl.concat(parts)
    if not frame.height:
        names = ", ".join(str(file) for file in files)
        raise DataError(f"data.files: there are no rows in {names}, only a header; give a file with rows")
    empty = [file.name for file, part in zip(files, parts, strict=True) if not part.height]
    notes += [f"{name}: has a header and no rows" for name in empty]
    notes += cleaning.unused_keys(data, used, frame["label"])
    return Rows(frame, {split for split in files.values() if split is not None}, notes)


def collect_hub(data: Data) -> Rows:
    """Load a set by the datasets library: an id of its hub, or a local folder that it can read.

    Raises:
        DataError: where it cannot be had, or has not the splits or columns that are named.
    """
    assert data.hub is not None
    if data.hub.id is None:
        raise DataError("data.hub.id: source=hub needs a set: data.hub.id=<owner/name>, or a folder")
    import datasets

    parts, notes, used, hub = [], list[str](), set[str](), data.hub
    refused = refusal(data.hub.id)
    splits = {split: theirs for split, theirs in hub.splits.items() if theirs is not None}
    for split, theirs in splits.items():
        try:
            with cache_alone(refused):
                loaded = datasets.load_dataset(hub.id, hub.config, split=theirs, revision=hub.revision)
            raw = columnar(_named(pl.DataFrame(pl.from_arrow(loaded.data.table)), loaded.features))
        except Exception as error:  # of any of the libraries behind it
            reason = (first_line(error) if refused is None or isinstance(error, ValueError) else refused).rstrip(".")
            raise DataError(
                f"data.hub: {hub.id} (split {theirs}) cannot be loaded: {reason}. For a split that it lacks set "
                f"data.hub.splits.{split}=null. Without network, download it elsewhere and set data.hub.id=<folder> or "
                "data=table data.files=<folder>"
            ) from None
        place = f"{hub.id}:{theirs}"
        notes += [f"data.hub: {hub.id} at commit {commit}" for commit in _commits(loaded.cache_files) if not notes]
        parts.append(_placed(shape(raw, data, place, theirs), split, place))
        notes += raw.notes
        used |= raw.mapped
    if not parts:
        raise DataError(f"data.hub.splits: names no split of {hub.id}; for instance data.hub.splits.train=train")
    frame = pl.concat(parts)
    notes += cleaning.unused_keys(data, used, frame["label"])
    return Rows(frame, set(splits), notes)


def _commits(kept: list[dict[str, str]]) -> set[str]:
    """Commits of a hub's set, which the datasets library names the folders of its cache after."""
    names = {Path(file["filename"]).parent.name for file in kept}
    return {name for name in names if re.fullmatch("[0-9a-f]{40}", name)}


def _named(table: pl.DataFrame, features: dict[str, Any]) -> pl.DataFrame:
    """Write the numbers of class labels as their names; -1, which is none of them, as null."""
    names = {name: dict(enumerate(kind.names)) for name, kind in features.items() if hasattr(kind, "int2str")}
    return table.with_columns(
        pl.col(name).replace_strict(numbers, default=None, return_dtype=pl.String) for name, numbers in names.items()
    )


def _placed(frame: pl.DataFrame, split: str | None, place: str) -> pl.DataFrame:
    return frame.with_columns(pl.lit(split, dtype=pl.String).alias("split"), pl.lit(place).alias("file"))
