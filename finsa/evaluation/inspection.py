"""What a data set holds, as numbers and as sentences: splits, tokens, near duplicates, what gives the label away."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finsa.config import InspectStage, Near
from finsa.data.ledger import Ledger
from finsa.data.near_duplicates import NearDuplicates
from finsa.data.tokenized import TokenizedDataset
from finsa.evaluation import confounds
from finsa.evaluation.confounds import percent

BETWEEN = (("test", "train"), ("validation", "train"), ("test", "validation"))
PERCENTILES = (5, 25, 50, 75, 95, 100)
EXACT = {"duplicate": "exact duplicates", "conflicting label": "conflicting labels", "leak": "leaks"}
SHORT = {"train": "training", "validation": "validation", "test": "test"}


def inspect(
    job: TokenizedDataset, near: NearDuplicates, settings: Near, stage: InspectStage, files: pl.Series | None
) -> dict[str, Any]:
    """Measure everything that is reported.

    Args:
        job: the rows and their tokens.
        near: near duplicates across splits.
        settings: with which they were looked for.
        stage: from when on something is told.
        files: the file of every used row, split by split, where there are several per split.

    Returns:
        Plain values for ``inspect.json``; ``findings`` has the sentences.
    """
    rows, names = used_rows(job, files), job.dataset.labels.names
    kinds = confounds.groupings(rows, stage.group_rows)
    groups = [confounds.judge_groups(kind, of, rows, names) for kind, of in kinds.items()] if rows.height else []
    traits = [confounds.judge_trait(name, rows, names, stage.group_rows) for name in confounds.TRAITS]
    splits = _splits(job)
    close = _near(near, settings, job)
    findings = [
        *_of_ledger(job.dataset.ledger),
        *_of_splits(splits, job),
        *_of_near(close),
        *(sentence for found in groups for sentence in confounds.sentences_of_groups(found, stage)),
        *(sentence for found in traits for sentence in confounds.sentences_of_trait(found, stage)),
    ]
    return {
        "findings": [sentence[:1].upper() + sentence[1:] for sentence in findings],
        "labels": list(names),
        "splits": splits,
        "tokens": _tokens(job),
        "near_duplicates": close,
        "groups": groups,
        "traits": traits,
    }


def used_rows(job: TokenizedDataset, files: pl.Series | None = None) -> pl.DataFrame:
    """The used rows of all splits, one after another, with the columns split and, where given, file."""
    frame = pl.concat(part.with_columns(pl.lit(split).alias("split")) for split, part in job.dataset.splits.items())
    return frame if files is None else frame.with_columns(files.alias("file"))


def row_lengths(job: TokenizedDataset, split: str) -> NDArray[np.int64]:
    """Tokens of each row with the longest answer, as if no text was cut, (n,); cut is what is above max_length."""
    prompts = job.prompts(split)
    longest = max(map(len, job.renderer.answers)) + 1
    lengths: NDArray[np.int64] = prompts.lengths + np.asarray(prompts.cut) + longest
    return lengths


def _splits(job: TokenizedDataset) -> dict[str, Any]:
    found = {}
    for split, counts in job.dataset.ledger.splits.items():
        cut, gold = np.asarray(job.prompts(split).cut) > 0, np.asarray(job.gold(split), dtype=int)
        found[split] = {
            "rows": sum(counts.values()),
            "labels": dict(counts),
            "cut": {name: int(cut[gold == number].sum()) for number, name in enumerate(job.dataset.labels.names)},
        }
    return found


def _tokens(job: TokenizedDataset) -> dict[str, Any]:
    renderer, splits = job.renderer, {}
    for split in job.dataset.splits:
        lengths, cut = row_lengths(job, split), np.asarray(job.prompts(split).cut)
        if len(lengths):
            values = np.percentile(lengths, PERCENTILES).tolist()
            splits[split] = {
                "percentiles": {str(share): value for share, value in zip(PERCENTILES, values, strict=True)},
                "cut_rows": int((cut > 0).sum()),
                "cut_tokens": int(cut.sum()),
            }
    prompt, longest = len(renderer.prefix) + len(renderer.suffix), max(map(len, renderer.answers)) + 1
    return {"max_length": prompt + renderer.room + longest, "prompt": prompt, "answer": longest, "splits": splits}


def _near(near: NearDuplicates, settings: Near, job: TokenizedDataset) -> dict[str, Any]:
    between = []
    for held, other in BETWEEN:
        pairs = near.pairs.filter((pl.col("split") == held) & (pl.col("other_split") == other))
        rows, total = pairs.select("id", "text").n_unique(), job.dataset.splits[held].height
        between.append(
            {
                "held_out": held,
                "other": other,
                "pairs": pairs.height,
                "rows": rows,
                "of": total,
                "share": rows / total if total else 0.0,
                "other_label": pairs.filter(pl.col("label") != pl.col("other_label")).height,
            }
        )
    index = {"bands": near.bands, "rows_per_band": near.rows, "recall_at_threshold": near.recall}
    return {**settings.model_dump(), **index, "between": between}


# ------------------------------------------------------------------------------------------------ sentences


def exact(buckets: Mapping[str, int]) -> dict[str, int]:
    """Rows that are left out as exact duplicates, for conflicting labels, and as leaks."""
    return {
        words: sum(count for bucket, count in buckets.items() if bucket.split(":")[0] == kind)
        for kind, words in EXACT.items()
    }


def _of_ledger(ledger: Ledger) -> list[str]:
    left_out = ", ".join(f"{words} {count:,}" for words, count in exact(ledger.buckets).items())
    told = [f"{ledger.read.total():,} rows read, {ledger.dropped():,} left out ({left_out})."]
    return told + [f"{note}." for note in ledger.notes if "kept, because data.on_" in note]


def _of_splits(splits: Mapping[str, Any], job: TokenizedDataset) -> list[str]:
    told = []
    for split, found in splits.items():
        lacks = [name for name, count in found["labels"].items() if not count]
        if not found["rows"]:
            told.append(f"the {SHORT[split]} split is empty.")
        elif lacks:
            told.append(f"the {SHORT[split]} split has no {' and no '.join(lacks)} rows.")
    cut, used = sum(job.truncated().values()), sum(found["rows"] for found in splits.values())
    if cut:
        told.append(f"{cut:,} texts ({percent(cut / used, 1)}) do not fit and are cut.")
    return told


def _of_near(close: Mapping[str, Any]) -> list[str]:
    told = []
    for one in close["between"]:
        held, other = SHORT[one["held_out"]], SHORT[one["other"]]
        if one["rows"]:
            differing = f"; in {one['other_label']:,} of {one['pairs']:,} pairs the labels differ" * bool(
                one["other_label"]
            )
            told.append(
                f"{one['rows']:,} of {one['of']:,} {held} rows ({percent(one['share'], 1)}) are near duplicates of a "
                f"{other} row (similarity {close['threshold']} or more){differing}."
            )
    return told or [f"no near duplicates across splits (similarity {close['threshold']} or more)."]


def files_of(rows: pl.DataFrame, read: pl.DataFrame) -> pl.Series:
    """Find the file that each used row comes from.

    Args:
        rows: used rows, columns id and text.
        read: rows as read, columns id, text and file (a path).

    Returns:
        Paths below the folder that all files share, (n,).
    """
    paths = read["file"].unique().to_list()
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120 - hub sets have no paths
    short = {path: os.path.relpath(path, shared) for path in paths}
    known = read.select("id", pl.col("text").str.strip_chars(), pl.col("file").replace_strict(short))
    known = known.unique(["id", "text"], keep="first", maintain_order=True)
    return rows.select("id", "text").join(known, on=["id", "text"], how="left", maintain_order="left")["file"]
