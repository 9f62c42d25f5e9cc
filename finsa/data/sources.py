"""Rows of files, of the hub and of the generator, all in the common schema."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import polars as pl

from finsa.config import Data, locate
from finsa.data import labels, splits
from finsa.data.discovery import find_files, origin
from finsa.data.hub import cache_alone, refusal
from finsa.data.readers import FATE, LINE, columnar, first_line, read
from finsa.data.schema import FIXED, has_text, shape
from finsa.errors import DataError
from finsa.synthetic import generator

SHAPE = (
    *("id", "text", "target", "label", "rejected", "domain", "parent", "group", "rationale", "time"),
    *("split", "file", "part", LINE, FATE, FIXED),
)


@dataclass
class Rows:
    """Rows in the common schema, before cleaning and splitting.

    Args:
        frame: text columns id, text, target, label, rejected, domain, parent, group, rationale, time, split, file,
            ``FATE``, part (of a mixture), and the number ``LINE``; missing ones are added as null, others are left out.
            ``FIXED`` counts the leading characters of the text that are never truncated; 0 if it is missing.
        declared: splits that have files.
        notes: on the files, for the user.
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


# ------------------------------------------------------------------------------------------------ which files


def only_files(data: Data) -> bool:
    """Whether all rows are read from files, rather than generated or downloaded by a library with a cache."""
    return data.generator is None and not data.from_hub and all(map(only_files, (data.parts or {}).values()))


def all_files(data: Data) -> list[Path]:
    """All files of a data set, including those of the parts of a mixture."""
    if data.source == "mixture":
        found = list[Path]()
        for name, part in (data.parts or {}).items():
            with errors_of_part(name):
                found += all_files(part)
        return found
    if not only_files(data):
        return []
    return list(article_files(data) if data.source == "articles" else find_files(data))


def article_files(data: Data) -> tuple[Path, Path]:
    """The file of articles and the file of their labels, in the one folder ``data.files``.

    Raises:
        DataError: if there is no such folder, or a file is missing in it.
    """
    assert data.articles is not None
    paths = (data.files,) if isinstance(data.files, str) else tuple(data.files or ())
    if len(paths) != 1 or isinstance(data.files, dict) or locate(paths[0]).is_file():
        names = f"{data.articles.news} and {data.articles.labels}"
        raise DataError(
            f"data.files: data={data.name} needs one folder with {names} (data.articles.news, "
            f"data.articles.labels), not {data.files}{origin(data)}"
        )
    news, sentiments = (locate(paths[0]) / name for name in (data.articles.news, data.articles.labels))
    for file in (news, sentiments):
        if not file.is_file():
            raise DataError(f"data.files: no such file: {file}.{origin(data)}")
    return news, sentiments


@contextmanager
def errors_of_part(name: str) -> Iterator[None]:
    """Raise errors with the keys of a mixture's part."""
    try:
        yield
    except DataError as error:
        raise DataError(with_keys_of_part(str(error), name)) from None


def with_keys_of_part(text: str, name: str) -> str:
    """Replace keys in a message by those of a part of a mixture."""
    return re.sub(rf"(?<![\w./])data\.(?=({'|'.join(Data.model_fields)})\b)", f"data.parts.{name}.", text)


# ------------------------------------------------------------------------------------------------ rows


def collect(data: Data, files: dict[Path, str | None]) -> Rows:
    """Read all files of a data set.

    Raises:
        DataError: for an unknown format, an unreadable file, or a missing column.
    """
    parts, notes, used = [], list[str](), set[str]()
    for file, split in files.items():
        raw = read(file, data.csv, partial(has_text, data))
        parts.append(_placed(shape(raw, data, str(file), file.stem), split, str(file)))
        notes += raw.notes
        used |= raw.mapped
    frame = pl.concat(parts)
    if not frame.height:
        names = ", ".join(str(file) for file in files)
        raise DataError(f"data.files: there are no rows in {names}, only a header; give a file with rows")
    empty = [file.name for file, part in zip(files, parts, strict=True) if not part.height]
    notes += [f"{name}: has a header and no rows" for name in empty]
    notes += labels.unused_keys(data, used, frame["label"])
    return Rows(frame, {split for split in files.values() if split is not None}, notes)


def collect_hub(data: Data) -> Rows:
    """Load a data set with the datasets library: from the hub, or from a local folder that it can read.

    Raises:
        DataError: if it cannot be loaded, or lacks the configured splits or columns.
    """
    assert data.hub is not None
    if data.hub.id is None:
        raise DataError("data.hub.id: source=hub needs a set: data.hub.id=<owner/name>, or a folder")
    import datasets  # takes a second, which other sources need not wait for

    parts, notes, used, hub = [], list[str](), set[str](), data.hub
    refused = refusal(data.hub.id)
    wanted = {split: theirs for split, theirs in hub.splits.items() if theirs is not None}
    for split, theirs in wanted.items():
        try:
            with cache_alone(refused):
                loaded = datasets.load_dataset(hub.id, hub.config, split=theirs, revision=hub.revision)
            # Class labels are numbers; they become their names, and -1, which is no class, becomes null.
            classes = {
                name: dict(enumerate(of.names)) for name, of in loaded.features.items() if hasattr(of, "int2str")
            }
            named = (
                pl.col(name).replace_strict(numbers, default=None, return_dtype=pl.String)
                for name, numbers in classes.items()
            )
            raw = columnar(pl.DataFrame(pl.from_arrow(loaded.data.table)).with_columns(named))
        except Exception as error:  # of any library that datasets uses
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
    notes += labels.unused_keys(data, used, frame["label"])
    return Rows(frame, set(wanted), notes)


def _commits(files: list[dict[str, str]]) -> set[str]:
    """Commits of a data set of the hub, after which the datasets library names the folders of its cache."""
    names = {Path(file["filename"]).parent.name for file in files}
    return {name for name in names if re.fullmatch("[0-9a-f]{40}", name)}


def _placed(frame: pl.DataFrame, split: str | None, place: str) -> pl.DataFrame:
    return frame.with_columns(pl.lit(split, dtype=pl.String).alias("split"), pl.lit(place).alias("file"))


def generate(data: Data) -> Rows:
    """Generate rows with the settings of ``data.generator``, and split them by domain and class."""
    settings = data.generator
    assert settings is not None
    made = (settings.rows, settings.seed, settings.domains, settings.imbalance, settings.noise)
    rows = generator.generate(*made, settings.days, settings.drift)
    if settings.days is not None and data.columns.time is None:
        raise DataError("data.generator.days: the rows have times; read them with data.columns.time=time")
    strata = [f"{domain}-{label}" for domain, label in rows.select("domain", "label").iter_rows()]
    assigned = splits.by_class(strata, data.split.validation, data.split.test, data.split.seed)
    by_time = data.split.rule == "time"
    columns = [name for name in ("id", "text", "label", "domain", "time") if name in rows.columns]
    frame = rows.select(columns).with_columns(
        pl.Series("split", [None] * rows.height if by_time else assigned, dtype=pl.String),
        pl.lit(f"generator seed {settings.seed}").alias("file"),
        pl.int_range(1, pl.len() + 1).alias(LINE),
    )
    return Rows(frame, set() if by_time else set(splits.SPLITS))
