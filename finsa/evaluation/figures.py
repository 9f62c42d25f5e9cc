"""Figures as PNG files: shared drawing functions, and the figures of a single run."""

from __future__ import annotations

import logging
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import colormaps, font_manager, ft2font, pyplot
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from finsa.config import LOWER_IS_BETTER

# Many Chinese fonts have only one weight; silence the message about it at every figure.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

MANY = 20  # with more classes, no color, row or readable cell for each
FREQUENT = 9  # of many classes, the number shown besides the others
WIDTH, DPI = 6.8, 150  # inches: narrow, so that text stays readable on a phone
# Distinguishable by color-blind readers (Okabe & Ito 2008); more lines or classes use shades of a color map.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#B8A500")
CLASSES = ("#D55E00", "#B0B0B0", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442")
LATIN = "DejaVu Sans"  # bundled with matplotlib
CHINESE = Path(__file__).parent / "fonts" / "FinsaSansSC.otf"  # the 3,755 most frequent Chinese characters
# Fonts for characters missing in these two, in order of preference; then any other font that has them.
PREFERRED = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)
Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A picture and its description.

    Args:
        file: the PNG.
        title: of the figure.
        alt: a description for readers who cannot see it.
    """

    file: Path
    title: str
    alt: str


@contextmanager
def canvas(
    file: Path, height: float, rows: int = 1, columns: int = 1, fonts: Sequence[str] = (), **options: Any
) -> Iterator[Any]:
    """Yield a figure and its axes (rows, columns) to draw on, then save it.

    Args:
        file: the PNG.
        height: in inches.
        rows, columns: number of axes.
        fonts: font families in order of preference; empty to keep the current ones.
        options: for ``pyplot.subplots``.
    """
    settings: Any = {"axes.unicode_minus": False, "font.size": 10}
    if fonts:
        settings["font.family"] = list(dict.fromkeys([*fonts, LATIN]))
    options = {"figsize": (WIDTH, height), "layout": "constrained", "squeeze": False, **options}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(rows, columns, **options)
        for one in axes.flat:
            one.spines[["top", "right"]].set_visible(False)
        try:
            yield figure, axes
            figure.savefig(file, dpi=DPI)
        finally:
            pyplot.close(figure)


def palette(count: int, colors: Sequence[str]) -> list[Any]:
    """`count` colors: the given ones, or shades of a color map if there are too few."""
    return list(colors[:count]) if count <= len(colors) else list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def ink(color: Any) -> str:
    """Black or white, whichever has the higher contrast with a color (relative luminance, WCAG 2)."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color))
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def frequent(counts: Iterable[Mapping[str, int]], labels: Sequence[str]) -> list[str]:
    """The labels that a figure shows, in order: all, or the most frequent if there are many."""
    if len(labels) <= MANY:
        return list(labels)
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    kept = {label for label, _ in total.most_common(FREQUENT)}
    return [label for label in labels if label in kept]


def folded(counts: Mapping[str, int], labels: Sequence[str], shown: Sequence[str]) -> dict[str, int]:
    """Counts of the labels shown, and the sum of the others, if any."""
    rest = sum(counts.get(label, 0) for label in labels if label not in shown)
    others = {f"{len(labels) - len(shown)} other classes": rest} if len(shown) < len(labels) else {}
    return {label: counts.get(label, 0) for label in shown} | others


def stacked_shares(axes: Any, table: Any, colors: Sequence[Any], least: float) -> None:
    """Draw horizontal stacked bars of each row's shares, (rows, parts); shares of at least `least` are annotated."""
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1e-12)
    for part, color in enumerate(colors):
        left = shares[:, :part].sum(axis=1)
        axes.barh(range(len(table)), shares[:, part], left=left, color=color, height=0.78)
        for row, share in enumerate(shares[:, part]):
            if share >= least:
                place = (left[row] + share / 2, row)
                axes.text(*place, f"{share:.0%}", ha="center", va="center", color=ink(color), fontsize=8)
    axes.set_xlim(0, 1)


