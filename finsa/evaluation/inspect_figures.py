"""Figures of a data set: labels, lengths, cut texts, the ledger, near duplicates, what gives the label away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl

matplotlib.use("Agg")
from matplotlib import colormaps, pyplot
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from finsa.evaluation.confounds import TRAITS, percent
from finsa.evaluation.figures import LATIN, Figure, folded, font_and_names, frequent

# Told apart by colour-blind readers as well (Okabe & Ito 2008); more classes than that take a map's shades.
COLOURS = ("#D55E00", "#B0B0B0", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442")
WIDTH, DPI = 6.4, 160  # inches: narrow, so that the writing is still large enough on a telephone
GREY = "#444444"


@contextmanager
def _canvas(
    file: Path, fonts: Sequence[str], height: float, columns: int = 1, rows: int = 1, **options: Any
) -> Iterator[Any]:
    settings: Any = {"font.family": list(dict.fromkeys([*fonts, LATIN])), "axes.unicode_minus": False, "font.size": 10}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options
        )
        for one in axes.flat:
            one.spines[["top", "right"]].set_visible(False)
        yield figure, axes
        figure.savefig(file, dpi=DPI)
        pyplot.close(figure)


def _colours(count: int) -> list[Any]:
    return list(COLOURS[:count]) if count <= len(COLOURS) else list(colormaps["viridis"](np.linspace(0, 1, count)))


Counts = Mapping[str, Mapping[str, Mapping[str, int]]]


def labels_by_group(kind: str, panels: Counts, labels: Sequence[str], file: Path) -> Figure:
    """Draw the shares of the labels in each group.

    Args:
        kind: what the groups are.
        panels: rows by panel (a split, or all rows), by group, by label.
        labels: in their order.
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
    with _canvas(file, [font, group_font], 1.6 + 0.36 * len(groups), len(panels), sharey=True) as drawn:
        figure, axes = drawn
        for axis, (panel, by_group) in zip(axes[0], panels.items(), strict=True):
            table = np.array([[by_group[group].get(label, 0) for label in labels] for group in groups])
            _stack(axis, table, _colours(len(labels)), room=0.07 * len(panels))
            axis.set_title(f"{panel}: {table.sum():,} rows", fontsize=10)
        axes[0][0].set_yticks(range(len(groups)), group_names)
        axes[0][0].invert_yaxis()
        patches = [Patch(color=colour) for colour in _colours(len(labels))]
        figure.legend(patches, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    told = "; ".join(f"{group}: {_told(group, panels)}" for group in groups)
    return Figure(file, f"Labels by {kind}", f"Shares of the labels by {kind}. {told}.")


def _told(group: str, panels: Counts) -> str:
    sums: Counter[str] = Counter()
    for by_group in panels.values():
        sums.update(by_group[group])
    return ", ".join(f"{label} {percent(count / (sums.total() or 1))}" for label, count in sums.items())


def _stack(axis: Any, table: Any, palette: Sequence[Any], room: float) -> None:
    """Horizontal bars of shares; a share of `room` or more is also written."""
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    for number, colour in enumerate(palette):
        left = shares[:, :number].sum(axis=1)
        axis.barh(range(len(table)), shares[:, number], left=left, color=colour, height=0.78)
        for row, share in enumerate(shares[:, number]):
            if share >= room:
                place = (left[row] + share / 2, row)
                axis.text(*place, f"{share:.0%}", ha="center", va="center", color=_ink(colour), fontsize=8)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xticks([0, 0.5, 1])
    for tick, side in zip(axis.get_xticklabels(), ("left", "center", "right"), strict=True):
        tick.set_horizontalalignment(side)  # so that neighbouring panels do not write into each other


def _ink(colour: Any) -> str:
    """Black or white, whichever stands out more on a colour (relative luminance, WCAG 2)."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def token_lengths(lengths: Mapping[str, Any], max_length: int, file: Path) -> Figure:
    """Draw how many tokens the rows of each split have, and where they are cut."""
    shown = {split: values for split, values in lengths.items() if len(values)}
    everything = np.concatenate([*shown.values(), [max_length]])
    edges = np.geomspace(max(1, everything.min()), everything.max() * 1.02, 50)
    with _canvas(file, [], 0.8 + 1.35 * len(shown), rows=max(1, len(shown)), sharex=True) as (_, axes):
        for axis, (split, values) in zip(axes[:, 0], shown.items(), strict=False):
            axis.hist(np.clip(values, edges[0], edges[-1]), bins=edges, color=COLOURS[2])
            axis.axvline(max_length, color=COLOURS[0], linewidth=1.5, linestyle="--")
            over = int((values > max_length).sum())
            axis.set_title(f"{split}: median {np.median(values):.0f}, {over:,} of {len(values):,} cut", fontsize=10)
            axis.set_ylabel("rows")
            axis.set_xscale("log")
        last = axes[-1][0]
        last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        last.xaxis.set_minor_formatter(NullFormatter())
        last.set_xticks(_ticks(edges[0], edges[-1]))
        last.set_xlabel(f"tokens of the whole row (log scale); dashed: cut-off at {max_length}")
    told = "; ".join(
        f"{split}: median {np.median(values):.0f}, longest {values.max()}, {(values > max_length).sum()} cut"
        for split, values in shown.items()
    )
    return Figure(file, "Tokens per row", f"Histograms of tokens per row, cut-off at {max_length}. {told}.")


def _ticks(low: float, high: float) -> list[float]:
    round_numbers = [factor * 10**power for power in range(7) for factor in (1, 2, 5)]
    return [number for number in round_numbers if low <= number <= high] or [round(low), round(high)]


def truncation(splits: Mapping[str, Any], labels: Sequence[str], file: Path) -> Figure:
    """Draw the share of rows whose text is cut, by split and label."""
    shown = frequent([of["labels"] for of in splits.values()], labels)
    splits = {
        split: {**of, "cut": folded(of["cut"], labels, shown), "labels": folded(of["labels"], labels, shown)}
        for split, of in splits.items()
    }
    labels = list(folded({}, labels, shown))
    font, names = font_and_names([*labels])
    width = 0.8 / len(labels)
    with _canvas(file, [font], 2.8) as (figure, axes):
        axis, highest = axes[0][0], 0.0
        for number, (label, colour) in enumerate(zip(labels, _colours(len(labels)), strict=True)):
            shares = [of["cut"][label] / max(1, of["labels"][label]) for of in splits.values()]
            places = np.arange(len(splits)) + (number - (len(labels) - 1) / 2) * width
            axis.bar(places, shares, width=width * 0.9, color=colour, label=names[number])
            for place, share, of in zip(places, shares, splits.values(), strict=True):
                axis.text(place, share, f"{of['cut'][label]}", ha="center", va="bottom", fontsize=8)
            highest = max([highest, *shares])
        axis.set_xticks(range(len(splits)), list(splits))
        axis.set_ylim(0, max(highest * 1.25, 0.01))
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axis.set_ylabel("share of rows with cut text")
        figure.legend(loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    told = "; ".join(f"{split}: {sum(of['cut'].values())} of {of['rows']} rows" for split, of in splits.items())
    return Figure(file, "Cut texts", f"Rows whose text is cut, by split and label. {told}.")


def ledger(buckets: Mapping[str, int], file: Path) -> Figure:
    """Draw what became of the rows read."""
    font, names = font_and_names(list(buckets), "fate")
    with _canvas(file, [font], 0.9 + 0.36 * len(buckets)) as (_, axes):
        axis = axes[0][0]
        used = [COLOURS[2] if name.startswith("used") else COLOURS[0] for name in buckets]
        axis.barh(range(len(buckets)), list(buckets.values()), color=used, height=0.7)
        for row, count in enumerate(buckets.values()):
            axis.text(count, row, f" {count:,}", va="center")
        axis.set_yticks(range(len(buckets)), names)
        axis.invert_yaxis()
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(0, max([10, *buckets.values()]) * 6)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_xlabel("rows (log scale)")
    told = ", ".join(f"{name} {count}" for name, count in buckets.items())
    return Figure(file, "What became of the rows read", f"Rows by fate: {told}.")


def near_duplicates(pairs: pl.DataFrame, threshold: float, file: Path) -> Figure:
    """Draw how alike the near duplicates across splits are."""
    between = [("test", "train"), ("validation", "train"), ("test", "validation")]
    values = [
        pairs.filter((pl.col("split") == held) & (pl.col("other_split") == other))["similarity"].to_numpy()
        for held, other in between
    ]
    names = [f"{held} – {other}: {len(of):,} pairs" for (held, other), of in zip(between, values, strict=True)]
    with _canvas(file, [], 2.8) as (figure, axes):
        axis = axes[0][0]
        bins = np.linspace(threshold, 1, 16) if threshold < 1 else np.array([0.95, 1.0])
        axis.hist(values, bins=bins, stacked=True, color=[COLOURS[2], COLOURS[4], COLOURS[3]], label=names)
        axis.set_xlabel("similarity (Jaccard, shingles of characters)")
        axis.set_ylabel("pairs")
        axis.set_xlim(bins[0], 1.0)
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
    labels = shown
    font, names = font_and_names([*labels])
    with _canvas(file, [font], 1.2 + 0.42 * len(labels), columns=len(TRAITS), sharey=True) as (_, axes):
        for axis, (name, (expression, _)) in zip(axes[0], TRAITS.items(), strict=True):
            values, classes = rows.select(expression.fill_nan(0.0)).to_series().to_numpy(), rows["label"].to_numpy()
            for number, colour in enumerate(_colours(len(labels))):
                own = values[classes == numbers[number]]
                if len(own):
                    low, first, middle, third, high = np.percentile(own, [5, 25, 50, 75, 95])
                    axis.plot([low, high], [number, number], color=GREY, linewidth=1)
                    axis.barh(number, third - first, left=first, color=colour, height=0.6, zorder=2)
                    axis.plot([middle, middle], [number - 0.3, number + 0.3], color="black", linewidth=2, zorder=3)
            axis.set_title(name, fontsize=10)
            if name.startswith("share"):
                axis.xaxis.set_major_formatter(PercentFormatter(1))
                axis.set_xlim(0, 1.02)
            else:
                axis.set_xlim(left=0)
                axis.set_xlabel("characters")
        axes[0][0].set_yticks(range(len(labels)), names)
        axes[0][0].invert_yaxis()
    return Figure(
        file,
        "Length and script by label",
        "Boxes: middle half, whiskers: 5th to 95th percentile; numbers in the table.",
    )
