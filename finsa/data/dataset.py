"""From files to splits: every row is read, gets one fate, and where it is used, one split."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import polars as pl

from finsa.config import Data
from finsa.data import cache, cleaning, discovery, sources, splits
from finsa.data.labels import LabelSpace
from finsa.data.ledger import USED, Ledger
from finsa.data.readers import FATE, LINE
from finsa.data.schema import FIXED
from finsa.data.sources import Rows
from finsa.errors import DataError
from finsa.runs import progress
from finsa.session import Session

EXAMPLES = 3
SHIFTED, LEAST_SHIFTED = 0.25, 100  # total variation of label shares, and held-out rows, from which a note is made
DROPPED = ("file", "line", "id", "text", "label", "fate")


@dataclass(frozen=True)
class Dataset:
    """A data set, read and divided.

    Args:
        splits: train, validation and test; columns id, text, domain, parent, group (text), label (class number) and
            fixed (leading characters of the text that are never truncated).
        labels: the classes in their order.
        ledger: what became of every row.
        fingerprint: hash over ids, texts, labels and splits.
        dropped: rows that are not used: file, line, id, text, label, fate.
    """

    splits: dict[str, pl.DataFrame]
    labels: LabelSpace
    ledger: Ledger
    fingerprint: str
    dropped: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict.fromkeys(DROPPED, pl.String())))

    def sizes(self) -> str:
        """Rows per split, in words."""
        return ", ".join(f"{name} {part.height:,}" for name, part in self.splits.items())

    def require(self, *names: str) -> None:
        """Check that splits have rows.

        Raises:
            DataError: naming the first empty one.
        """
        for name in names:
            if not self.splits[name].height:
                counts = ", ".join(f"{split} {table.height}" for split, table in self.splits.items())
                lost = {bucket: count for bucket, count in self.ledger.buckets.items() if bucket != USED}
                raise DataError(
                    f"the {name} split is empty ({counts}). Give it a file of that name, or assign one, as in "
                    f'"data.files={{{name}: <file>}}", or give more rows to divide; dropped rows: {lost or "none"}'
                )


def load(data: Data, session: Session | None = None) -> Dataset:
    """Read a data set; within a session a second call for the same files and settings returns the same object.

    With ``data.cache`` the finished table is kept on disk under a hash of the files' content, the settings and the
    code that makes it, so a later process reads it instead.

    Raises:
        DataError: for files, columns or labels that cannot be used.
    """
    settings = data.model_dump_json(exclude={"cache", "prompt", "max_length", "corpus", "near_duplicates", "origin"})
    files = sources.all_files(data)
    stamps = [
        (str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in files for stat in (file.stat(),)
    ]
    key = f"{settings}{stamps}"
    shared = session.datasets if session else {}
    if key not in shared:
        build = partial(_make_shown, data, sum(size for _, size, _, _ in stamps))
        # What is drawn or fetched is not kept: there is no file whose content could tell that it is still the same.
        kept = data.cache if sources.only_files(data) and cache.worthwhile(files) else None
        shared[key] = cache.table(kept, settings, files, build) if kept else build()
    return shared[key]


def collect(data: Data) -> Rows:
    """Read the rows of any source; a mixture's are those of its parts, one after the other.

    Raises:
        DataError: for files or columns that cannot be used.
    """
    if data.generator is not None:
        from finsa.data.generate import generate

        return Rows(generate(data), set(splits.SPLITS))
    if data.source == "mixture":
        return _mixture(data)
    if data.from_hub:
        return sources.collect_hub(data)
    if data.source == "articles":
        from finsa.data import articles

        return articles.collect(data)
    found = discovery.find(data)
    rows = sources.collect(data, found.splits)
    rows.notes[:0] = found.notes
    return rows


def _mixture(data: Data) -> Rows:
    """Rows of the parts, each treated and divided by its own rules; the part's name or domain is the rows' domain."""
    frames, notes = [], list[str]()
    for name, part in (data.parts or {}).items():
        part = part.model_copy(update={"labels": part.labels or data.labels})
        with sources.telling_part(name):
            frame, _, said = _prepared(part, collect(part), 0)
        domain = pl.coalesce("domain", pl.lit(part.domain or name))
        frames.append(frame.with_columns(domain.alias("domain"), pl.lit(name).alias("part")))
        notes += [f"{name}: {sources.of_part(note, name)}" for note in said]
    return Rows(pl.concat(frames), set(splits.SPLITS), notes)


def _make_shown(data: Data, size: int) -> Dataset:
    """Make a table, with a sign of life where that takes long."""
    shown = f" ({size / 1e6:,.0f} MB)" if size >= 1e6 else ""
    with progress.Display(progress.PREPARING).work(f"reading data={data.title}{shown}", None):
        return _make(data)


def _make(data: Data) -> Dataset:
    rows = collect(data)
    frame, labels, notes = _prepared(data, rows)
    return _finished(frame, labels, Ledger(read=rows.counts(), notes=notes))


def _prepared(data: Data, rows: Rows, least_labels: int = 2) -> tuple[pl.DataFrame, LabelSpace, list[str]]:
    """Give every row a fate or a class and a split.

    Returns:
        The rows, the classes, and notes, those of the files included.
    """
    frame = cleaning.texts(rows.frame)
    ids = cleaning.doubled_ids(frame) if data.source != "mixture" else []  # whose parts have told already
    labels = cleaning.label_space(frame, data, least_labels)
    frame, mended = cleaning.classes(frame, data, labels)
    labels = cleaning.widened(frame, labels, data)
    frame, doubled = cleaning.copies(frame, data)
    frame, leaks = cleaning.without_leaks(_divide(frame, data, rows.declared), data)
    frame = cleaning.limited(cleaning.of_domain(cleaning.in_proportion(frame, data), data), data)
    return frame, labels, [*rows.notes, *ids, *mended, *doubled, *leaks]


def _finished(frame: pl.DataFrame, labels: LabelSpace, ledger: Ledger) -> Dataset:
    dropped = frame.filter(pl.col(FATE).is_not_null()).rename({LINE: "line", FATE: "fate"}).select(DROPPED)
    used = frame.filter(pl.col(FATE).is_null())
    ledger.buckets.update(dict(dropped.group_by("fate", maintain_order=True).len().iter_rows()))
    ledger.buckets[USED] += used.height
    ledger.balance()
    for fate in ledger.buckets:
        shown = dropped.filter(pl.col("fate") == fate).head(EXAMPLES).select("file", "line", "text", "label")
        if shown.height:
            ledger.examples[fate] = [_shown(*row) for row in shown.iter_rows()]
    numbers = {name: number for number, name in enumerate(labels.names)}
    used = used.with_columns(pl.col("label").replace_strict(numbers, return_dtype=pl.Int64))
    parts = {
        name: used.filter(pl.col("split") == name).select("id", "text", "label", "domain", "parent", "group", FIXED)
        for name in splits.SPLITS
    }
    for name, part in parts.items():
        counts = dict(part.group_by("label").len().iter_rows())
        ledger.splits[name] = {label: counts.get(number, 0) for label, number in numbers.items()}
    ledger.notes += _shifted(ledger.splits)
    return Dataset(parts, labels, ledger, cache.fingerprint(used.select("split", "id", "text", "label")), dropped)


def _shifted(counts: dict[str, dict[str, int]]) -> list[str]:
    """Notes on held-out splits whose labels are distributed unlike the training rows', as where a file has two swapped.

    The distance of two distributions is their total variation; that of small splits is mostly chance.
    """
    notes, training = [], counts.get("train", {})
    for split in ("validation", "test"):
        held = counts.get(split, {})
        rows, trained = sum(held.values()), sum(training.values())
        if not rows or not trained:
            continue
        change = {label: count / rows - training[label] / trained for label, count in held.items()}
        if rows >= LEAST_SHIFTED and sum(map(abs, change.values())) / 2 > SHIFTED:
            label = max(change, key=lambda name: abs(change[name]))
            shares = (
                f"{training[label] / trained:.0%} of the training rows, {held[label] / rows:.0%} of the {split} rows"
            )
            notes.append(
                f"labels are distributed differently: '{label}' is {shares}; check that both use the same labels"
            )
    return notes


def _shown(file: str, line: int, text: str | None, label: str | None) -> str:
    start = (text or "").replace("\n", " ")[:60]
    return f"{Path(file).name}:{line}: {start} [{label or 'no label'}]"


def _divide(rows: pl.DataFrame, data: Data, present: set[str]) -> pl.DataFrame:
    """Fill in what the files leave open: all splits, or the missing ones out of the training rows.

    A split that has a file stays what that file says, be it empty in the end.
    """
    present = present & set(splits.SPLITS)
    if present and ("train" not in present or present == set(splits.SPLITS)):
        return rows
    open_rows = rows.with_row_index("_row").filter(
        pl.col(FATE).is_null() & ((pl.col("split") == "train") | pl.col("split").is_null())
    )
    shares = {name: 0.0 if name in present else getattr(data.split, name) for name in ("validation", "test")}
    assigned = splits.divide(open_rows, data.split, shares["validation"], shares["test"])
    filled = open_rows.select("_row").with_columns(pl.Series("_split", assigned, dtype=pl.String))
    joined = rows.with_row_index("_row").join(filled, on="_row", how="left", maintain_order="left")
    return joined.with_columns(pl.coalesce("_split", "split").alias("split")).drop("_row", "_split")