def text_width(text: str) -> int:
    """Width of a text in Latin letters; a Chinese character counts as two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


# ------------------------------------------------------------------------------------------------ figures of a run


def confusion_matrix(report: Mapping[str, Any], title: str, file: Path) -> None:
    """Draw a confusion matrix: counts, colored by the share of the true class; for many classes, colors only."""
    font, names = font_and_names(list(report["per_class"]))
    title_font, (title,) = font_and_names([title], "run")
    many = len(names) > MANY
    cell = 0.13 if many else 0.75  # inches
    size = 2.6 + cell * len(names)
    with canvas(file, size, fonts=[font, title_font], figsize=(size + 0.8, size)) as (figure, ((axes,),)):
        axes.spines[:].set_visible(True)
        image = draw_matrix(axes, np.array(report["confusion"]))
        font_size = 6 if many else 10
        axes.set_xticks(range(len(names)), names, fontsize=font_size)
        axes.set_yticks(range(len(names)), names, fontsize=font_size)
        if many or max(map(text_width, names)) * 0.085 > cell:  # inches per letter
            axes.tick_params("x", rotation=90)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{title}\naccuracy {report['accuracy']:.3f}, macro-F1 {report['macro_f1']:.3f}", fontsize=11)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")


def numbers(pairs: Sequence[tuple[float, float]], title: str, file: Path) -> None:
    """Draw predicted by true numbers, given as pairs of true and predicted."""
    font, (title,) = font_and_names([title], "run")
    true, predicted = zip(*pairs, strict=True)
    ends = min(*true, *predicted), max(*true, *predicted)
    with canvas(file, 5.2, fonts=[font], figsize=(5.6, 5.2)) as (_, ((axes,),)):
        axes.plot(ends, ends, color="#999999", linestyle="--", linewidth=1)
        axes.scatter(true, predicted, s=12, alpha=0.4, color=LINES[0], linewidths=0)
        axes.set(xlabel="true", ylabel="predicted", aspect="equal")
        axes.set_title(title, fontsize=11)


def draw_matrix(axes: Any, counts: Any, x: float = 0, y: float = 0, font_size: float = 10) -> Any:
    """Draw a confusion matrix (c, c) with the center of its first cell at (x, y), and return the image."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    end = len(counts) - 0.5
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, extent=(x - 0.5, x + end, y + end, y - 0.5))
    for (row, column), count in [] if len(counts) > MANY else np.ndenumerate(counts):
        color, text = "white" if shares[row, column] > 0.6 else "black", f"{count}\n{shares[row, column]:.0%}"
        axes.text(x + column, y + row, text, ha="center", va="center", color=color, fontsize=font_size)
    return image


def bars(
    records: Sequence[Mapping[str, Any]], row: str, series: str, value: str, title: str, label: str, file: Path
) -> Figure:
    """Draw a bar per record with its interval, grouped by the keys `row` and, in colors, `series`; None has no bar."""
    rows, names = (list(dict.fromkeys(str(record[key]) for record in records)) for key in (row, series))
    font, shown = font_and_names([*rows, *names], "name")
    size = 0.8 / len(names)
    with canvas(file, 1.2 + 0.2 * len(rows) * max(2, len(names)), fonts=[font]) as (_, ((axes,),)):
        for number, (name, color) in enumerate(zip(names, palette(len(names), LINES), strict=True)):
            known = [one for one in records if str(one[series]) == name and one[value] is not None]
            places = np.array([rows.index(str(one[row])) for one in known]) - 0.4 + size * (number + 0.5)
            low, middle, high = (np.array([one[value + end] for one in known]) for end in ("_low", "", "_high"))
            errors = np.clip([middle - low, high - middle], 0, None)
            text = shown[len(rows) + number]
            axes.barh(places, middle, 0.9 * size, xerr=errors, color=color, ecolor="#333333", label=text)
        axes.set_yticks(range(len(rows)), shown[: len(rows)])
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel=f"{label}, with 95 % intervals")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    alt = "; ".join(f"{one[row]}, {one[series]}: {one[value]:.3f}" for one in records if one[value] is not None)
    return Figure(file, title, alt)


def search(scores: Sequence[float | None], file: Path, measure: str = "macro_f1") -> None:
    """Draw a search's scores by trial, and the best so far; trials stopped early have none (None)."""
    lower = measure in LOWER_IS_BETTER
    with canvas(file, 3.6) as (_, ((axes,),)):
        ended = [(number, score) for number, score in enumerate(scores) if score is not None]
        numbers, values = zip(*ended, strict=True)
        axes.plot(numbers, values, "o", color="#4477aa", label="trial")
        best = (np.minimum if lower else np.maximum).accumulate(values)
        axes.step(numbers, best, where="post", color="#cc6677", label="best so far")
        stopped = [number for number, score in enumerate(scores) if score is None]
        worst = max(values) if lower else min(values)
        axes.plot(stopped, [worst] * len(stopped), "x", color="#999999", label="stopped early")
        axes.set(xlabel="trial", ylabel=f"{'RMSE' if lower else 'macro-F1'} on validation")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)


