"""Find a data set's files and bring what they hold into one shape: id, text, label, domain, parent, group."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import ROOT, Columns, Data, locate
from finsa.data.readers import FATE, LINE, READERS, Raw, columnar
from finsa.data.readers import read as read_raw
from finsa.errors import DataError, nearest

SPLIT_OF_STEM = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def find_files(data: Data) -> dict[Path, str | None]:
    """Find the files of a data set.

    Returns:
        Files in a fixed order, each with the split its name states, or None. Where a folder has files named after
        splits, its other files are left alone.

    Raises:
        DataError: for a missing path, with where the data set comes from; or for a folder without tables.
    """
    if not data.files:
        raise DataError(f"data.files: data={data.name} needs files; for instance data.files=<folder or file>{_origin(data)}")
    written = [data.files] if isinstance(data.files, str) else list(data.files)
    found: dict[Path, str | None] = {}
    for entry in written:
        found |= _expand(entry, data)
    silent = [file.name for file, split in found.items() if split is None]
    if silent and len(silent) < len(found):
        raise DataError(f"data.files: {silent[0]} names no split while others do; call it train, valid or test")
    return found


def all_files(data: Data) -> list[Path]:
    """All files that a data set is read from, those of a mixture's parts included; none for drawn or fetched rows."""
    if data.generator is not None or data.source == "hub":
        return []
    if data.parts:
        return [file for part in data.parts.values() for file in all_files(part)]
    if data.source == "articles" and data.articles is not None:
        folder = locate(str(data.files))
        return [file for file in (folder / data.articles.news, folder / data.articles.labels) if file.is_file()]
    return list(find_files(data))


def _expand(entry: str, data: Data) -> dict[Path, str | None]:
    path = locate(entry)
    if not path.exists() and any(sign in entry for sign in "*?["):
        matches = glob(entry, recursive=True) or glob(str(ROOT / entry), recursive=True)  # noqa: PTH207 - may be absolute
        if not matches:
            raise DataError(f"data.files: nothing matches {entry}")
        return _splits(Path(match).absolute() for match in matches)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise DataError(f"data.files: no {', '.join(READERS)} file in {path}{_origin(data)}")
        named = _splits(files)
        return {file: split for file, split in named.items() if split} if any(named.values()) else named
    if not path.is_file():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        hint = f" Did you mean '{path.with_name(near)}'?" if near else ""
        raise DataError(f"data.files: no such file or folder: {path}.{hint}{_origin(data)}")
    return _splits([path])


def _splits(files: Iterable[Path]) -> dict[Path, str | None]:
    return {file: SPLIT_OF_STEM.get(file.stem.lower()) for file in sorted(files)}


def _origin(data: Data) -> str:
    return f"\n  data={data.name} is {data.origin}" if data.origin else ""


@dataclass
class Rows:
    """Rows in one shape, before anything is decided about them.

    Args:
        frame: text columns id, text, label, domain, parent, group, split, file, fate, and the number ``line``.
        declared: splits that have a file of their own.
        notes: what the user should know about the files.
    """

    frame: pl.DataFrame
    declared: set[str]
    notes: list[str] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        """Rows per file."""
        return Counter(dict(self.frame.group_by("file", maintain_order=True).len().iter_rows()))


def collect(data: Data, files: dict[Path, str | None]) -> Rows:
    """Read all files of a data set.

    Raises:
        DataError: for an unknown format, an unreadable file, or a missing column.
    """
    parts, notes = [], list[str]()
    for file, split in files.items():
        raw = read_raw(file)
        parts.append(_placed(shape(raw, data, str(file), file.stem), split, str(file)))
        notes += raw.notes
    return Rows(pl.concat(parts), {split for split in files.values() if split is not None}, notes)


def collect_hub(data: Data) -> Rows:
    """Load a set by the datasets library: an id of its hub, or a local folder that it can read.

    Raises:
        DataError: where it cannot be had, or has not the splits or columns that are named.
    """
    assert data.hub is not None
    import datasets

    parts, hub = [], data.hub
    for split, theirs in hub.splits.items():
        try:
            loaded = datasets.load_dataset(hub.id, hub.config, split=theirs, revision=hub.revision)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"data.hub: {hub.id} (split {theirs}) cannot be loaded: {reason}. Without network, download it elsewhere "
                "and set data.hub.id=<folder>, or data=table data.files=<folder>"
            ) from None
        table = pl.DataFrame(pl.from_arrow(loaded.data.table))
        for name, feature in loaded.features.items():
            if isinstance(feature, datasets.ClassLabel):
                names = dict(enumerate(feature.names))
                table = table.with_columns(pl.col(name).replace_strict(names, default=None, return_dtype=pl.String))
        place = f"{hub.id}:{theirs}"
        parts.append(_placed(shape(columnar(table), data, place, theirs), split, place))
    return Rows(pl.concat(parts), set(hub.splits) if len(hub.splits) > 1 else set())


def _placed(frame: pl.DataFrame, split: str | None, place: str) -> pl.DataFrame:
    return frame.with_columns(pl.lit(split, dtype=pl.String).alias("split"), pl.lit(place).alias("file"))


