"""What becomes of each row: one fate, given once, by policies that are configuration and never silent."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from finsa.config import Data, Policy
from finsa.data.labels import LabelSpace, number
from finsa.data.readers import FATE, LINE
from finsa.data.splits import families
from finsa.data.texts import WHITE_SPACE
from finsa.errors import DataError, nearest, suggest

OPEN = pl.col(FATE).is_null()
MANY_LABELS = 50  # from which found labels need rows enough to be one
ROWS_PER_LABEL = 4
NEWLINE = "\n"


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
        f"\n  {file}:{line}: {(text or '')[:60].replace(NEWLINE, ' ')} [{label or 'no label'}]"
        for file, line, text, label in met.head(3).select("file", LINE, "text", "label").iter_rows()
    )
    raise DataError(f"{key}: {met.height:,} rows {what}.{advice} Set {key}=drop (counted) or {key}=keep{shown}")


# ------------------------------------------------------------------------------------------------ labels


def label_space(frame: pl.DataFrame, data: Data, least: int = 2) -> LabelSpace:
    """The classes: as configured, or the distinct labels of the training split, sorted.

    Spellings that differ only in case, width or white space are one class, under the most frequent spelling. So are
    equal numbers; a whole number is written as one, whatever the most frequent spelling.

    Args:
        frame: the rows; only those without a fate count.
        data: its ``labels``.
        least: how many there must be.

    Raises:
        DataError: for fewer, or for so many that it is no label column.
    """
    label = pl.col("label").str.strip_chars()
    rows = of_domain(frame, data).filter(OPEN).select(label, "split").filter(pl.col("label").fill_null("") != "")
    if "train" in rows["split"]:
        rows = rows.filter(pl.col("split") == "train")
    spellings = rows.group_by("label").len().sort(["len", "label"], descending=[True, False])["label"].to_list()
    distinct = dict(zip(reversed(_folds(spellings)), reversed(spellings), strict=True))  # the most frequent comes last
    labels = LabelSpace.of(data, map(_whole, distinct.values()))
    numbers = [value for value in map(number, labels.names) if value is not None]
    if len(set(numbers)) < len(numbers):
        twice = next(value for value in numbers if numbers.count(value) > 1)
        raise DataError(f"data.labels: the number {twice} is listed more than once: {', '.join(labels.names)}")
    if len(labels) < least:
        lost = dict(frame.filter(~OPEN).group_by(FATE, maintain_order=True).len().iter_rows())
        if frame.height and sum(lost.values()) == frame.height:
            reasons = ", ".join(f"{fate} ({count:,} rows)" for fate, count in lost.items())
            raise DataError(f"data.files: no row of data={data.name} can be used: {reasons}")
        raise DataError(
            f"data.labels: at least two labels are needed, found {list(labels.names)} in data={data.name}. "
            f"Name another column by data.columns.label, or list data.labels; dropped rows: {lost or 'none'}"
        )
    if data.labels is None:
        _require_label_column(labels.names, rows.height, data)
    return labels


def _require_label_column(found: Sequence[str], rows: int, data: Data) -> None:
    """Refuse many labels that were found and not listed, unless most of them occur several times, as 77 intents do."""
    if len(found) > MANY_LABELS and rows < ROWS_PER_LABEL * len(found):
        raise DataError(
            f"data.columns.label: column '{data.columns.label}' has {len(found)} distinct values in {rows:,} rows, "
            f"such as {list(found[:3])}; that is no label column. Name another, or list data.labels"
        )


def widened(frame: pl.DataFrame, labels: LabelSpace, data: Data) -> LabelSpace:
    """Add the labels that ``on_unknown_label=keep`` let in, as classes of their own after the listed ones."""
    if data.on_unknown_label != "keep":
        return labels
    found = frame.filter(OPEN)["label"].unique().sort().to_list()
    strangers = tuple(label for label in found if label not in labels.names)
    _require_label_column(strangers, frame.filter(OPEN & pl.col("label").is_in(strangers)).height, data)
    return LabelSpace(labels.names + strangers, labels.words + strangers)


def spelt(labels: pl.Series, names: Sequence[str]) -> tuple[pl.Series, list[str]]:
    """Write labels that differ from a name only in case, width or white space as that name, and say so.

    Where names differ only in such ways from each other, just white space around a label is forgiven.

    Returns:
        The labels, those that are no name without white space around; and notes.
    """
    by_fold: dict[str, list[str]] = {}
    for name, fold in zip(names, _folds(names), strict=True):
        by_fold.setdefault(fold, []).append(name)
    written = labels.drop_nulls().value_counts(sort=True).to_series(0).to_list()
    mended = dict[str, str]()
    for label, fold in zip(written, _folds(written), strict=True):
        alike = [label.strip()] if label.strip() in names else by_fold.get(fold, [])
        mended[label] = label if label in names else alike[0] if len(alike) == 1 else label.strip()
    changed = {old: new for old, new in mended.items() if old != new and new in names}
    counts = dict(labels.filter(labels.is_in(list(changed))).value_counts().iter_rows())
    notes = [f"label '{old}' ({counts[old]:,} rows) is read as '{changed[old]}'" for old in [*changed][:5]]
    if len(changed) > len(notes):
        notes.append(f"{len(changed) - len(notes)} more spellings of labels are read as another")
    return labels.replace(mended), notes


def _folds(names: Sequence[str]) -> list[str]:
    """Labels as they are compared: equal numbers are alike, and so are words but for case, width and white space."""
    words = pl.DataFrame({"name": names}, schema={"name": pl.String}).select(folded("name"))["name"].to_list()
    return [number(name) or word for name, word in zip(names, words, strict=True)]


def _whole(label: str) -> str:
    """A whole number as such, where a table writes it as 1.0."""
    return number(label) or label if label.partition(".")[2].strip("0") == "" else label


def mapped(labels: pl.Series, data: Data) -> tuple[pl.Series, set[str], list[str]]:
    """Translate labels by ``data.label_map``; what it does not list stays as it is.

    Returns:
        The labels; the map's keys that occur in them; and notes on their spelling.
    """
    translation = data.label_map or {}
    written, notes = spelt(labels, tuple(dict.fromkeys((*translation, *(data.labels or ())))))
    used = set(written.drop_nulls().unique().to_list()) & set(translation)
    return written.replace(translation), used, notes


def unused_keys(data: Data, used: set[str], labels: pl.Series) -> list[str]:
    """A note on keys of ``data.label_map`` that no label of a data set is.

    None where no label needs the map: a copy of the set that has the classes already.

    Args:
        data: the map.
        used: its keys that occur.
        labels: after translation.

    Raises:
        DataError: where no key occurs, and no label is what the map translates to.
    """
    translation = data.label_map or {}
    unused = [key for key in translation if key not in used]
    found = labels.drop_nulls().value_counts(sort=True).to_series(0).to_list()
    strange = [label for label in found if label not in translation.values()]
    if not unused or not found or not (used or strange):
        return []
    near = nearest(unused[0], strange)
    hint = f" Did you mean '{near}'?" if near else ""
    listed = ", ".join(f"'{key}'" for key in unused[:5])
    left = f" Not translated: {', '.join(map(repr, strange[:5]))}." if strange else ""
    text = f"data.label_map: no row has the label {listed}.{hint}{left}"
    if not used and len(strange) == len(found):
        raise DataError(f"{text} The map translates no label of data={data.name}; write its keys as the labels are")
    return [text]


def classes(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    """Write labels as the classes are written; the others meet ``on_unknown_label``.

    Raises:
        DataError: where the policy says so.
    """
    column, mended = spelt(frame["label"], labels.names)
    frame, notes = _known_labels(frame.with_columns(column), data, labels)
    return frame, mended + notes


def _known_labels(frame: pl.DataFrame, data: Data, labels: LabelSpace) -> tuple[pl.DataFrame, list[str]]:
    missing = pl.col("label").fill_null("") == ""
    unknown = ~pl.col("label").is_in(list(labels.names)).fill_null(False)
    frame = of_domain(frame, data, meant=unknown)
    if data.on_unknown_label == "keep":
        frame, unknown = mark(frame, missing, "unknown label"), unknown & ~missing
    strangers = frame.filter(OPEN & unknown).group_by("label").len().sort(["len", "label"], descending=[True, False])
    listed = ", ".join(f"'{label or '(none)'}' ({count:,} rows)" for label, count in strangers.head(5).iter_rows())
    first = next((label for label in strangers["label"] if label), "")
    advice = f" {suggest(first, labels.names)} List them all in data.labels." if strangers.height else ""
    if first.lower() in ("yes", "no", "on", "off") and {"true", "false"} & set(labels.names):
        advice = " YAML reads yes, no, on and off as true and false: quote them, as in ['yes', 'no']."
    what = f"have an unknown label: {listed}; known are {', '.join(labels.names)}"
    return decide(frame, unknown, data.on_unknown_label, "data.on_unknown_label", "unknown label", what, advice)


# ------------------------------------------------------------------------------------------------ texts


def texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Give rows without a usable text their fate.

    Returns:
        The rows, with ``_key``, a hash of the text as it is compared.
    """
    frame = frame.with_columns(pl.col("text").str.strip_chars(WHITE_SPACE))
    frame = mark(frame, pl.col("text").str.contains("\x00", literal=True), "unreadable: NUL byte in the text")
    frame = mark(frame, pl.col("text").str.contains("\ufffd", literal=True), "unreadable: damaged characters")
    frame = mark(frame, pl.col("text").fill_null("") == "", "empty text")
    return frame.with_columns(folded("text").hash().alias("_key"))