def periods(scores: Mapping[str, Mapping[str, Any]], file: Path) -> Figure:
    """Draw accuracy and macro-F1 by period, with their intervals."""
    with canvas(file, 3.4) as (_, ((axes,),)):
        for number, (name, title) in enumerate((("accuracy", "accuracy"), ("macro_f1", "macro-F1"))):
            known = [(place, one) for place, one in enumerate(scores.values()) if one[name] is not None]
            values = np.array([one[name] for _, one in known])
            ends = np.array([one["intervals"][name] for _, one in known]).reshape(-1, 2)
            places = np.array([place for place, _ in known]) + 0.12 * number - 0.06
            away = np.abs(ends - values[:, None]).T
            axes.errorbar(places, values, away, fmt="o-", capsize=3, linewidth=1, color=LINES[number], label=title)
        axes.set_xticks(range(len(scores)), [f"{name}\n{one['n']:,}" for name, one in scores.items()], fontsize=8)
        axes.set(xlabel="period, and its number of rows", ylabel="score on test, with 95 % interval")
        axes.legend(frameon=False)
    described = "; ".join(f"{name}: {one['accuracy']:.3f}" for name, one in scores.items())
    return Figure(file, "Scores by period", f"Accuracy by period: {described}.")


def learning_curve(
    points: Mapping[int, Sequence[float]], sizes: Any, line: Any, band: Any, rows: int, file: Path
) -> Figure:
    """Draw scores by training rows, the fitted curve (m,) at sizes (m,), and its interval (2, m)."""
    with canvas(file, 3.8) as (_, ((axes,),)):
        axes.fill_between(sizes, *band, color=LINES[0], alpha=0.15, linewidth=0, label="95 % interval")
        axes.plot(sizes, line, color=LINES[0], label="power law")
        places = [(size, value) for size, values in points.items() for value in values]
        axes.plot(*zip(*places, strict=True), "o", color="black", markersize=4, label="run")
        axes.axvline(rows, color="#999999", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        ticks = [*points, 2 * rows, 4 * rows]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="training rows (dashed: all of them)", ylabel="macro-F1 on test")
        axes.legend(frameon=False, loc="lower right")
    means = ", ".join(f"{size:,}: {np.mean(values):.3f}" for size, values in points.items())
    return Figure(file, "Learning curve", f"Mean macro-F1 by training rows: {means}.")


def has_steps(log: Log) -> bool:
    """Whether a log records optimizer steps, not a penalty grid."""
    return any(("loss" in record or "eval_loss" in record) and "strength" not in record for record in log)


def has_penalties(log: Log) -> bool:
    """Whether a log records a penalty grid."""
    return any("strength" in record for record in log)


def training_curves(lines: Sequence[tuple[str, Any, Sequence[Log]]], title: str, file: Path) -> Figure:
    """Draw training losses and validation scores by step.

    Args:
        lines: name, color and logs of the runs; an unnamed line is not in the legend.
        title: of the figure.
        file: the PNG.
    """
    keys = {key for *_, logs in lines for log in logs for record in log for key in record}
    titles = {"eval_macro_f1": "macro-F1", "eval_rmse": "RMSE", "eval_loss": "loss"}
    measure, what = next((one for one in titles.items() if one[0] in keys), ("eval_loss", "loss"))
    with canvas(file, 5.6, rows=2, sharex=True) as (figure, ((upper,), (lower,))):
        for name, color, logs in lines:
            upper.plot([], [], color=color, label=name)  # so that a run without losses is in the legend too
            for axes, key, options in ((upper, "loss", {}), (lower, measure, {"marker": "o", "markersize": 3})):
                for log in logs:
                    points = [(record["step"], record[key]) for record in log if key in record]
                    if points:
                        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.1, **options)
        upper.set(ylabel="training loss")
        if all(record.get("loss", 1) > 0 for _, _, logs in lines for log in logs for record in log):
            upper.set(yscale="log")  # expected rewards are negative losses
            upper.yaxis.set_major_formatter("{x:g}")
            upper.yaxis.set_minor_formatter(NullFormatter())
        lower.set(xlabel="optimizer step", ylabel=f"{what} on validation")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        if any(name for name, *_ in lines):
            figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    alt = f"Training loss and validation {what} by optimizer step, one line per run; losses on other tokens differ."
    return Figure(file, title, alt)


