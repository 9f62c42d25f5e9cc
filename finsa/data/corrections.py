"""Corrections of labels: a file of decisions, as the page of stage=noise writes it, applied to the rows it names."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import polars as pl

from finsa.config import Data, locate
from finsa.data.cleaning import OPEN, mark
from finsa.data.labels import LabelSpace
from finsa.errors import DataError, counted, suggest

COLUMNS = ("id", "fingerprint", "given", "action", "label")
ACTIONS = ("keep", "relabel", "drop")
DROPPED = "correction: dropped"


def fingerprint(text: str, target: str | None) -> str:
    """Hash of a text and its target, by which a correction finds its row even if ids occur twice."""
    return hashlib.sha256(f"{target or ''}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def files(data: Data) -> list[Path]:
    """The files of corrections of a data set and of its parts.

    Raises:
        DataError: for a file that does not exist.
    """
    found = [file for part in (data.parts or {}).values() for file in files(part)]
    if data.corrections is not None:
        place = locate(data.corrections)
        if not place.is_file():
            raise DataError(f"data.corrections: no such file: {place}; stage=noise writes a page that downloads one")
        found.append(place)
    return found


def apply(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    """Relabel and drop rows as ``data.corrections`` says.

    Raises:
        DataError: for a correction that cannot be read, has an unknown action or label, or fits no row.
    """
    if data.corrections is None:
        return frame, []
    place = locate(data.corrections)
    try:
        read = pl.read_csv(place, infer_schema=False).select(COLUMNS).with_row_index("_line", offset=2)
    except (pl.exceptions.PolarsError, OSError):
        raise DataError(f"data.corrections: {place} is not a CSV file with the columns {', '.join(COLUMNS)}") from None
    label, action = pl.col("label"), pl.col("action")
    unknown = (action == "relabel") & ~label.is_in(list(labels.names)).fill_null(False)
    faults = {
        "action": (~action.is_in(ACTIONS).fill_null(False), f"an action is {', '.join(ACTIONS)}."),
        "label": (unknown, f"the labels are {', '.join(labels.names)}."),
        "id": (~pl.struct("id", "fingerprint").is_first_distinct(), "each row has one correction."),
    }
    for column, (condition, known) in faults.items():
        for line, value in read.filter(condition).select("_line", column).head(1).iter_rows():
            what = (
                f"no {column}"
                if value is None
                else f"the {column} '{value}'{' a second time' if column == 'id' else ''}"
            )
            hint = f" {suggest(value, labels.names)}" if column == "label" and value else ""
            raise DataError(f"data.corrections: {place}:{line} has {what}; {known}{hint}")
    named = frame.with_row_index("_row").filter(OPEN & pl.col("id").is_in(read["id"].implode()))
    prints = map(fingerprint, named["text"], named["target"])
    keyed = named.select("_row", "id", pl.col("label").alias("_now")).with_columns(
        pl.Series("fingerprint", prints, dtype=pl.String)
    )
    joined = read.join(keyed, on=["id", "fingerprint"], how="left").sort("_line")
    lost = joined.filter(pl.col("_row").is_null() | (pl.col("_now") != pl.col("given")))
    if lost.height:
        first = lost.row(0, named=True)
        fault = "no row with that id and text" if first["_row"] is None else f"now has the label '{first['_now']}'"
        raise DataError(
            f"data.corrections: {counted(lost.height, 'correction')} of {place} fit no row. The first is line "
            f"{first['_line']}, id '{first['id']}' with the label '{first['given']}': {fault}. Write the file again "
            "with stage=noise on these rows, or remove these lines"
        )
    new = dict(joined.filter(action == "relabel").select("_row", "label").iter_rows())
    dropped = joined.filter(action == "drop")["_row"]
    frame = frame.with_row_index("_row").with_columns(
        pl.coalesce(pl.col("_row").replace_strict(new, default=None, return_dtype=pl.String), "label").alias("label")
    )
    frame = mark(frame, pl.col("_row").is_in(dropped.implode()), DROPPED).drop("_row")
    done = Counter(joined["action"])
    moves = Counter(
        f"{old} to {now}" for old, now in joined.filter(action == "relabel").select("given", "label").rows()
    )
    listed = f" ({', '.join(f'{move} {count:,}' for move, count in moves.most_common(6))})" if moves else ""
    return frame, [
        f"{place.name}: {counted(joined.height, 'correction')}: {done['keep']:,} kept, {done['relabel']:,} relabeled"
        f"{listed}, {done['drop']:,} dropped"
    ]
