"""Inspection of a data set: splits, tokens, near duplicates and shortcut features, as numbers, findings and tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finsa.config import InspectStage, Near
from finsa.data import values
from finsa.data.ledger import USED, Ledger
from finsa.data.near_duplicates import NearDuplicates
from finsa.data.tokenized import TokenizedDataset
from finsa.evaluation import confounds, tables
from finsa.evaluation.tables import MANY, MISSING, Table, percent, visible

BETWEEN = (("test", "train"), ("validation", "train"), ("test", "validation"))
PERCENTILES = (5, 25, 50, 75, 95, 100)
EXACT = {"duplicate": "exact duplicates", "conflicting label": "conflicting labels", "leak": "leaks"}
SPLITS = {"train": "training", "validation": "validation", "test": "test"}


def inspect(
    data: TokenizedDataset, near: NearDuplicates, settings: Near, stage: InspectStage, files: pl.Series | None
) -> dict[str, Any]:
    """Measure everything that is reported.

    Args:
        data: the rows and their tokens.
        near: near duplicates across splits.
        settings: of the search for near duplicates.
        stage: the thresholds for findings.
        files: the file of every used row, split by split; None unless there are several per split.

    Returns:
        JSON-serializable values for ``inspect.json``; ``findings`` are sentences.
    """
    rows, names = used_rows(data, files), data.dataset.labels.names
    kinds = confounds.groupings(rows, stage.group_rows)
    groups = [confounds.measure_groups(kind, of, rows, names) for kind, of in kinds.items()] if rows.height else []
    traits = [confounds.measure_trait(name, rows, names, stage.group_rows) for name in confounds.TRAITS]
    splits = _splits(data)
    close = _near(near, settings, data)
    findings = [
        *_describe_ledger(data.dataset.ledger),
        *_describe_splits(splits, sum(data.truncated().values())),
        *_describe_near(close),
        *(sentence for measured in groups for sentence in confounds.describe_groups(measured, stage)),
        *(sentence for measured in traits for sentence in confounds.describe_trait(measured, stage)),
    ]
    return {
        "findings": [sentence[:1].upper() + sentence[1:] for sentence in findings],
        "labels": list(names),
        "splits": splits,
        "tokens": _tokens(data),
        "near_duplicates": close,
        "groups": groups,
        "traits": traits,
    }


def used_rows(data: TokenizedDataset, files: pl.Series | None = None) -> pl.DataFrame:
    """The used rows of all splits, concatenated, with the columns split and, if given, file.

    A row with several labels occurs once for each.
    """
    frame = pl.concat(part.with_columns(pl.lit(split).alias("split")) for split, part in data.dataset.splits.items())
    if data.task == "multi_label":
        has = [np.flatnonzero(row).tolist() for row in values.matrix(frame, len(data.dataset.labels))]
        frame = frame.with_columns(pl.Series("label", has, dtype=pl.List(pl.Int64))).explode("label")
        frame = frame.filter(pl.col("label").is_not_null())
    return frame if files is None else frame.with_columns(files.alias("file"))


def files_of(rows: pl.DataFrame, read: pl.DataFrame) -> pl.Series:
    """Find the file that each used row comes from.

    Args:
        rows: used rows, columns id and text.
        read: rows as read, columns id, text and file (a path).

    Returns:
        Paths relative to the common folder of all files, (n,).
    """
    paths = read["file"].unique().to_list()
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120 - hub data sets have no paths
    short = {path: os.path.relpath(path, shared) for path in paths}
    known = read.select("id", pl.col("text").str.strip_chars(), pl.col("file").replace_strict(short))
    known = known.unique(["id", "text"], keep="first", maintain_order=True)
    return rows.select("id", "text").join(known, on=["id", "text"], how="left", maintain_order="left")["file"]


def row_lengths(data: TokenizedDataset, split: str) -> NDArray[np.int64]:
    """Tokens of each row with the longest answer, before truncation, (n,); rows above max_length are truncated."""
    prompts = data.prompts(split)
    longest = max(map(len, data.renderer.answers)) + 1
    lengths: NDArray[np.int64] = prompts.lengths + np.asarray(prompts.cut) + longest
    return lengths


def _splits(data: TokenizedDataset) -> dict[str, Any]:
    counts_by_split = {}
    for split, counts in data.dataset.ledger.splits.items():
        cut, gold = np.asarray(data.prompts(split).cut) > 0, np.asarray(data.gold(split), dtype=int)
        counts_by_split[split] = {
            "rows": data.dataset.splits[split].height,
            "labels": dict(counts),
            "cut": {name: int(cut[gold == number].sum()) for number, name in enumerate(data.dataset.labels.names)},
        }
    return counts_by_split


def _tokens(data: TokenizedDataset) -> dict[str, Any]:
    renderer, splits = data.renderer, {}
    for split in data.dataset.splits:
        lengths, cut = row_lengths(data, split), np.asarray(data.prompts(split).cut)
        if len(lengths):
            values = np.percentile(lengths, PERCENTILES).tolist()
            splits[split] = {
                "percentiles": {str(share): value for share, value in zip(PERCENTILES, values, strict=True)},
                "cut_rows": int((cut > 0).sum()),
                "cut_tokens": int(cut.sum()),
            }
    prompt, longest = len(renderer.prefix) + len(renderer.suffix), max(map(len, renderer.answers)) + 1
    return {"max_length": prompt + renderer.room + longest, "prompt": prompt, "answer": longest, "splits": splits}


def _near(near: NearDuplicates, settings: Near, data: TokenizedDataset) -> dict[str, Any]:
    between = []
    for held, other in BETWEEN:
        pairs = near.pairs.filter((pl.col("split") == held) & (pl.col("other_split") == other))
        rows, total = pairs.select("id", "text").n_unique(), data.dataset.splits[held].height
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


# ------------------------------------------------------------------------------------------------ findings


def _describe_ledger(ledger: Ledger) -> list[str]:
    kinds = {
        words: sum(count for bucket, count in ledger.buckets.items() if bucket.split(":")[0] == kind)
        for kind, words in EXACT.items()
    }
    rest = {name: n for name, n in ledger.buckets.items() if name != USED and name.split(":")[0] not in EXACT}
    dropped = ", ".join(f"{words} {count:,}" for words, count in {**kinds, **rest}.items())
    first = f"{ledger.read.total():,} rows read, {ledger.dropped():,} not used ({dropped})."
    return [first, *(f"{note}." for note in ledger.notes if "kept, because data.on_" in note)]


def _describe_splits(splits: Mapping[str, Any], truncated: int) -> list[str]:
    sentences = []
    for split, of in splits.items():
        lacking = [name for name, count in of["labels"].items() if not count]
        if not of["rows"]:
            sentences.append(f"the {SPLITS[split]} split is empty.")
        elif lacking:
            sentences.append(f"the {SPLITS[split]} split has no {' and no '.join(lacking)} rows.")
    if truncated:
        share = truncated / sum(of["rows"] for of in splits.values())
        sentences.append(f"{truncated:,} texts ({percent(share, 1)}) are too long and are truncated.")
    return sentences


def _describe_near(close: Mapping[str, Any]) -> list[str]:
    sentences = []
    for one in close["between"]:
        if one["rows"]:
            held, other = SPLITS[one["held_out"]], SPLITS[one["other"]]
            differing = f"; in {one['other_label']:,} of {one['pairs']:,} pairs the labels differ"
            sentences.append(
                f"{one['rows']:,} of {one['of']:,} {held} rows ({percent(one['share'], 1)}) are near duplicates of a "
                f"{other} row (similarity {close['threshold']} or more){differing if one['other_label'] else ''}."
            )
    return sentences or [f"no near duplicates across splits (similarity {close['threshold']} or more)."]


# ------------------------------------------------------------------------------------------------ tables


def sections(
    numbers: Mapping[str, Any], ledger: Mapping[str, Any], near: NearDuplicates, most_pairs: int
) -> dict[str, list[Table]]:
    """The tables of the page by section.

    Args:
        numbers: of `inspect`.
        ledger: contents of ``ledger.json``.
        near: near duplicates.
        most_pairs: maximum number of pairs listed per pair of splits.
    """
    return {
        "Ledger": _ledger_tables(ledger),
        "Labels": [tables.rows_by_split(ledger), _rows_by_label(numbers["splits"])],
        "Tokens": [_tokens_table(numbers["tokens"])],
        "Near duplicates": [near_table(numbers["near_duplicates"]), *_pairs(near, numbers["labels"], most_pairs)],
        "Groups and confounds": [*map(group_table, numbers["groups"]), *map(_trait_table, numbers["traits"])],
    }


def _ledger_tables(ledger: Mapping[str, Any]) -> list[Table]:
    rows = [
        [bucket, f"{count:,}", "\n".join(map(visible, ledger["examples"].get(bucket, [])))]
        for bucket, count in ledger["buckets"].items()
    ]
    caption = "Every row that was read is in exactly one bucket; dropped.jsonl contains the unused rows."
    read = [[visible(file), f"{count:,}"] for file, count in ledger["read"].items()]
    ledger_tables = [Table("Rows by bucket", ["bucket", "rows", "examples"], rows, caption, words=("examples",))]
    ledger_tables.append(Table("Rows read by file", ["file", "rows"], read))
    notes = [[visible(note)] for note in ledger["notes"]]
    return [*ledger_tables, Table("Notes", ["note"], notes)] if notes else ledger_tables


def _rows_by_label(splits: Mapping[str, Any]) -> Table:
    labels = list(next(iter(splits.values()))["labels"])
    rows = []
    for label in labels:
        counts = [of["labels"][label] for of in splits.values()]
        rows.append([visible(label), *(f"{count:,}" for count in (*counts, sum(counts)))])
    return Table("Used rows by label", ["label", *splits, "total"], rows)


def _tokens_table(tokens: Mapping[str, Any]) -> Table:
    rows = []
    for split, of in tokens["splits"].items():
        values = [*map(int, of["percentiles"].values()), of["cut_rows"], of["cut_tokens"]]
        rows.append([split, *(f"{value:,}" for value in values)])
    columns = ["split", *(f"{share} %" for share in PERCENTILES[:-1]), "longest", "rows truncated", "tokens truncated"]
    caption = (
        f"The prompt takes {tokens['prompt']} tokens, the longest answer with its end token {tokens['answer']}; a row "
        f"has at most {tokens['max_length']}. Only the text is truncated."
    )
    return Table("Tokens per row, before truncation", columns, rows, caption)


def near_table(close: Mapping[str, Any]) -> Table:
    """The number of rows of each split that are near duplicates of rows of another split."""
    rows = []
    for one in close["between"]:
        counts = [f"{one['pairs']:,}", f"{one['rows']:,} of {one['of']:,}", percent(one["share"], 1)]
        rows.append([one["held_out"], one["other"], *counts, f"{one['other_label']:,}"])
    columns = ["held out", "other", "pairs", "held-out rows", "share", "pairs of different labels"]
    caption = (
        f"Jaccard similarity of {close['shingle']}-character shingles, {close['threshold']} or more, of the texts "
        "without case, width and white space. Found by MinHash and verified exactly; a pair at the threshold is found "
        f"with probability {close['recall_at_threshold']:.4f}. near_duplicates.jsonl lists all of them."
    )
    return Table("Near duplicates across splits", columns, rows, caption, words=("other",), optional=(5, 2))


def _pairs(near: NearDuplicates, labels: Sequence[str], most: int) -> list[Table]:
    pairs = near.pairs.group_by("split", "other_split", maintain_order=True).head(most)
    rows = []
    for pair in pairs.rows(named=True):
        sides = [
            f"{pair[f'{side}split']} {visible(pair[f'{side}id'])}, {visible(labels[pair[f'{side}label']])}:\n"
            + visible(pair[f"{side}text"])
            for side in ("", "other_")
        ]
        rows.append([f"{pair['similarity']:.3f}", *sides])
    columns = ["similarity", "held-out row", "other row"]
    title = f"The most similar pairs, up to {most} per pair of splits"
    return [Table(title, columns, rows, words=columns, folded=True)] if rows else []


def group_table(measured: Mapping[str, Any]) -> Table:
    """The labels of each group; for many labels, their number and the most frequent one."""
    kind, guess = measured["kind"], measured["guess"]
    labels = list(measured["groups"][0]["labels"])
    rows = []
    for group in measured["groups"]:
        by_label = group["labels"]
        cells = [f"{count:,}" for count in by_label.values()]
        if len(labels) > MANY:
            most = max(by_label, key=by_label.__getitem__)
            cells = [str(sum(map(bool, by_label.values()))), visible(most), f"{by_label[most]:,}"]
        rows.append([visible(group["name"]), *cells, f"{group['rows']:,}"])
    columns = ["classes", "most frequent class", "rows of it"] if len(labels) > MANY else list(map(visible, labels))
    caption = (
        f"Cramér's V with the label {measured['association']:.3f} (0: independent, 1: the {kind} determines the "
        f"label); accuracy on {'the test rows' if guess['on'] == 'test' else 'all rows'} from the {kind} alone "
        f"{percent(guess['accuracy'], 1)}, of the majority label {percent(guess['majority'], 1)}"
    )
    optional = () if len(labels) > MANY else range(len(labels), 0, -1)
    return Table(f"Labels by {kind}", [kind, *columns, "total"], rows, caption, optional=optional)


def _trait_table(trait: Mapping[str, Any]) -> Table:
    digits = 2 if trait["unit"].startswith("of") else 0
    rows = []
    for one in trait["classes"]:
        quartiles = [MISSING if value is None else f"{value:.{digits}f}" for value in one["quartiles"] or [None] * 3]
        rows.append([visible(one["label"]), *quartiles, MISSING if one["auc"] is None else f"{one['auc']:.3f}"])
    columns = ["label", "25 %", "median", "75 %", "AUC against the other labels"]
    return Table(f"{trait['name'].capitalize()} by label; eta squared {trait['eta_squared']:.3f}", columns, rows)