def shape(raw: Raw, data: Data, place: str, stem: str) -> pl.DataFrame:
    """Bring a file's own columns into the common shape.

    Args:
        raw: the file as read.
        data: says what the columns are called and what is made of them.
        place: named in errors.
        stem: begins the ids of rows that have none.

    Returns:
        Columns id, text, label, domain, parent, group, line, fate.
    """
    raw, columns = _as_table(raw, data, place)
    _check_text(raw, columns, place)
    frame = raw.frame
    picked = [_column(frame, place, columns, name) for name in ("text", "label")]
    picked += [_optional(frame, place, columns, name) for name in ("domain", "parent", "group")]
    numbers = pl.format(f"{stem.replace('{', '{{').replace('}', '}}')}-{{}}", pl.int_range(1, pl.len() + 1))
    picked.append(pl.coalesce(_optional(frame, place, columns, "id"), numbers).alias("id"))
    shaped = frame.select(*picked, LINE, FATE)
    if data.options:
        shaped = _chosen_option(shaped, frame, data.options, place)
    if data.extract:
        found = pl.col("text").str.extract(f"(?s){data.extract}", 1)
        missed = pl.col(FATE).is_null() & found.is_null() & pl.col("text").is_not_null()
        fate = pl.when(missed).then(pl.lit("unreadable: data.extract finds nothing")).otherwise(pl.col(FATE))
        shaped = shaped.with_columns(fate.alias(FATE), pl.coalesce(found, "text").alias("text"))
    if data.label_map:
        shaped = shaped.with_columns(pl.col("label").str.strip_chars().replace(data.label_map))
    return shaped.select("id", "text", "label", "domain", "parent", "group", LINE, FATE)


def _as_table(raw: Raw, data: Data, place: str) -> tuple[Raw, Columns]:
    """Turn instruction and chat records into a table of text and label."""
    columns, frame = data.columns, raw.frame
    if data.source == "alpaca":
        _require(frame, place, ("instruction", "output"))
        given = pl.col("input") if "input" in frame.columns else pl.lit("")
        given = given.fill_null("").str.strip_chars()
        text = pl.when(given == "").then("instruction").otherwise(pl.concat_str("instruction", pl.lit("\n"), given))
        frame = frame.with_columns(text.alias("_text"), pl.col("output").alias("_label"))
    elif data.source == "messages":
        name = next((name for name in ("messages", "conversations") if name in frame.columns), None)
        if name is None:
            _require(frame, place, ("messages",))
        pairs = [_last_exchange(chat) for chat in frame[name].to_list()]
        fates = pl.Series([None if text and label else "unreadable: no user turn with an answer" for text, label in pairs])
        frame = frame.with_columns(
            pl.Series("_text", [text for text, _ in pairs], dtype=pl.String),
            pl.Series("_label", [label for _, label in pairs], dtype=pl.String),
            pl.coalesce(FATE, fates.cast(pl.String)).alias(FATE),
        )
    else:
        return raw, columns
    return Raw(frame, raw.notes), columns.model_copy(update={"text": "_text", "label": "_label"})


def _last_exchange(chat: str | None) -> tuple[str | None, str | None]:
    """The last user turn and the answer to it, of OpenAI's form (role, content) or ShareGPT's (from, value)."""
    try:
        turns: list[dict[str, Any]] = json.loads(chat or "null") or []
        said = [(str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value"))) for turn in turns]
    except (ValueError, AttributeError, TypeError):
        return None, None
    text = next((content for role, content in reversed(said) if role in ("user", "human")), None)
    answered = said and said[-1][0] in ("assistant", "gpt")
    label = said[-1][1] if answered else None
    return (text if isinstance(text, str) else None), (label if isinstance(label, str) else None)


def _chosen_option(shaped: pl.DataFrame, frame: pl.DataFrame, options: tuple[str, ...], place: str) -> pl.DataFrame:
    """Replace a label that names an option by that option's text; a letter that is no option stays, as unknown."""
    _require(frame, place, options)
    letter = shaped["label"].str.strip_chars()
    chosen = pl.coalesce(
        *(pl.when(letter == option).then(frame[option].str.strip_chars()) for option in options), letter
    )
    return shaped.with_columns(chosen.alias("label"))


def _check_text(raw: Raw, columns: Columns, place: str) -> None:
    kind = raw.kinds.get(columns.text)
    if kind is not None:
        raise DataError(f"data.columns.text: column '{columns.text}' of {place} holds {kind}, not text. Name another")


def _require(frame: pl.DataFrame, place: str, wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        has = ", ".join(name for name in frame.columns if name not in (LINE, FATE))
        raise DataError(f"data.files: {place} has no field '{missing[0]}'; it has {has}")


def _column(frame: pl.DataFrame, place: str, columns: Columns, name: str) -> pl.Expr:
    wanted = str(getattr(columns, name))
    if wanted not in frame.columns:
        raise _missing(frame, place, wanted, name)
    return pl.col(wanted).alias(name)


def _missing(frame: pl.DataFrame, place: str, wanted: str, name: str) -> DataError:
    names = [column for column in frame.columns if column not in (LINE, FATE)]
    near = nearest(wanted, names)
    hint = f"Did you mean data.columns.{name}={near}?" if near else f"Set data.columns.{name}=<column>."
    return DataError(f"data.columns.{name}: {place} has no column '{wanted}'; it has {', '.join(names)}. {hint}")


def _optional(frame: pl.DataFrame, place: str, columns: Columns, name: str) -> pl.Expr:
    wanted = getattr(columns, name)
    if wanted not in (None, name, *frame.columns):  # the default name may be absent, a name the user wrote may not
        raise _missing(frame, place, str(wanted), name)
    given = pl.col(str(wanted)) if wanted in frame.columns else pl.lit(None, dtype=pl.String)
    return given.alias(name)
