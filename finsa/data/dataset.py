"""From files to splits: every row that is read has one fate and, if it is used, is in one split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import polars as pl

from finsa.config import Data
from finsa.data import articles, cache, cleaning, corrections, discovery, labels, sources, splits, times, values
from finsa.data.labels import LabelSpace
from finsa.data.ledger import USED, Ledger
from finsa.data.readers import FATE, LINE
from finsa.data.schema import FIXED
from finsa.data.sources import Rows
from finsa.errors import DataError
from finsa.runs import progress
from finsa.session import Session

EXAMPLES = 3
SHIFTED, LEAST_SHIFTED = 0.25, 100  # smallest total variation of label shares, and number of held-out rows, for a note
DROPPED = ("file", "line", "id", "text", "label", "fate")
COLUMNS = ("id", "text", "target", "label", "rejected", "domain", "parent", "group", "rationale", "time", FIXED)


@dataclass(frozen=True)
class Dataset:
    """A data set, read and split.

    Args:
        splits: train, validation and test; columns id, text, target, domain, parent, group (text), label (class
            number), rejected (class number; null without pairs), time (ISO 8601; null without times) and fixed (leading
            characters of the text that are never truncated); for regression and several labels also
            `finsa.data.values.VALUES`.
        labels: the classes in their order.
        ledger: the fate of every row.
        fingerprint: hash over ids, texts, targets, labels and splits.
        dropped: rows that are not used; columns file, line, id, text, label, fate.
    """

    splits: dict[str, pl.DataFrame]
    labels: LabelSpace
    ledger: Ledger
    fingerprint: str
    dropped: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict.fromkeys(DROPPED, pl.String())))

    def sizes(self) -> str:
        """Rows per split, as text."""
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
    """Read a data set; a second call in a session with the same files and settings returns the same object.

    With ``data.cache`` the result is cached on disk under a hash of the content of the files, the settings and the code
    of the data package.

    Raises:
        DataError: for files, columns or labels that cannot be used.
    """
    settings = data.model_dump_json(exclude={"cache", "prompt", "max_length", "corpus", "near_duplicates", "origin"})
    files = [*sources.all_files(data), *corrections.files(data)]
    stamps = [
        (str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in files for stat in (file.stat(),)
    ]
    key = f"{settings}{stamps}"
    shared = session.datasets if session else {}
    if key not in shared:
        build = partial(_build, data, sum(size for _, size, _, _ in stamps))
        # Generated or fetched rows are not cached: no file's content shows whether they are still the same.
        folder = data.cache if sources.only_files(data) and cache.worthwhile(files) else None
        shared[key] = _cached(folder, settings, files, build) if folder else build()
    return shared[key]


def _cached(folder: str, settings: str, files: Iterable[Path], build: Callable[[], Dataset]) -> Dataset:
    """Read a data set from the cache; if it is not cached, build and write it."""
    name = cache.key("table", settings, *(f"{file} {cache.file_hash(file)}" for file in files))

    def write(built: Dataset, place: Path) -> None:
        for split, frame in built.splits.items():
            frame.write_ipc(place / f"{split}.arrow")
        built.dropped.write_ipc(place / "dropped.arrow")
        facts = {"ledger": vars(built.ledger), "labels": asdict(built.labels), "fingerprint": built.fingerprint}
        (place / "table.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")

    def read(place: Path) -> Dataset:
        facts = json.loads((place / "table.json").read_text(encoding="utf-8"))
        ledger = Ledger(**facts["ledger"])
        ledger.read, ledger.buckets = Counter(ledger.read), Counter(ledger.buckets)
        parts = {split: pl.read_ipc(place / f"{split}.arrow") for split in splits.SPLITS}
        of = facts["labels"]
        classes = LabelSpace(tuple(of["names"]), tuple(of["words"]), of["task"], tuple(of["yes_no"]))
        return Dataset(parts, classes, ledger, facts["fingerprint"], pl.read_ipc(place / "dropped.arrow"))

    return cache.kept(cache.folder_of(folder, f"table-{name}"), build, write, read)


def _build(data: Data, size: int) -> Dataset:
    """Read, clean and split a data set of `size` bytes, and display the progress."""
    megabytes = f" ({size / 1e6:,.0f} MB)" if size >= 1e6 else ""
    with progress.Display(progress.PREPARING).work(f"reading data={data.title}{megabytes}", None):
        rows = collect(data)
        frame, classes, notes = _prepared(data, rows)
        return _divided(frame, classes, Ledger(read=rows.counts(), notes=notes))


def collect(data: Data) -> Rows:
    """Read the rows of any source; those of a mixture are the rows of its parts, concatenated.

    Raises:
        DataError: for files or columns that cannot be used.
    """
    if data.generator is not None:
        return sources.generate(data)
    if data.source == "mixture":
        return _mixture(data)
    if data.from_hub:
        return sources.collect_hub(data)
    if data.source == "articles":
        return articles.collect(data)
    found = discovery.find(data)
    rows = sources.collect(data, found.splits)
    rows.notes[:0] = found.notes
    return rows


def _mixture(data: Data) -> Rows:
    """Rows of the parts, each cleaned and split by its own settings; the domain is the name or domain of the part."""
    frames, notes = [], list[str]()
    for name, part in (data.parts or {}).items():
        part = part.model_copy(update={"labels": part.labels or data.labels})
        with sources.errors_of_part(name):
            frame, _, notes_of_part = _prepared(part, collect(part), 0)
        domain = pl.coalesce("domain", pl.lit(part.domain or name))
        frames.append(frame.with_columns(domain.alias("domain"), pl.lit(name).alias("part")))
        notes += [f"{name}: {sources.with_keys_of_part(note, name)}" for note in notes_of_part]
    return Rows(pl.concat(frames), set(splits.SPLITS), notes)


def _prepared(data: Data, rows: Rows, least_labels: int = 2) -> tuple[pl.DataFrame, LabelSpace, list[str]]:
    """Assign every row a fate, or a class and a split.

    Returns:
        The rows, the classes, and notes, including those of the files.
    """
    notes = list(rows.notes)
    frame = cleaning.clean_texts(times.clean(rows.frame, data, rows.declared))
    frame, more = cleaning.clean_targets(frame, data)
    notes += more
    if data.source != "mixture":  # whose parts have been checked already
        notes += cleaning.repeated_ids(frame)
    classes = labels.find_labels(frame, data, least_labels)
    frame, more = (values.read if data.task in values.TASKS else labels.mark_unknown)(frame, data, classes)
    notes += more
    classes = labels.with_unlisted(classes, frame, data)
    frame, more = corrections.apply(frame, data, classes)
    notes += more
    frame, more = labels.mark_pairs(frame, data, classes)
    notes += more
    frame, more = cleaning.mark_copies(frame, data)
    notes += more
    if data.task in values.TASKS:
        frame = values.with_classes(frame, classes)
    frame, more = cleaning.mark_leaks(_fill_splits(frame, data, rows.declared), data)
    notes += more
    frame = cleaning.limit_splits(cleaning.keep_domain(cleaning.mix(frame, data), data), data)
    return frame, classes, notes


def _fill_splits(rows: pl.DataFrame, data: Data, declared: set[str]) -> pl.DataFrame:
    """Assign the rows without a split: divide all rows, or take missing splits from the training rows.

    A split with a file consists of the rows of that file, even if none of them can be used.
    """
    declared = declared & set(splits.SPLITS)
    if declared and ("train" not in declared or declared == set(splits.SPLITS)):
        return rows
    open_rows = rows.with_row_index("_row").filter(
        pl.col(FATE).is_null() & ((pl.col("split") == "train") | pl.col("split").is_null())
    )
    shares = {name: 0.0 if name in declared else getattr(data.split, name) for name in ("validation", "test")}
    if data.split.rule == "time":
        moments = [None if time is None else datetime.fromisoformat(time) for time in open_rows["time"]]
        assigned = splits.by_time(moments, shares["validation"], shares["test"], data.split.purge, data.split.embargo)
        assigned = splits.only_latest(assigned, splits.families(open_rows, "parent", "group", "_text"))
    else:
        assigned = splits.divide(open_rows, data.split, shares["validation"], shares["test"])
    filled = open_rows.select("_row").with_columns(pl.Series("_split", assigned, dtype=pl.String))
    joined = rows.with_row_index("_row").join(filled, on="_row", how="left", maintain_order="left")
    joined = cleaning.mark(joined, ~pl.col("_split").is_in(splits.SPLITS), pl.lit("filtered: ") + pl.col("_split"))
    return joined.with_columns(pl.coalesce("_split", "split").alias("split")).drop("_row", "_split")


def _divided(frame: pl.DataFrame, classes: LabelSpace, ledger: Ledger) -> Dataset:
    """Separate the rows into splits and dropped ones, and complete the ledger."""
    dropped = frame.filter(pl.col(FATE).is_not_null()).rename({LINE: "line", FATE: "fate"}).select(DROPPED)
    used = frame.filter(pl.col(FATE).is_null())
    ledger.buckets.update(dict(dropped.group_by("fate", maintain_order=True).len().iter_rows()))
    ledger.buckets[USED] += used.height
    ledger.balance()
    for fate in ledger.buckets:
        examples = dropped.filter(pl.col("fate") == fate).head(EXAMPLES).select("file", "line", "text", "label")
        if examples.height:
            ledger.examples[fate] = [cleaning.example(Path(file).name, *row) for file, *row in examples.iter_rows()]
    numbers = {name: number for number, name in enumerate(classes.names)}
    used = used.with_columns(
        pl.col("label").replace_strict(numbers, default=0, return_dtype=pl.Int64),
        pl.col("rejected").replace_strict(numbers, default=None, return_dtype=pl.Int64),
    )
    columns = (*COLUMNS, values.VALUES) if values.VALUES in used.columns else COLUMNS
    parts = {name: used.filter(pl.col("split") == name).select(columns) for name in splits.SPLITS}
    for name, part in parts.items():
        ledger.rows[name] = part.height
        if classes.task == "multi_label":
            counts = dict(enumerate(values.matrix(part, len(classes)).sum(axis=0).astype(int).tolist()))
        else:
            counts = dict(part.group_by("label").len().iter_rows())
        ledger.splits[name] = {label: counts.get(number, 0) for label, number in numbers.items()}
    ledger.notes += _without_rows(ledger, classes) + _shifted(ledger.splits)
    optional = [name for name in ("target", "rejected", "time") if used[name].null_count() < used.height]
    rationale = [pl.col("rationale").fill_null("")] if used["rationale"].null_count() < used.height else []
    label = pl.col(values.VALUES).cast(pl.List(pl.String)).list.join(" ") if len(columns) > len(COLUMNS) else "label"
    fingerprint = cache.fingerprint(used.select("split", "id", "text", label, *optional, *rationale))
    return Dataset(parts, classes, ledger, fingerprint, dropped)


def _without_rows(ledger: Ledger, classes: LabelSpace) -> list[str]:
    """Notes on listed labels without a training row, and of several labels per row, without a validation row."""
    splits_of = {"classification": ("train",), "ordinal": ("train",), "multi_label": ("train", "validation")}
    notes = []
    for split in splits_of.get(classes.task, ()):
        lacking = [name for name, count in ledger.splits[split].items() if not count]
        if ledger.rows[split] and lacking:
            what = "training" if split == "train" else split
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            listed = f"{'any of the labels' if lacking[1:] else 'the label'} {', '.join(map(repr, lacking[:5]))}{more}"
            threshold = "; the threshold stays 0.5" if split == "validation" else ""
            notes.append(f"no {what} row has {listed}{threshold}")
    return notes


def _shifted(counts: dict[str, dict[str, int]]) -> list[str]:
    """Notes on held-out splits whose label distribution differs from training, for instance because labels are swapped.

    The distance is the total variation; in small splits it is mostly due to chance.
    """
    notes, training = [], counts.get("train", {})
    trained = sum(training.values())
    for split in ("validation", "test"):
        held = counts.get(split, {})
        rows = sum(held.values())
        if rows < LEAST_SHIFTED or not trained:
            continue
        change = {label: count / rows - training[label] / trained for label, count in held.items()}
        if sum(map(abs, change.values())) / 2 > SHIFTED:
            label = max(change, key=lambda name: abs(change[name]))
            before, now = training[label] / trained, held[label] / rows
            notes.append(
                f"labels are distributed differently: '{label}' is {before:.0%} of the training rows, {now:.0%} of the "
                f"{split} rows; check that both use the same labels"
            )
    return notes