def penalty_grid(lines: Sequence[tuple[str, Any, Sequence[Log]]], file: Path) -> Figure:
    """Draw the validation score of each penalty that a linear classifier was fitted with; see `training_curves`."""
    described, tried = [], set[float]()
    scored = any("eval_macro_f1" in record for *_, logs in lines for log in logs for record in log)
    measure, what = ("eval_macro_f1", "macro-F1") if scored else ("eval_rmse", "RMSE")
    with canvas(file, 3.2) as (figure, ((axes,),)):
        for name, color, logs in lines:
            for number, log in enumerate(logs):
                points = sorted((one["strength"], one[measure]) for one in log if "strength" in one)
                strengths, values = zip(*points, strict=True)
                tried |= set(strengths)
                label = name if number == 0 else None
                axes.plot(strengths, values, "o-", color=color, linewidth=1.1, markersize=4, label=label)
                described.append(", ".join(f"{strength:g}: {value:.3f}" for strength, value in points))
        axes.set_xscale("log")
        axes.set_xticks(sorted(tried), [f"{strength:g}" for strength in sorted(tried)], minor=False)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="C, the inverse strength of the penalty", ylabel=f"{what} on validation")
        if any(name for name, *_ in lines):
            figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return Figure(file, "Penalty grid: one fit for each C", f"Validation {what} by C: {'; '.join(described)}.")


def router(routers: Mapping[str, Mapping[str, Any]], file: Path) -> Figure:
    """Draw the mean gates of every domain as stacked bars; `routers` has the ``router`` part of metrics by run."""
    bars = [(f"{run}: {domain}", gates) for run, one in routers.items() for domain, gates in one["mean_gates"].items()]
    experts = list(dict.fromkeys(expert for _, gates in bars for expert in gates))
    font, names = font_and_names([name for name, _ in bars], "rows")
    expert_font, expert_names = font_and_names(experts, "expert")
    colors = palette(len(experts), LINES)
    with canvas(file, 1.3 + 0.4 * len(bars), fonts=[font, expert_font]) as (_, ((axes,),)):
        stacked_shares(axes, np.array([[gates.get(one, 0.0) for one in experts] for _, gates in bars]), colors, 0.06)
        axes.set_yticks(range(len(bars)), names)
        axes.set(ylim=(len(bars) - 0.4, -0.6), xlabel="mean share of each expert over the test rows")
        patches = [Patch(color=color) for color in colors]
        axes.legend(patches, expert_names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    alt = "; ".join(
        f"{name}: {', '.join(f'{expert} {share:.2f}' for expert, share in gates.items())}" for name, gates in bars
    )
    return Figure(file, "Router: mean share of each expert by domain", alt)


# ------------------------------------------------------------------------------------------------ fonts


def font_and_names(names: Sequence[str], kind: str = "class") -> tuple[str, list[str]]:
    """Find a font for the characters of names that matplotlib's default font lacks; returns it and the names to draw.

    Frequent Chinese characters are in the font that comes with finsa; for others, installed fonts are searched. Names
    that no font can render are replaced by ``<kind> <number>``, with a warning.
    """
    characters = frozenset(letter for name in names for letter in name if letter.isprintable() and not letter.isspace())
    missing = _missing(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", characters)
    if not missing:
        return LATIN, list(names)
    fonts = font_manager.fontManager
    if not any(entry.fname == str(CHINESE) for entry in fonts.ttflist):
        fonts.addfont(CHINESE)
    rare = _missing(CHINESE, missing)
    if rare and (installed := _installed(missing)):
        return installed, list(names)
    if rare:
        _warn("".join(sorted(rare)), kind)
    written = [f"{kind} {number}" if rare & set(name) else name for number, name in enumerate(names, start=1)]
    return "Finsa Sans SC", written


def _missing(font: Path | str, characters: frozenset[str]) -> frozenset[str]:
    """Characters that a font does not have."""
    face = ft2font.FT2Font(str(font))
    return frozenset(letter for letter in characters if not face.get_char_index(ord(letter)))


@cache
def _installed(characters: frozenset[str]) -> str | None:
    """An installed font with all of these characters; matplotlib's list of fonts may be older than some of them."""
    fonts = font_manager.fontManager
    known = {entry.fname for entry in fonts.ttflist}
    for file in font_manager.findSystemFonts():
        if file not in known:
            with suppress(OSError, RuntimeError):  # a damaged file, or a format that matplotlib does not read
                fonts.addfont(file)
    ranked = sorted(fonts.ttflist, key=lambda entry: (entry.name not in PREFERRED, entry.weight != 400))
    for entry in ranked:
        if "Resort" in entry.name:  # "Last Resort" has placeholder boxes for all characters
            continue
        with suppress(OSError, RuntimeError):  # listed, but removed since
            if not _missing(entry.fname, characters):
                return str(entry.name)
    return None


@cache
def _warn(characters: str, kind: str) -> None:
    """Warn once for the same characters."""
    print(
        f"warning: no font has {characters}; figures show '{kind} 1', '{kind} 2' ... instead of the names. Install one "
        "that has them, such as Debian's fonts-noto-cjk; tables and pages are not affected",
        file=sys.stderr,
    )