def copies(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    """Find rows of one text, with different labels or the same, within the files' own splits.

    Raises:
        DataError: where a policy says so.
    """
    frame, notes = _conflicts(frame, data)
    frame, said = _duplicates(frame, data)
    return frame, notes + said


def of_domain(frame: pl.DataFrame, data: Data, meant: pl.Expr | None = None) -> pl.DataFrame:
    """Keep the rows of ``data.domain``; a table without domains is of that domain.

    This comes last: a row then is in the same split as in the data set of all domains, so that an expert of one domain
    has not been trained on what the whole is tested on.

    Args:
        meant: which rows to look at; None: all.

    Raises:
        DataError: where it is a domain that no row has.
    """
    domains = frame.filter(OPEN)["domain"]
    if data.domain is None or domains.null_count() == len(domains):
        return frame
    if data.domain not in domains:
        hint = suggest(data.domain, domains.drop_nulls().unique())
        raise DataError(f"data.domain: no row is of domain '{data.domain}'. {hint}")
    other = (pl.col("domain") != data.domain).fill_null(True)
    return mark(frame, other if meant is None else other & meant, f"filtered: not of domain {data.domain}")


def limited(frame: pl.DataFrame, data: Data) -> pl.DataFrame:
    """Keep at most ``data.split.rows`` rows of a split: a random sample in proportion to the classes.

    A class gets the whole part of its share; the rows that remain go to the largest fractions.
    """
    frame = frame.with_row_index("_row")
    for split, most in data.split.rows:
        rows = frame.filter(OPEN & (pl.col("split") == split))
        if most is None or rows.height <= most:
            continue
        shares = [
            (label, count * most / rows.height) for label, count in rows["label"].value_counts().sort("label").rows()
        ]
        sizes = {label: int(share) for label, share in shares}
        for label, _ in sorted(shares, key=lambda item: int(item[1]) - item[1])[: most - sum(sizes.values())]:
            sizes[label] += 1
        kept = [
            rows.filter(pl.col("label") == label)["_row"].sample(size, seed=data.split.seed)
            for label, size in sizes.items()
        ]
        surplus = (pl.col("split") == split) & ~pl.col("_row").is_in(pl.concat(kept).implode())
        frame = mark(frame, surplus, f"filtered: data.split.rows.{split}={most}")
    return frame.drop("_row")


def doubled_ids(frame: pl.DataFrame) -> list[str]:
    """A note on rows of one file with one id, where there are any."""
    doubled = frame.filter(OPEN & pl.struct("id", "file").is_duplicated())
    example = f", such as '{doubled['id'][0]}'" if doubled.height else ""
    return [f"{doubled.height:,} rows share their id with another row of their file{example}"] * bool(doubled.height)


def _conflicts(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    known = pl.col("label").filter(OPEN).n_unique().over("split", "_key")
    frame = frame.with_columns((OPEN & (known > 1)).alias("_met"))
    what = "have the text of another row and a different label"
    frame, notes = decide(frame, pl.col("_met"), data.on_conflict, "data.on_conflict", "conflicting label", what)
    return frame.drop("_met"), notes


def _duplicates(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    later = ~pl.struct("split", "_key", "label").is_first_distinct()
    open_rows = frame.with_row_index("_row").filter(OPEN)
    doubled = open_rows.filter(later)["_row"]
    frame = frame.with_row_index("_row").with_columns(pl.col("_row").is_in(doubled.implode()).alias("_met"))
    what = "have text and label of an earlier row"
    frame, notes = decide(frame, pl.col("_met"), data.on_duplicate, "data.on_duplicate", "duplicate", what)
    return frame.drop("_row", "_met"), notes


def without_leaks(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    """Find rows that are trained on and also held out: the same text, a variant of one original, or the same group.

    What is held out keeps its place; training and, against test, validation give way.

    Raises:
        DataError: where ``on_leak`` says so.
    """
    notes = list[str]()
    frame = frame.with_columns(families(frame, "parent").alias("_family"))
    kinds = {"_key": "copy of a {} row", "_family": "variant of a {} row", "group": "row of a {} row's group"}
    for held, others in (("test", ("train", "validation")), ("validation", ("train",))):
        for other in others:
            for column, kind in kinds.items():
                inside = frame.filter(OPEN & (pl.col("split") == held))[column].drop_nulls().unique()
                met = (pl.col("split") == other) & pl.col(column).is_in(inside.implode())
                name = "training" if other == "train" else other
                fate = f"leak: {name} {kind.format(held)}"
                what = f"are a {name} {kind.format(held)}"
                frame, said = decide(frame, met, data.on_leak, "data.on_leak", fate, what)
                notes += said
    return frame.drop("_family"), notes


# ------------------------------------------------------------------------------------------------ mixtures


def in_proportion(frame: pl.DataFrame, data: Data) -> pl.DataFrame:
    """Thin the training rows of a mixture's parts to ``data.ratios``; the scarcest part is used whole.

    Raises:
        DataError: where a part has no training row, so that no ratio can be kept.
    """
    if not data.ratios:
        return frame
    frame = frame.with_row_index("_row")
    training = frame.filter(OPEN & (pl.col("split") == "train"))
    counts = dict(training.group_by("part").len().iter_rows())
    lacking = [part for part in data.ratios if part not in counts]
    if lacking:
        raise DataError(f"data.ratios: part {lacking[0]} has no training row; take it out, or set data.ratios=null")
    scale = min(counts[part] / ratio for part, ratio in data.ratios.items())
    kept = [
        training.filter(pl.col("part") == part)["_row"].sample(
            min(counts[part], int(scale * ratio + 1e-9)), seed=data.split.seed
        )
        for part, ratio in data.ratios.items()
    ]
    surplus = (pl.col("split") == "train") & ~pl.col("_row").is_in(pl.concat(kept).implode())
    return mark(frame, surplus, "filtered: mixture ratio").drop("_row")
