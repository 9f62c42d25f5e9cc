"""What becomes of each row: one fate, given once, by policies that are configuration and never silent."""

from __future__ import annotations

import polars as pl

from finsa.config import Data, Policy
from finsa.data.labels import LabelSpace
from finsa.data.readers import FATE, LINE
from finsa.errors import DataError, suggest

OPEN = pl.col(FATE).is_null()
MOST_LABELS = 50


def folded(column: str) -> pl.Expr:
    """A text as it is compared: NFKC, lower case, no white space."""
    return pl.col(column).str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", "")


def mark(frame: pl.DataFrame, condition: pl.Expr, fate: pl.Expr | str) -> pl.DataFrame:
    """Give a fate to the rows that meet a condition and have none yet."""
    reason = pl.lit(fate) if isinstance(fate, str) else fate
    return frame.with_columns(pl.when(OPEN & condition.fill_null(False)).then(reason).otherwise(FATE).alias(FATE))


def decide(
    frame: pl.DataFrame, condition: pl.Expr, policy: Policy, key: str, fate: str, what: str, advice: str = ""
) -> tuple[pl.DataFrame, list[str]]:
    """Do with rows what a policy says.

    Args:
        frame: the rows.
        condition: which of them are meant.
        policy: error, drop or keep.
        key: of the policy, such as ``data.on_leak``.
        fate: bucket of dropped rows.
        what: ends the sentence "12 rows ...".
        advice: said before the other remedies where the policy is error.

    Returns:
        The rows, and a note where rows were kept in spite of it.

    Raises:
        DataError: under the policy error, with the rows' number, examples and remedy.
    """
    met = frame.filter(OPEN & condition.fill_null(False))
    if not met.height:
        return frame, []
    if policy == "drop":
        return mark(frame, condition, fate), []
    if policy == "keep":
        return frame, [f"{met.height:,} rows {what}; kept, because {key}=keep"]
    shown = "".join(
        f"\n  {file}:{line}: {(text or '')[:60]} [{label or 'no label'}]"
        for file, line, text, label in met.head(3).select("file", LINE, "text", "label").iter_rows()
    )
    raise DataError(f"{key}: {met.height:,} rows {what}.{advice} Set {key}=drop (counted) or {key}=keep{shown}")


# ------------------------------------------------------------------------------------------------ labels


def label_space(frame: pl.DataFrame, data: Data) -> LabelSpace:
    """The classes: as configured, or the distinct labels of the training split, sorted.

    Spellings that differ only in case or white space are one class, under the most frequent spelling.

    Raises:
        DataError: for fewer than two, or for so many that it is no label column.
    """
    label = pl.col("label").str.strip_chars()
    rows = frame.filter(OPEN).select(label, "split").filter(pl.col("label").fill_null("") != "")
    if "train" in rows["split"]:
        rows = rows.filter(pl.col("split") == "train")
    spellings = rows.group_by("label").len().sort(["len", "label"], descending=[True, False])
    distinct = spellings.with_columns(folded("label").alias("_fold")).unique("_fold", keep="first", maintain_order=True)
    labels = LabelSpace.of(data, distinct["label"].to_list())
    if len(labels) < 2:
        raise DataError(f"data.labels: at least two labels are needed, found {list(labels.names)} in data={data.name}")
    if len(labels) > MOST_LABELS:
        raise DataError(
            f"data.columns.label: column '{data.columns.label}' has {len(labels)} distinct values, such as "
            f"{list(labels.names[:3])}; that is no label column. Name another, or list data.labels"
        )
    return labels


def widened(frame: pl.DataFrame, labels: LabelSpace, data: Data) -> LabelSpace:
    """Add the labels that ``on_unknown_label=keep`` let in, as classes of their own after the listed ones."""
    if data.on_unknown_label != "keep":
        return labels
    found = frame.filter(OPEN)["label"].unique().sort().to_list()
    strangers = tuple(label for label in found if label not in labels.names)
    return LabelSpace(labels.names + strangers, labels.words + strangers)


