"""Figures of a data set: labels, lengths, truncated texts, the ledger, near duplicates, shortcut features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from finsa.data.near_duplicates import NearDuplicates
from finsa.data.tokenized import TokenizedDataset
from finsa.evaluation import inspection
from finsa.evaluation.confounds import TRAITS
from finsa.evaluation.figures import (
    CLASSES,
    Figure,
    canvas,
    folded,
    font_and_names,
    frequent,
    palette,
    stacked_shares,
)
from finsa.evaluation.tables import percent

GREY = "#444444"
Counts = Mapping[str, Mapping[str, Mapping[str, int]]]


def draw(
    data: TokenizedDataset, numbers: Mapping[str, Any], close: NearDuplicates, folder: Path
) -> dict[str, list[Figure]]:
    """Draw the figures of an inspection into its run folder, except those without data.

    Args:
        data: the rows and their tokens.
        numbers: from `inspection.inspect`.
        close: near duplicates.
        folder: of the run.

    Returns:
        The figures by section of the page.
    """
    labels, splits, tokens = data.dataset.labels.names, numbers["splits"], numbers["tokens"]
    by_split = {"all": {split: of["labels"] for split, of in splits.items()}}
    lengths = {split: inspection.row_lengths(data, split) for split in splits}
    drawn = {
        "Ledger": [ledger(data.dataset.ledger.closed(data.truncated()), folder / "ledger.png")],
        "Labels": [labels_by_group("split", by_split, labels, folder / "labels_by_split.png")],
        "Tokens": [token_lengths(lengths, tokens["max_length"], folder / "token_lengths.png")],
        "Near duplicates": [],
        "Groups and confounds": [],
    }
    if any(sum(of["cut"].values()) for of in splits.values()):
        drawn["Tokens"].append(truncation(splits, labels, folder / "truncation.png"))
    if close.pairs.height:
        threshold = numbers["near_duplicates"]["threshold"]
        drawn["Near duplicates"].append(near_duplicates(close.pairs, threshold, folder / "near_duplicates.png"))
    for measured in numbers["groups"]:
        counts = {
            split: {group["name"]: group["splits"].get(split, {}) for group in measured["groups"]} for split in splits
        }
        file = folder / f"labels_by_{measured['kind'].replace(' ', '_')}.png"
        drawn["Groups and confounds"].append(labels_by_group(measured["kind"], counts, labels, file))
    drawn["Groups and confounds"].append(traits(inspection.used_rows(data), labels, folder / "traits.png"))
    return drawn


def labels_by_group(kind: str, panels: Counts, labels: Sequence[str], file: Path) -> Figure:
    """Draw the shares of the labels in each group.

    Args:
        kind: name of the grouping.
        panels: rows by panel (a split, or all rows), by group, by label.
        labels: in order.
        file: the PNG.
    """
    groups = list(next(iter(panels.values())))
    shown = frequent((counts for by_group in panels.values() for counts in by_group.values()), labels)
    panels = {
        panel: {group: folded(counts, labels, shown) for group, counts in by_group.items()}
        for panel, by_group in panels.items()
    }
    labels = list(folded({}, labels, shown))
    font, names = font_and_names([*labels])
    group_font, group_names = font_and_names(groups, kind)
    colors, height = palette(len(labels), CLASSES), 1.6 + 0.36 * len(groups)
    with canvas(file, height, columns=len(panels), fonts=[font, group_font], sharey=True) as (figure, axes):
        for axis, (panel, by_group) in zip(axes[0], panels.items(), strict=True):
            table = np.array([[by_group[group].get(label, 0) for label in labels] for group in groups])
            stacked_shares(axis, table, colors, least=0.07 * len(panels))
            axis.xaxis.set_major_formatter(PercentFormatter(1))
            axis.set_xticks([0, 0.5, 1])
            for tick, side in zip(axis.get_xticklabels(), ("left", "center", "right"), strict=True):
                tick.set_horizontalalignment(side)  # so that the labels of neighboring panels do not overlap
            axis.set_title(f"{panel}: {table.sum():,} rows", fontsize=10)
        axes[0][0].set_yticks(range(len(groups)), group_names)
        axes[0][0].invert_yaxis()
        patches = [Patch(color=color) for color in colors]
        figure.legend(patches, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    shares = []
    for group in groups:
        sums: Counter[str] = Counter()
        for by_group in panels.values():
            sums.update(by_group[group])
        by_label = ", ".join(f"{label} {percent(count / (sums.total() or 1))}" for label, count in sums.items())
        shares.append(f"{group}: {by_label}")
    return Figure(file, f"Labels by {kind}", f"Shares of the labels by {kind}. {'; '.join(shares)}.")


def token_lengths(lengths: Mapping[str, Any], max_length: int, file: Path) -> Figure:
    """Draw histograms of tokens per row by split, with the limit at which they are truncated."""
    shown = {split: values for split, values in lengths.items() if len(values)}
    everything = np.concatenate([*shown.values(), [max_length]])
    edges = np.geomspace(max(1, everything.min()), everything.max() * 1.02, 50)
    described = []
    with canvas(file, 0.8 + 1.35 * len(shown), rows=max(1, len(shown)), sharex=True) as (_, axes):
        for axis, (split, values) in zip(axes[:, 0], shown.items(), strict=False):
            median, over = f"{np.median(values):.0f}", int((values > max_length).sum())
            axis.hist(np.clip(values, edges[0], edges[-1]), bins=edges, color=CLASSES[2])
            axis.axvline(max_length, color=CLASSES[0], linewidth=1.5, linestyle="--")
            axis.set_title(f"{split}: median {median}, {over:,} of {len(values):,} truncated", fontsize=10)
            axis.set_ylabel("rows")
            axis.set_xscale("log")
            described.append(f"{split}: median {median}, longest {values.max()}, {over} truncated")
        last = axes[-1][0]
        last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        last.xaxis.set_minor_formatter(NullFormatter())
        ticks = [factor * 10**power for power in range(7) for factor in (1, 2, 5)]
        last.set_xticks([tick for tick in ticks if edges[0] <= tick <= edges[-1]] or np.round(edges[[0, -1]]))
        last.set_xlabel(f"tokens of the whole row (log scale); dashed: limit of {max_length}")
    text = f"Histograms of tokens per row, limit {max_length}. {'; '.join(described)}."
    return Figure(file, "Tokens per row", text)


def truncation(splits: Mapping[str, Any], labels: Sequence[str], file: Path) -> Figure:
    """Draw the share of rows whose text is truncated, by split and label."""
    shown = frequent([of["labels"] for of in splits.values()], labels)
    splits = {
        split: {**of, "cut": folded(of["cut"], labels, shown), "labels": folded(of["labels"], labels, shown)}
        for split, of in splits.items()
    }
    labels = list(folded({}, labels, shown))
    font, names = font_and_names([*labels])
    width, highest = 0.8 / len(labels), 0.0
    with canvas(file, 2.8, fonts=[font]) as (figure, ((axis,),)):
        for number, (label, color) in enumerate(zip(labels, palette(len(labels), CLASSES), strict=True)):
            shares = [of["cut"][label] / max(1, of["labels"][label]) for of in splits.values()]
            places = np.arange(len(splits)) + (number - (len(labels) - 1) / 2) * width
            axis.bar(places, shares, width=width * 0.9, color=color, label=names[number])
            for place, share, of in zip(places, shares, splits.values(), strict=True):
                axis.text(place, share, f"{of['cut'][label]}", ha="center", va="bottom", fontsize=8)
            highest = max([highest, *shares])
        axis.set_xticks(range(len(splits)), list(splits))
        axis.set_ylim(0, max(highest * 1.25, 0.01))
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axis.set_ylabel("share of truncated rows")
        figure.legend(loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    counts = "; ".join(f"{split}: {sum(of['cut'].values())} of {of['rows']} rows" for split, of in splits.items())
    return Figure(file, "Truncated texts", f"Rows whose text is truncated, by split and label. {counts}.")


def ledger(buckets: Mapping[str, int], file: Path) -> Figure:
    """Draw the number of rows in each bucket of the ledger."""
    font, names = font_and_names(list(buckets), "bucket")
    with canvas(file, 0.9 + 0.36 * len(buckets), fonts=[font]) as (_, ((axis,),)):
        colors = [CLASSES[2] if name.startswith("used") else CLASSES[0] for name in buckets]
        axis.barh(range(len(buckets)), list(buckets.values()), color=colors, height=0.7)
        for row, count in enumerate(buckets.values()):
            axis.text(count, row, f" {count:,}", va="center")
        axis.set_yticks(range(len(buckets)), names)
        axis.invert_yaxis()
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(0, max([10, *buckets.values()]) * 6)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_xlabel("rows (log scale)")
    counts = ", ".join(f"{name} {count}" for name, count in buckets.items())
    return Figure(file, "Rows read, by bucket of the ledger", f"Rows by bucket: {counts}.")


def near_duplicates(pairs: pl.DataFrame, threshold: float, file: Path) -> Figure:
    """Draw a histogram of the similarity of near duplicates across splits."""
    values = [
        pairs.filter((pl.col("split") == held) & (pl.col("other_split") == other))["similarity"].to_numpy()
        for held, other in inspection.BETWEEN
    ]
    names = [
        f"{held} – {other}: {len(of):,} pairs" for (held, other), of in zip(inspection.BETWEEN, values, strict=True)
    ]
    with canvas(file, 2.8) as (figure, ((axis,),)):
        bins = np.linspace(threshold, 1, 16) if threshold < 1 else np.array([0.95, 1.0])
        axis.hist(values, bins=bins, stacked=True, color=[CLASSES[2], CLASSES[4], CLASSES[3]], label=names)
        axis.set(xlabel="similarity (Jaccard, shingles of characters)", ylabel="pairs", xlim=(bins[0], 1.0))
        if not pairs.height:
            axis.text(0.5, 0.5, "none found", transform=axis.transAxes, ha="center", va="center")
            axis.set_yticks([])
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return Figure(file, "Near duplicates across splits", f"Histogram of similarities. {'; '.join(names)}.")


def traits(rows: pl.DataFrame, labels: Sequence[str], file: Path) -> Figure:
    """Draw text length and share of Chinese characters by label, as boxes from the 5th to the 95th percentile."""
    counts = dict(zip(labels, np.bincount(rows["label"].to_numpy(), minlength=len(labels)).tolist(), strict=True))
    shown = frequent([counts], labels)
    numbers = [place for place, label in enumerate(labels) if label in shown]
    font, names = font_and_names(shown)
    height, classes = 1.2 + 0.42 * len(shown), rows["label"].to_numpy()
    with canvas(file, height, columns=len(TRAITS), fonts=[font], sharey=True) as (_, axes):
        for axis, (name, (expression, _)) in zip(axes[0], TRAITS.items(), strict=True):
            values = rows.select(expression.fill_nan(0.0)).to_series().to_numpy()
            for place, color in enumerate(palette(len(shown), CLASSES)):
                of_class = values[classes == numbers[place]]
                if len(of_class):
                    low, first, median, third, high = np.percentile(of_class, [5, 25, 50, 75, 95])
                    axis.plot([low, high], [place, place], color=GREY, linewidth=1)
                    axis.barh(place, third - first, left=first, color=color, height=0.6, zorder=2)
                    axis.plot([median, median], [place - 0.3, place + 0.3], color="black", linewidth=2, zorder=3)
            axis.set_title(name, fontsize=10)
            if name.startswith("share"):
                axis.xaxis.set_major_formatter(PercentFormatter(1))
                axis.set_xlim(0, 1.02)
            else:
                axis.set_xlim(left=0)
                axis.set_xlabel("characters")
        axes[0][0].set_yticks(range(len(shown)), names)
        axes[0][0].invert_yaxis()
    return Figure(
        file,
        "Length and script by label",
        "Boxes: middle half, whiskers: 5th to 95th percentile; numbers in the table.",
    )
