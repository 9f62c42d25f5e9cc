"""Read tables of any common format into rows of id, text, label, domain."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from glob import glob
from pathlib import Path

import polars as pl

from finsa.config import ROOT, Columns, Data, locate
from finsa.errors import DataError, nearest, suggest

# Text stays text: a column of digits is no number here, and 007 keeps its zeros.
_csv = partial(pl.read_csv, infer_schema=False)
READERS: dict[str, Callable[..., pl.DataFrame]] = {
    ".csv": _csv,
    ".tsv": partial(_csv, separator="\t"),
    ".jsonl": partial(pl.read_ndjson, infer_schema_length=None),
    ".json": partial(pl.read_json, infer_schema_length=None),
    ".parquet": pl.read_parquet,
}
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
        raise DataError(f"data.files: data={data.name} needs files; for instance data.files=<folder or file>")
    written = [data.files] if isinstance(data.files, str) else list(data.files)
    found: dict[Path, str | None] = {}
    for entry in written:
        found |= _expand(entry, data)
    silent = [file.name for file, split in found.items() if split is None]
    if silent and len(silent) < len(found):
        raise DataError(f"data.files: {silent[0]} names no split while others do; call it train, valid or test")
    return found


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


def read(file: Path, columns: Columns) -> pl.DataFrame:
    """Read one table.

    Returns:
        Text columns id, text, label, domain; missing values stay null.

    Raises:
        DataError: for an unknown format, an unreadable file or a missing column.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"data.files: {file}: format {file.suffix or '(none)'} is not read. {suggest('', READERS)}")
    try:
        table = reader(file)
    except (pl.exceptions.PolarsError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"data.files: {file} cannot be read: {str(error).splitlines()[0]}") from None
    picked = [_column(table, file, columns, name) for name in ("text", "label")]
    picked += [_optional(table, file, columns.id, "id"), _optional(table, file, columns.domain, "domain")]
    return table.select(picked).select("id", "text", "label", "domain")


def _column(table: pl.DataFrame, file: Path, columns: Columns, name: str) -> pl.Expr:
    wanted = str(getattr(columns, name))
    if wanted not in table.columns:
        raise _missing(table, file, wanted, name)
    if table.schema[wanted].is_nested():
        raise DataError(f"data.columns.{name}: column '{wanted}' of {file} holds {table.schema[wanted]}, not text")
    return pl.col(wanted).cast(pl.String).alias(name)


def _missing(table: pl.DataFrame, file: Path, wanted: str, name: str) -> DataError:
    has = ", ".join(table.columns)
    near = nearest(wanted, table.columns)
    hint = f"Did you mean data.columns.{name}={near}?" if near else f"Set data.columns.{name}=<column>."
    return DataError(f"data.columns.{name}: {file} has no column '{wanted}'; it has {has}. {hint}")


def _optional(table: pl.DataFrame, file: Path, wanted: str | None, name: str) -> pl.Expr:
    if wanted not in (None, name, *table.columns):  # the default name may be absent, a name the user wrote may not
        raise _missing(table, file, str(wanted), name)
    given = pl.col(str(wanted)).cast(pl.String) if wanted in table.columns else pl.lit(None, dtype=pl.String)
    if name == "id":
        numbers = pl.Series("id", [f"{file.stem}-{row + 1}" for row in range(table.height)], dtype=pl.String)
        given = pl.coalesce(given, pl.lit(numbers))
    return given.alias(name)
