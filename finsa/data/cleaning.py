"""The fate of each row, decided once, by configured policies that are never silent."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from finsa.config import Data, Policy
from finsa.data.readers import FATE, LINE
from finsa.data.splits import families
from finsa.errors import DataError, counted, suggest

OPEN = pl.col(FATE).is_null()
# The characters of Unicode's property White_Space, which polars' `strip_chars` removes; Python's `str.strip` would
# remove the separators U+001C to U+001F too.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def normalize(text: str) -> str:
    """Remove leading and trailing white space. `clean_texts` does the same to columns."""
    return text.strip(WHITE_SPACE)


def folded(column: str) -> pl.Expr:
    """Normalize a text for comparison: NFKC, lower case, no white space."""
    return pl.col(column).str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", "")


def mark(frame: pl.DataFrame, condition: pl.Expr, fate: pl.Expr | str) -> pl.DataFrame:
    """Assign a fate to the rows that meet a condition and have none yet."""
    reason = pl.lit(fate) if isinstance(fate, str) else fate
    return frame.with_columns(pl.when(OPEN & condition.fill_null(False)).then(reason).otherwise(FATE).alias(FATE))


def decide(
    frame: pl.DataFrame,
    condition: pl.Expr,
    policy: Policy,
    key: str,
    fate: str,
    what: str,
    advice: str = "",
    keeps: bool = True,
) -> tuple[pl.DataFrame, list[str]]:
    """Apply a policy to rows.

    Args:
        frame: the rows.
        condition: which of them it applies to.
        policy: error, drop or keep.
        key: of the policy, such as ``data.on_leak``.
        fate: bucket of dropped rows.
        what: ends the sentence "12 rows ...", with "have" or "are" as its first word.
        advice: precedes the other fixes in the message if the policy is error.
        keeps: whether such rows could be kept.

    Returns:
        The rows, and a note if rows were kept in spite of the condition.

    Raises:
        DataError: under the policy error, with the number of rows, examples and how to fix it.
    """
    met = frame.filter(OPEN & condition.fill_null(False))
    if not met.height:
        return frame, []
    if policy == "drop":
        return mark(frame, condition, fate), []
    if policy == "keep":
        return frame, [f"{_rows_that(met.height, what)}; kept, because {key}=keep"]
    rows = met.head(3).select("file", LINE, "text", "label").iter_rows()
    examples = "".join(f"\n  {example(*row)}" for row in rows)
    kept = f" or {key}=keep" if keeps else ""
    raise DataError(f"{key}: {_rows_that(met.height, what)}.{advice} Set {key}=drop (counted){kept}{examples}")


def _rows_that(count: int, what: str) -> str:
    """A number of rows, and what they are or have: 12 rows have no label, 1 row has no label."""
    verb, _, rest = what.partition(" ")
    return f"{counted(count)} {({'have': 'has', 'are': 'is'}[verb]) if count == 1 else verb} {rest}"


def example(file: str, line: int, text: str | None, label: str | None) -> str:
    """Describe a row in one line: its location, the beginning of its text, and its label."""
    start = (text or "").replace("\n", " ")[:60]
    return f"{file}:{line}: {start} [{label or 'no label'}]"


def clean_texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Strip the texts, and mark rows without a usable text.

    Returns:
        The rows, with ``_key``, a hash of the normalized text.
    """
    frame = frame.with_columns(pl.col("text").str.strip_chars(WHITE_SPACE))
    frame = mark(frame, pl.col("text").str.contains("\x00", literal=True), "unreadable: NUL byte in the text")
    frame = mark(frame, pl.col("text").str.contains("\ufffd", literal=True), "unreadable: damaged characters")
    frame = mark(frame, pl.col("text").fill_null("") == "", "empty text")
    return frame.with_columns(folded("text").hash().alias("_key"))


