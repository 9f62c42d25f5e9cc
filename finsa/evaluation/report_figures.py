"""Figures of a report: scores, confusion matrices, classes, training, calibration, labels."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import colormaps, pyplot
from matplotlib.ticker import MaxNLocator, NullFormatter

from finsa.evaluation import calibration, statistics
from finsa.evaluation.comparison import Comparison
from finsa.evaluation.figures import LATIN, MANY, Figure, folded, font_and_names, frequent, letters

# Told apart by colour-blind readers as well (Okabe & Ito 2008); more than that take a map's shades.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#B8A500")
WIDTH, DPI = 6.8, 150  # inches: narrow, so that the writing is still large enough on a telephone
LETTER = 0.058  # inches that a letter of 7 points takes
HARDEST = 12  # of many classes those that are shown
LINES = 8  # arms that a figure of lines can show apart


def draw(comparison: Comparison, folder: Path) -> list[Figure]:
    """Draw all figures into a folder; those without anything to show are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = comparison.arms[0].runs[0].labels
    font, written = font_and_names(labels)
    arm_font, names = font_and_names([arm.name for arm in comparison.arms], "arm")
    fonts = list(dict.fromkeys([font, arm_font, LATIN]))
    settings = {"font.family": fonts, "axes.unicode_minus": False, "font.size": 10}
    with pyplot.rc_context(settings):  # type: ignore[arg-type]
        figures = [
            _f1_bars(comparison, names, folder / "f1.png"),
            _confusions(comparison, names, written, folder / "confusion_matrices.png"),
            _classes(comparison, names, written, folder / "precision_recall.png"),
            _curves(comparison, names, folder / "training_curves.png"),
            _penalties(comparison, names, folder / "penalties.png"),
            _calibration(comparison, names, folder / "calibration.png"),
            _labels(comparison, names, written, folder / "label_distribution.png"),
        ]
    return [figure for figure in figures if figure is not None]


@contextmanager
def _canvas(file: Path, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options
    )
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    try:
        yield figure, axes
        figure.savefig(file, dpi=DPI)
    finally:
        pyplot.close(figure)


def _colours(count: int) -> list[Any]:
    return list(COLOURS[:count]) if count <= len(COLOURS) else list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def _shown(comparison: Comparison) -> list[int]:
    """Numbers of the arms that a figure of lines shows: the baseline and the best ones, in the table's order."""
    ranked = sorted(
        range(len(comparison.arms)),
        key=lambda place: (
            comparison.arms[place].name != comparison.baseline,
            -comparison.records[place]["macro_f1"],
        ),
    )
    return sorted(ranked[:LINES])


def _lines(comparison: Comparison) -> list[tuple[int, Any]]:
    """The arms that a figure of lines shows, each with its colour in all of them."""
    places = _shown(comparison)
    return list(zip(places, _colours(len(places)), strict=True))


def _of(shown: int, count: int) -> str:
    return f" (the baseline and the best, {shown} of {count} arms)" if shown < count else ""