def _mended(frame: pl.DataFrame, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    """Write labels that differ from a class only in case, width or white space as that class, and say so."""
    by_fold = {fold: name for name, fold in zip(labels.names, _folds(labels.names), strict=True)}
    known = dict(zip(labels.names, labels.names, strict=True))
    if len(by_fold) < len(labels):
        return frame, []  # classes that differ in case only must be written exactly
    raw = frame["label"]
    exact = raw.replace_strict(known, default=None, return_dtype=pl.String)
    folds = frame.select(folded("label")).to_series()
    mended = folds.replace_strict(by_fold, default=None, return_dtype=pl.String)
    changed = frame.filter(exact.is_null() & mended.is_not_null())
    notes = [
        f"label spelling mended: '{old}' ({count:,} rows) is {by_fold[fold]}"
        for old, fold, count in changed.group_by("label", maintain_order=True)
        .agg(folded("label").first().alias("_fold"), pl.len())
        .head(5)
        .iter_rows()
    ]
    return frame.with_columns(pl.coalesce(exact, mended, raw.str.strip_chars()).alias("label")), notes


def _folds(names: tuple[str, ...]) -> list[str]:
    return pl.DataFrame({"name": names}).select(folded("name"))["name"].to_list()


def _known_labels(frame: pl.DataFrame, labels: LabelSpace, data: Data) -> tuple[pl.DataFrame, list[str]]:
    missing = pl.col("label").fill_null("") == ""
    unknown = ~pl.col("label").is_in(list(labels.names)).fill_null(False)
    if data.on_unknown_label == "keep":
        frame, unknown = mark(frame, missing, "unknown label"), unknown & ~missing
    strangers = frame.filter(OPEN & unknown).group_by("label").len().sort(["len", "label"], descending=[True, False])
    listed = ", ".join(f"'{label or '(none)'}' ({count:,} rows)" for label, count in strangers.head(5).iter_rows())
    first = next((label for label in strangers["label"] if label), "")
    advice = f" {suggest(first, labels.names)} List them all in data.labels." if strangers.height else ""
    what = f"have an unknown label: {listed}; known are {', '.join(labels.names)}"
    return decide(frame, unknown, data.on_unknown_label, "data.on_unknown_label", "unknown label", what, advice)


# ------------------------------------------------------------------------------------------------ texts


def clean(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    """Give every row that cannot or shall not be used its fate; labels become classes.

    Returns:
        The rows, with ``_key``, a hash of the text as it is compared; and notes.

    Raises:
        DataError: where a policy says so.
    """
    frame = frame.with_columns(pl.col("text").str.strip_chars())
    frame = mark(frame, pl.col("text").str.contains("\x00", literal=True), "unreadable: NUL byte in the text")
    frame = mark(frame, pl.col("text").str.contains("\ufffd", literal=True), "unreadable: damaged characters")
    frame = mark(frame, pl.col("text").fill_null("") == "", "empty text")
    frame, notes = _of_domain(frame, data)
    frame, said = _mended(frame, labels)
    notes += said
    frame, said = _known_labels(frame, labels, data)
    notes += said + _doubled_ids(frame)
    frame = frame.with_columns(folded("text").hash().alias("_key"))
    for step in (_conflicts, _duplicates):
        frame, said = step(frame, data)
        notes += said
    return frame, notes


def _of_domain(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    domains = frame.filter(OPEN)["domain"]
    if data.domain is None or domains.null_count() == len(domains):
        return frame, []
    if data.domain not in domains:
        hint = suggest(data.domain, domains.drop_nulls().unique())
        raise DataError(f"data.domain: no row is of domain '{data.domain}'. {hint}")
    other = (pl.col("domain") != data.domain).fill_null(True)
    return mark(frame, other, f"filtered: not of domain {data.domain}"), []


def _doubled_ids(frame: pl.DataFrame) -> list[str]:
    doubled = frame.filter(OPEN & pl.struct("id", "file").is_duplicated())
    example = f", such as '{doubled['id'][0]}'" if doubled.height else ""
    return [f"{doubled.height:,} rows share their id with another row of their file{example}"] * bool(doubled.height)


def _conflicts(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    """Rows of one text with different labels, within the files' own splits."""
    classes = pl.col("label").filter(OPEN).n_unique().over("split", "_key")
    frame = frame.with_columns((OPEN & (classes > 1)).alias("_met"))
    what = "have the text of another row and a different label"
    frame, notes = decide(frame, pl.col("_met"), data.on_conflict, "data.on_conflict", "conflicting label", what)
    return frame.drop("_met"), notes


def _duplicates(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    """Rows with text and label of an earlier one, within the files' own splits."""
    later = ~pl.struct("split", "_key", "label").is_first_distinct()
    open_rows = frame.with_row_index("_row").filter(OPEN)
    doubled = open_rows.filter(later)["_row"]
    frame = frame.with_row_index("_row").with_columns(pl.col("_row").is_in(doubled.implode()).alias("_met"))
    what = "have text and label of an earlier row"
    frame, notes = decide(frame, pl.col("_met"), data.on_duplicate, "data.on_duplicate", "duplicate", what)
    return frame.drop("_row", "_met"), notes


def without_leaks(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    """Find rows that are trained on and also held out: the same text, or a variant of a held-out row.

    What is held out keeps its place; training and, against test, validation give way.
    """
    notes = list[str]()
    for held, others in (("test", ("train", "validation")), ("validation", ("train",))):
        inside = frame.filter(OPEN & (pl.col("split") == held))
        family = pl.concat([inside["id"], inside["parent"].drop_nulls()]).unique()
        for other in others:
            name = "training" if other == "train" else other
            here = pl.col("split") == other
            copies = here & pl.col("_key").is_in(inside["_key"].unique().implode())
            variants = here & pl.col("parent").is_in(family.implode())
            for met, kind in ((copies, "copy"), (variants, "variant")):
                fate = f"leak: {name} {kind} of a {held} row"
                what = f"of the {name} split are a {kind} of a {held} row"
                frame, said = decide(frame, met, data.on_leak, "data.on_leak", fate, what)
                notes += said
    return frame, notes


# ------------------------------------------------------------------------------------------------ mixtures


def in_proportion(frame: pl.DataFrame, data: Data) -> pl.DataFrame:
    """Thin the training rows of a mixture's parts to ``data.ratios``; the scarcest part is used whole."""
    if not data.ratios:
        return frame
    training = frame.with_row_index("_row").filter(OPEN & (pl.col("split") == "train"))
    counts = dict(training.group_by("part").len().iter_rows())
    scale = min(counts.get(part, 0) / ratio for part, ratio in data.ratios.items())
    kept = [
        training.filter(pl.col("part") == part)["_row"].sample(
            min(counts.get(part, 0), int(scale * ratio + 1e-9)), seed=data.split.seed
        )
        for part, ratio in data.ratios.items()
    ]
    chosen = pl.concat(kept)
    surplus = (pl.col("split") == "train") & ~pl.col("_row").is_in(chosen.implode())
    return mark(frame.with_row_index("_row"), surplus, "filtered: mixture ratio").drop("_row")