def clean_targets(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    """Strip the targets, if ``data.columns`` names any, and mark rows without one.

    Returns:
        The rows, with a ``_key`` of text and target, and with ``_text``, that of the text, by which rows of one text
        with several targets are kept together; and a note on targets that do not occur in their texts.
    """
    if not data.has_target:
        return frame.with_columns(pl.lit(None, dtype=pl.String).alias("_text")), []
    frame = frame.with_columns(pl.col("target").str.replace_all(r"\s+", " ").str.strip_chars(" "))
    both = pl.concat_str(folded("target"), pl.lit("\n"), folded("text"), ignore_nulls=True)
    frame = frame.with_columns(pl.col("_key").cast(pl.String).alias("_text"), both.hash().alias("_key"))
    if data.source == "mixture":  # whose parts have been checked already, and may have rows without a target
        return frame, []
    frame = mark(frame, pl.col("target").str.contains("[\x00\ufffd]"), "unreadable: damaged characters in the target")
    frame = mark(frame, pl.col("target").fill_null("") == "", "empty target")
    absent = frame.filter(OPEN & ~folded("text").str.contains(folded("target"), literal=True))
    if not absent.height:
        return frame, []
    place, line, target = absent.select("file", LINE, "target").row(0)
    example = f"'{target[:40]}' ({Path(place).name}:{line})"
    have, their = ("has", "its") if absent.height == 1 else ("have", "their")
    what = f"{counted(absent.height)} {have} a target that does not occur in {their} text"
    return frame, [f"{what}, such as {example}"]


def repeated_ids(frame: pl.DataFrame) -> list[str]:
    """A note if rows of the same file share an id."""
    rows = frame.filter(OPEN & pl.struct("id", "file").is_duplicated())
    example = f", such as '{rows['id'][0]}'" if rows.height else ""
    return [f"{rows.height:,} rows share their id with another row of their file{example}"] * bool(rows.height)


def mark_copies(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    """Find rows with the same text and target, with different labels or the same one, within the files' splits.

    Raises:
        DataError: if ``on_conflict`` or ``on_duplicate`` is error.
    """
    known = pl.col("label").filter(OPEN).n_unique().over("split", "_key")
    frame = frame.with_columns((OPEN & (known > 1)).alias("_met"))
    same = "text and target" if data.has_target else "text"
    what = f"have the {same} of another row and a different label"
    frame, notes = decide(frame, pl.col("_met"), data.on_conflict, "data.on_conflict", "conflicting label", what)
    frame = frame.drop("_met").with_row_index("_row")
    later = frame.filter(OPEN).filter(~pl.struct("split", "_key", "label").is_first_distinct())["_row"]
    frame = frame.with_columns(pl.col("_row").is_in(later.implode()).alias("_met"))
    what = (
        "have text, target and label of an earlier row" if data.has_target else "have text and label of an earlier row"
    )
    frame, more = decide(frame, pl.col("_met"), data.on_duplicate, "data.on_duplicate", "duplicate", what)
    return frame.drop("_row", "_met"), notes + more


def mark_leaks(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, list[str]]:
    """Find leaks between splits: the same text, variants of the same original, or the same group.

    Of two such rows, the training row is removed; of a validation and a test row, the validation row.

    Raises:
        DataError: if ``on_leak`` is error.
    """
    notes = list[str]()
    frame = frame.with_columns(families(frame, "parent").alias("_family"))
    kinds = {"_key": "copy of a {} row", "_family": "variant of a {} row", "group": "row of a {} row's group"}
    for held, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
        for column, kind in kinds.items():
            inside = frame.filter(OPEN & (pl.col("split") == held))[column].drop_nulls().unique()
            met = (pl.col("split") == other) & pl.col(column).is_in(inside.implode())
            leak = f"{'training' if other == 'train' else other} {kind.format(held)}"
            frame, more = decide(frame, met, data.on_leak, "data.on_leak", f"leak: {leak}", f"are a {leak}")
            notes += more
        if data.has_target:
            inside = frame.filter(OPEN & (pl.col("split") == held))["_text"].unique()
            shared = frame.filter(OPEN & (pl.col("split") == other) & pl.col("_text").is_in(inside.implode())).height
            what = f"of the {'training' if other == 'train' else other} split {'has' if shared == 1 else 'have'}"
            notes += [f"{counted(shared)} {what} the text of a {held} row, with another target"] * bool(shared)
    return frame.drop("_family"), notes


def keep_domain(frame: pl.DataFrame, data: Data, only: pl.Expr | None = None) -> pl.DataFrame:
    """Keep the rows of ``data.domain``; all rows of a table without domains are kept.

    This is the last step, so that a row is in the same split as in the data set of all domains, and the expert of one
    domain is not trained on test rows of the mixture.

    Args:
        frame: the rows.
        data: names the domain.
        only: condition for the rows to check; None: all.

    Raises:
        DataError: if no row has that domain.
    """
    domains = frame.filter(OPEN)["domain"]
    if data.domain is None or domains.null_count() == len(domains):
        return frame
    if data.domain not in domains:
        hint = suggest(data.domain, domains.drop_nulls().unique())
        raise DataError(f"data.domain: no row is of domain '{data.domain}'. {hint}")
    other = (pl.col("domain") != data.domain).fill_null(True)
    return mark(frame, other if only is None else other & only, f"filtered: not of domain {data.domain}")


def limit_splits(frame: pl.DataFrame, data: Data) -> pl.DataFrame:
    """Keep at most ``data.split.rows`` rows of a split: a random sample in proportion to the classes.

    A class gets the whole part of its share; the rows that remain go to the largest fractions.
    """
    frame = frame.with_row_index("_row")
    limits = data.split.rows
    seed = data.split.seed if limits.seed is None else limits.seed
    for split, most in (("train", limits.train), ("validation", limits.validation), ("test", limits.test)):
        rows = frame.filter(OPEN & (pl.col("split") == split))
        if most is None or rows.height <= most:
            continue
        counts = rows["label"].value_counts().sort("label").rows()
        shares = {label: count * most / rows.height for label, count in counts}
        sizes = {label: int(share) for label, share in shares.items()}
        for label in sorted(shares, key=lambda name: sizes[name] - shares[name])[: most - sum(sizes.values())]:
            sizes[label] += 1
        kept = [rows.filter(pl.col("label") == label)["_row"].sample(size, seed=seed) for label, size in sizes.items()]
        surplus = (pl.col("split") == split) & ~pl.col("_row").is_in(pl.concat(kept).implode())
        frame = mark(frame, surplus, f"filtered: data.split.rows.{split}={most}")
    return frame.drop("_row")


def mix(frame: pl.DataFrame, data: Data) -> pl.DataFrame:
    """Sample the training rows of a mixture's parts in the ``data.ratios``; the scarcest part is used completely.

    Raises:
        DataError: if a part has no training row, so that no ratio can be kept.
    """
    if not data.ratios:
        return frame
    frame = frame.with_row_index("_row")
    training = frame.filter(OPEN & (pl.col("split") == "train"))
    counts = dict(training.group_by("part").len().iter_rows())
    lacking = [part for part in data.ratios if part not in counts]
    if lacking:
        raise DataError(f"data.ratios: part {lacking[0]} has no training row; remove it, or set data.ratios=null")
    scale = min(counts[part] / ratio for part, ratio in data.ratios.items())
    sizes = {part: min(counts[part], int(scale * ratio + 1e-9)) for part, ratio in data.ratios.items()}
    kept = [
        training.filter(pl.col("part") == part)["_row"].sample(size, seed=data.split.seed)
        for part, size in sizes.items()
    ]
    surplus = (pl.col("split") == "train") & ~pl.col("_row").is_in(pl.concat(kept).implode())
    return mark(frame, surplus, "filtered: mixture ratio").drop("_row")