def _f1_bars(comparison: Comparison, names: Sequence[str], file: Path) -> Figure:
    records, places = comparison.records, np.arange(len(names))
    with _canvas(file, 1.3 + 0.55 * len(names)) as (_, axes):
        for shift, name, title, colour in (
            (-0.2, "macro_f1", "macro-F1", COLOURS[0]),
            (0.2, "weighted_f1", "weighted-F1", COLOURS[5]),
        ):
            values = np.array([record[name] for record in records])
            low, high = (np.array([record[f"{name}_{end}"] for record in records]) for end in ("low", "high"))
            errors = np.clip([values - low, high - values], 0, None)
            axes[0, 0].barh(places + shift, values, 0.38, xerr=errors, color=colour, ecolor="#333333", label=title)
            for place, value, end in zip(places, values, high, strict=True):
                axes[0, 0].text(min(end + 0.01, 1.0), place + shift, f"{value:.3f}", va="center", fontsize=8)
        axes[0, 0].set_yticks(places, names)
        axes[0, 0].set(xlim=(0, 1.08), ylim=(len(names) - 0.4, -0.6))
        axes[0, 0].set_xlabel("F1 on the test rows, with 95 % intervals")
        axes[0, 0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    alt = "; ".join(f"{record['arm']}: macro-F1 {record['macro_f1']:.3f}" for record in records)
    return Figure(file, "F1 of the arms", alt)


def _confusions(comparison: Comparison, names: Sequence[str], labels: Sequence[str], file: Path) -> Figure:
    """All matrices in one pair of axes: with a pair for each, 50 arms take ten times as long."""
    count = len(labels)
    columns = _columns(len(names)) if count <= 5 else 1
    rows, wide = -(-len(names) // columns), count + 0.5
    inches = (WIDTH - 1) / (columns * wide)  # of a cell
    gap = max(1.5, 0.4 / inches)  # cells between matrices, for a title and the classes
    high = count + gap
    fits = max(map(letters, labels)) * LETTER <= inches
    step = 1 if count <= MANY else 5
    numbers = [str(place) if place == 1 or place % step == 0 else "" for place in range(1, count + 1)]
    written = list(labels) if fits else numbers
    with _canvas(file, 0.6 + inches * rows * high) as (_, axes):
        for place, arm in enumerate(comparison.arms):
            down, right = divmod(place, columns)
            counts = statistics.confusions(arm.runs[0].gold, arm.predicted, count).sum(axis=0)
            _matrix(axes[0, 0], counts, right * wide, down * high, 22 / (count * columns))
            title = "\n".join(textwrap.wrap(names[place], int(count * inches / LETTER), max_lines=2, placeholder="…"))
            axes[0, 0].text(right * wide + (count - 1) / 2, down * high - 0.6, title, ha="center", fontsize=7)
            for at, name in enumerate(written):
                axes[0, 0].text(right * wide + at, down * high + count - 0.45, name, ha="center", va="top", fontsize=7)
        places = [down * high + at for down in range(rows) for at in range(count)]
        axes[0, 0].set_yticks(places, written * rows, fontsize=7)
        axes[0, 0].set_xticks([])
        axes[0, 0].set(
            xlim=(-0.6, columns * wide - 0.9), ylim=(rows * high - gap + 0.2, 0.5 - gap), aspect="equal", ylabel="true"
        )
        axes[0, 0].set_xlabel("predicted" if fits else "predicted; classes numbered in the order of the table By class")
        axes[0, 0].tick_params(length=0)
        axes[0, 0].spines[["left", "bottom"]].set_visible(False)
    alt = "Rows of each true class by predicted class; the table By class has what follows from them."
    return Figure(file, "Confusion matrices: rows, and shares of the true class; several runs together", alt)


def _columns(matrices: int) -> int:
    """Matrices side by side: as many as leave the fewest places empty, three where that is equal."""
    if matrices <= 4:
        return (1, 2, 3, 2)[matrices - 1]
    return 3 if -matrices % 3 <= -matrices % 4 else 4


def _matrix(axes: Any, counts: Any, x: float, y: float, size: float) -> None:
    """Draw one matrix with its first cell's middle at (x, y); of many classes the colours alone."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    end = len(counts) - 0.5
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, extent=(x - 0.5, x + end, y + end, y - 0.5))
    for (row, column), count in [] if len(counts) > MANY else np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.6 else "black"
        text = f"{count}\n{shares[row, column]:.0%}"
        place = (x + column, y + row)
        axes.text(*place, text, ha="center", va="center", color=colour, fontsize=min(9.0, max(5.0, 3.2 * size)))


def _classes(comparison: Comparison, names: Sequence[str], labels: Sequence[str], file: Path) -> Figure:
    places = np.arange(len(names))
    real, title = comparison.arms[0].runs[0].labels, "Precision and recall by class"
    if len(labels) > MANY:
        f1 = [np.mean([record[f"f1_{label}"] for record in comparison.records]) for label in real]
        hardest = sorted(np.argsort(f1, kind="stable")[:HARDEST].tolist())
        title = f"{title}: {HARDEST} of {len(labels)} classes, those with the lowest F1"
        real, labels = [real[place] for place in hardest], [labels[place] for place in hardest]
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    with _canvas(file, rows * (1.2 + 0.3 * len(names)), rows, columns, sharey=True) as (figure, axes):
        for one in axes.flat[len(labels) :]:
            one.axis("off")
        for one, label, written in zip(axes.flat, real, labels, strict=False):
            for name, marker, colour in (("precision", "D", COLOURS[0]), ("recall", "o", COLOURS[1])):
                values = [record[f"{name}_{label}"] for record in comparison.records]
                one.plot(values, places, marker, color=colour, label=name, clip_on=False)
            one.set_title(written, fontsize=10)
            one.set_xlim(0, 1)
            one.grid(axis="both", color="#dddddd", linewidth=0.6)
            one.set_axisbelow(True)
        axes[0, 0].set_yticks(places, names)
        axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
        handles, texts = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside upper center", ncols=2, frameon=False)
    return Figure(file, title, "The numbers are those of the table By class.")


Log = Sequence[Mapping[str, Any]]


def _steps(log: Log) -> bool:
    """Whether a log is of optimiser steps; one of a penalty grid is not."""
    return any(("loss" in record or "eval_loss" in record) and "strength" not in record for record in log)


def _curves(comparison: Comparison, names: Sequence[str], file: Path) -> Figure | None:
    trained = {place for place, arm in enumerate(comparison.arms) if any(_steps(run.log) for run in arm.runs)}
    shown = [(place, colour) for place, colour in _lines(comparison) if place in trained]
    lines = [(names[place], colour, [run.log for run in comparison.arms[place].runs]) for place, colour in shown]
    return _training(lines, f"Training{_of(len(shown), len(trained))}", file)


def run_curves(log: Log, folder: Path) -> Figure | None:
    """Draw the training curves of one run; None where it has learnt by no steps."""
    return _training([("", COLOURS[0], [log])] if _steps(log) else [], "Training", folder / "training_curves.png")


def _training(lines: Sequence[tuple[str, Any, Sequence[Log]]], title: str, file: Path) -> Figure | None:
    """Draw losses and validation scores by step: lines by name, colour and the logs of their runs."""
    if not lines:
        return None
    scored = any("eval_macro_f1" in record for *_, logs in lines for log in logs for record in log)
    measure, what = ("eval_macro_f1", "macro-F1") if scored else ("eval_loss", "loss")
    with _canvas(file, 5.6, 2, 1, sharex=True) as (figure, axes):
        for name, colour, logs in lines:
            axes[0, 0].plot([], [], color=colour, label=name)  # a line that logs no loss has its name too
            _curve(axes[0, 0], logs, "loss", colour)
            _curve(axes[1, 0], logs, measure, colour, marker="o", markersize=3)
        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set_major_formatter("{x:g}")
        axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
        axes[0, 0].set_ylabel("training loss")
        axes[1, 0].set_ylabel(f"{what} on validation")
        axes[1, 0].set_xlabel("optimiser step")
        axes[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        if any(name for name, *_ in lines):
            figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    alt = f"Training loss and validation {what} by optimiser step, one line per run; losses on other tokens differ."
    return Figure(file, title, alt)


def _curve(axes: Any, logs: Sequence[Log], name: str, colour: Any, **options: Any) -> None:
    for log in logs:
        points = [(record["step"], record[name]) for record in log if name in record]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=1.1, **options)


def _penalties(comparison: Comparison, names: Sequence[str], file: Path) -> Figure | None:
    lines = [
        (names[place], colour, [run.log for run in comparison.arms[place].runs]) for place, colour in _lines(comparison)
    ]
    return _grid([line for line in lines if any("strength" in record for log in line[2] for record in log)], file)


def run_penalties(log: Log, folder: Path) -> Figure | None:
    """Draw the penalty grid of one run; None where it has searched none."""
    searched = any("strength" in record for record in log)
    return _grid([("", COLOURS[0], [log])] if searched else [], folder / "penalties.png")


def _grid(lines: Sequence[tuple[str, Any, Sequence[Log]]], file: Path) -> Figure | None:
    """Draw the validation score of each penalty that a linear classifier was fitted with."""
    if not lines:
        return None
    told, tried = [], set[float]()
    with _canvas(file, 3.2) as (figure, axes):
        for name, colour, logs in lines:
            for number, log in enumerate(logs):
                points = sorted((one["strength"], one["eval_macro_f1"]) for one in log if "strength" in one)
                strengths, values = zip(*points, strict=True)
                tried |= set(strengths)
                label = name if number == 0 else None
                axes[0, 0].plot(strengths, values, "o-", color=colour, linewidth=1.1, markersize=4, label=label)
                told.append(", ".join(f"{strength:g}: {value:.3f}" for strength, value in points))
        axes[0, 0].set_xscale("log")
        axes[0, 0].set_xticks(sorted(tried), [f"{strength:g}" for strength in sorted(tried)], minor=False)
        axes[0, 0].xaxis.set_minor_formatter(NullFormatter())
        axes[0, 0].set(xlabel="C, the inverse strength of the penalty", ylabel="macro-F1 on validation")
        if any(name for name, *_ in lines):
            figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return Figure(file, "Penalty grid: one fit for each C", f"Validation macro-F1 by C: {'; '.join(told)}.")


def _calibration(comparison: Comparison, names: Sequence[str], file: Path) -> Figure:
    with _canvas(file, 5.6) as (figure, axes):
        axes[0, 0].plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1)
        for place, colour in _lines(comparison):
            error = comparison.records[place]["calibration_error"]
            for number, run in enumerate(comparison.arms[place].runs):
                bins = calibration.reliability(run.confidence, run.correct)
                x, y = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
                sizes = [8 + 200 * one["rows"] / len(run.rows) for one in bins]
                label = f"{names[place]}: ECE {error:.3f}" if number == 0 else None
                axes[0, 0].plot(x, y, color=colour, linewidth=0.9, alpha=0.45, clip_on=False, label=label)
                axes[0, 0].scatter(x, y, sizes, color=colour, clip_on=False, zorder=3)
        axes[0, 0].set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the predicted label", ylabel="share right")
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    alt = "; ".join(f"{record['arm']}: ECE {record['calibration_error']:.3f}" for record in comparison.records)
    title = f"Calibration, {calibration.BINS} bins, dots by rows{_of(len(_lines(comparison)), len(names))}"
    return Figure(file, title, f"Reliability diagram. {alt}")


def _labels(comparison: Comparison, names: Sequence[str], labels: Sequence[str], file: Path) -> Figure:
    run = comparison.arms[0].runs[0]
    rows = {
        f"true, {split}": [counts.get(label, 0) for label in run.labels]
        for split, counts in run.ledger.get("splits", {}).items()
        if sum(counts.values()) and split != "test"
    }
    rows["true, test"] = np.bincount(run.gold, minlength=len(labels)).tolist()
    for name, arm in zip(names, comparison.arms, strict=True):
        rows[name] = np.bincount(arm.predicted.ravel(), minlength=len(labels)).tolist()
    by_label = {name: dict(zip(labels, counts, strict=True)) for name, counts in rows.items()}
    shown = frequent(by_label.values(), labels)
    by_label = {name: folded(counts, labels, shown) for name, counts in by_label.items()}
    rows, labels = {name: list(counts.values()) for name, counts in by_label.items()}, list(by_label["true, test"])
    shares = np.array([np.array(counts) / sum(counts) for counts in rows.values()])
    starts = np.cumsum(shares, axis=1) - shares
    with _canvas(file, 1.2 + 0.32 * len(rows)) as (figure, axes):
        for number, (label, colour) in enumerate(zip(labels, _colours(len(labels)), strict=True)):
            axes[0, 0].barh(range(len(rows)), shares[:, number], 0.75, starts[:, number], color=colour, label=label)
            for place, share in enumerate(shares[:, number]):
                if share >= 0.06:
                    middle = starts[place, number] + share / 2
                    axes[0, 0].text(middle, place, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8)
        axes[0, 0].set_yticks(range(len(rows)), list(rows))
        axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
        axes[0, 0].set(xlim=(0, 1), xlabel="share of the rows; arms: predicted on the test rows")
        figure.legend(loc="outside upper center", ncols=min(5, len(labels)), frameon=False)
    alt = "; ".join(f"{name}: {', '.join(map(str, counts))}" for name, counts in rows.items())
    return Figure(file, "Labels: true by split, predicted by arm", f"Rows by class {', '.join(labels)}. {alt}")
