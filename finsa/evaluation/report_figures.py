"""Figures of a report: scores, confusion matrices, classes, training, calibration, labels, routers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from finsa.config.base import MEASURES, headline
from finsa.evaluation import calibration, selective, statistics
from finsa.evaluation import figures as drawing
from finsa.evaluation.comparison import Comparison
from finsa.evaluation.figures import CLASSES, LATIN, LINES, MANY, WIDTH, Figure, canvas, palette
from finsa.evaluation.tables import TITLES

LETTER = 0.058  # width of a 7-point letter in inches
HARDEST = 12  # with many classes, the number shown
LEAST = 1e-9  # cost on a logarithmic axis
MOST_LINES = 8  # maximum number of groups in a line figure


def draw(comparison: Comparison, folder: Path) -> list[Figure]:
    """Draw all figures into a folder, except those without data."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = comparison.groups
    font, labels = drawing.font_and_names(groups[0].runs[0].labels)
    name_font, names = drawing.font_and_names([group.name for group in groups], "configuration")
    # A line figure shows the baseline and the best groups, each with the same color in all figures.
    ranked = sorted(range(len(groups)), key=lambda place: groups[place].name != comparison.baseline)
    shown = sorted(ranked[:MOST_LINES])
    colors = dict(zip(shown, palette(len(shown), LINES), strict=True))
    logs = {place: [run.log for run in groups[place].runs] for place in range(len(groups))}
    trained = [place for place in logs if any(map(drawing.has_steps, logs[place]))]
    curves = [(names[place], colors[place], logs[place]) for place in shown if place in trained]
    grids = [
        (names[place], colors[place], logs[place]) for place in shown if any(map(drawing.has_penalties, logs[place]))
    ]
    routers = {group.name: group.runs[0].metrics["router"] for group in groups if group.runs[0].metrics.get("router")}
    task = groups[0].runs[0].task
    settings: Any = {"font.family": list(dict.fromkeys([font, name_font, LATIN]))}
    with pyplot.rc_context(settings):
        figures = [_score_bars(comparison, names, task, folder / ("scores.png" if task in MEASURES else "f1.png"))]
        if task not in MEASURES:
            figures.append(_confusion_matrices(comparison, names, labels, folder / "confusion_matrices.png"))
        if task != "regression":
            figures.append(_precision_recall(comparison, names, labels, folder / "precision_recall.png"))
        if curves:
            title = f"Training{_subset(len(curves), len(trained))}"
            figures.append(drawing.training_curves(curves, title, folder / "training_curves.png"))
        if grids:
            figures.append(drawing.penalty_grid(grids, folder / "penalties.png"))
        if task not in MEASURES:
            figures += [
                _calibration(comparison, names, colors, folder / "calibration.png"),
                _risk_coverage(comparison, names, colors, folder / "risk_coverage.png"),
                _label_distribution(comparison, names, labels, folder / "label_distribution.png"),
            ]
        if sum(record.get("seconds_per_1000") is not None for record in comparison.records) > 1:
            figures.append(_pareto(comparison, names, task, folder / "pareto.png"))
    return [*figures, drawing.router(routers, folder / "router.png")] if routers else figures


def _subset(shown: int, count: int) -> str:
    return f" (the baseline and the best, {shown} of {count} configurations)" if shown < count else ""


def _score_bars(comparison: Comparison, names: Sequence[str], task: str, file: Path) -> Figure:
    """Draw two scores of each configuration: F1, or of numbers RMSE and MAE."""
    what = "Errors" if task == "regression" else "F1"
    first, second = MEASURES.get(task, ("macro_f1", "weighted_f1"))[:2]
    records, places = comparison.records, np.arange(len(names))
    with canvas(file, 1.3 + 0.55 * len(names)) as (_, ((axes,),)):
        for shift, name, title, color in (
            (-0.2, first, TITLES[first], LINES[0]),
            (0.2, second, TITLES[second], LINES[5]),
        ):
            values = np.array([record[name] for record in records])
            low, high = (np.array([record[f"{name}_{end}"] for record in records]) for end in ("low", "high"))
            errors = np.clip([values - low, high - values], 0, None)
            axes.barh(places + shift, values, 0.38, xerr=errors, color=color, ecolor="#333333", label=title)
            for place, value, end in zip(places, values, high, strict=True):
                right = end + 0.01 if task == "regression" else min(end + 0.01, 1.0)
                axes.text(right, place + shift, f"{value:.3f}", va="center", fontsize=8)
        axes.set_yticks(places, names)
        most = 1.08 if task != "regression" else 1.15 * max(record[f"{first}_high"] for record in records) + 0.05
        axes.set(xlim=(0, most), ylim=(len(names) - 0.4, -0.6), xlabel=f"{what} on the test rows, with 95 % intervals")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    alt = "; ".join(f"{record['arm']}: {TITLES[first]} {record[first]:.3f}" for record in records)
    return Figure(file, f"{what} by configuration", alt)


def _confusion_matrices(comparison: Comparison, names: Sequence[str], labels: Sequence[str], file: Path) -> Figure:
    """Draw all matrices on one Axes: with one Axes per matrix, 50 groups take ten times as long."""
    count = len(labels)
    columns = _columns(len(names)) if count <= 5 else 1
    rows, wide = -(-len(names) // columns), count + 0.5
    inches = (WIDTH - 1) / (columns * wide)  # of a cell
    gap = max(1.5, 0.4 / inches)  # cells between matrices, for the title and the class labels
    high = count + gap
    fits = max(map(drawing.text_width, labels)) * LETTER <= inches
    step = 1 if count <= MANY else 5
    numbers = [str(place) if place == 1 or place % step == 0 else "" for place in range(1, count + 1)]
    written = list(labels) if fits else numbers
    with canvas(file, 0.6 + inches * rows * high) as (_, ((axes,),)):
        for place, group in enumerate(comparison.groups):
            down, right = divmod(place, columns)
            x, y = right * wide, down * high
            counts = statistics.confusions(group.runs[0].gold, group.predicted, count).sum(axis=0)
            drawing.draw_matrix(axes, counts, x, y, min(9.0, max(5.0, 3.2 * 22 / (count * columns))))
            title = "\n".join(textwrap.wrap(names[place], int(count * inches / LETTER), max_lines=2, placeholder="…"))
            axes.text(x + (count - 1) / 2, y - 0.6, title, ha="center", fontsize=7)
            for at, name in enumerate(written):
                axes.text(x + at, y + count - 0.45, name, ha="center", va="top", fontsize=7)
        places = [down * high + at for down in range(rows) for at in range(count)]
        axes.set_yticks(places, written * rows, fontsize=7)
        axes.set_xticks([])
        axes.set(xlim=(-0.6, columns * wide - 0.9), ylim=(rows * high - gap + 0.2, 0.5 - gap), aspect="equal")
        axes.set(ylabel="true", xlabel="predicted" + "; classes numbered as in the table By class" * (not fits))
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    alt = "Rows of each true class by predicted class; the table By class lists the resulting scores."
    return Figure(file, "Confusion matrices: rows, and shares of the true class; several runs are summed", alt)


def _columns(matrices: int) -> int:
    """Number of matrices per row: the one that leaves the fewest empty cells; three if equal."""
    if matrices <= 4:
        return (1, 2, 3, 2)[matrices - 1]
    return 3 if -matrices % 3 <= -matrices % 4 else 4


def _precision_recall(comparison: Comparison, names: Sequence[str], labels: Sequence[str], file: Path) -> Figure:
    places = np.arange(len(names))
    keys, title = comparison.groups[0].runs[0].labels, "Precision and recall by class"
    if len(labels) > MANY:
        f1 = [np.mean([record[f"f1_{label}"] for record in comparison.records]) for label in keys]
        hardest = sorted(np.argsort(f1, kind="stable")[:HARDEST].tolist())
        title = f"{title}: {HARDEST} of {len(labels)} classes, those with the lowest F1"
        keys, labels = [keys[place] for place in hardest], [labels[place] for place in hardest]
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    with canvas(file, rows * (1.2 + 0.3 * len(names)), rows, columns, sharey=True) as (figure, axes):
        for one in axes.flat[len(labels) :]:
            one.axis("off")
        for one, key, label in zip(axes.flat, keys, labels, strict=False):
            for name, marker, color in (("precision", "D", LINES[0]), ("recall", "o", LINES[1])):
                values = [record[f"{name}_{key}"] for record in comparison.records]
                one.plot(values, places, marker, color=color, label=name, clip_on=False)
            one.set_title(label, fontsize=10)
            one.set_xlim(0, 1)
            one.grid(axis="both", color="#dddddd", linewidth=0.6)
            one.set_axisbelow(True)
        axes[0, 0].set_yticks(places, names)
        axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
        handles, texts = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside upper center", ncols=2, frameon=False)
    return Figure(file, title, "The numbers are those of the table By class.")


def _calibration(comparison: Comparison, names: Sequence[str], colors: dict[int, Any], file: Path) -> Figure:
    with canvas(file, 5.6) as (figure, ((axes,),)):
        axes.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1)
        for place, color in colors.items():
            error = comparison.records[place]["calibration_error"]
            for number, run in enumerate(comparison.groups[place].runs):
                bins = calibration.reliability(run.confidence, run.correct)
                x, y = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
                sizes = [8 + 200 * one["rows"] / len(run.rows) for one in bins]
                label = f"{names[place]}: ECE {error:.3f}" if number == 0 else None
                axes.plot(x, y, color=color, linewidth=0.9, alpha=0.45, clip_on=False, label=label)
                axes.scatter(x, y, sizes, color=color, clip_on=False, zorder=3)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the predicted label", ylabel="accuracy")
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    alt = "; ".join(f"{record['arm']}: ECE {record['calibration_error']:.3f}" for record in comparison.records)
    title = f"Calibration, {calibration.BINS} bins, dots by rows{_subset(len(colors), len(names))}"
    return Figure(file, title, f"Reliability diagram. {alt}")


def _risk_coverage(comparison: Comparison, names: Sequence[str], colors: dict[int, Any], file: Path) -> Figure:
    with canvas(file, 4.4) as (figure, ((axes,),)):
        for place, color in colors.items():
            area = comparison.records[place]["aurc"]
            for number, run in enumerate(comparison.groups[place].runs):
                rates = selective.risks(run.confidence, run.correct)
                shares = np.arange(1, len(rates) + 1) / len(rates)
                least = np.searchsorted(shares, 0.05)  # error rates of a few rows jump
                label = f"{names[place]}: AURC {area:.3f}" if number == 0 else None
                axes.plot(shares[least:], rates[least:], color=color, linewidth=1.4, label=label)
        axes.set(xlim=(0, 1), xlabel="share of the test rows that are answered, the surest first", ylabel="error rate")
        axes.set_ylim(bottom=0)
        axes.grid(color="#dddddd", linewidth=0.6)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    alt = "; ".join(f"{record['arm']}: AURC {record['aurc']:.3f}" for record in comparison.records)
    title = f"Error rate by share of answered rows{_subset(len(colors), len(names))}"
    return Figure(file, title, f"Risk-coverage curve. {alt}")


def _pareto(comparison: Comparison, names: Sequence[str], task: str, file: Path) -> Figure:
    money = comparison.records[0].get("currency")
    cost, measure = "money_per_1000" if money else "seconds_per_1000", headline(task)
    known = [(name, one) for name, one in zip(names, comparison.records, strict=True) if one[cost] is not None]
    with canvas(file, 4.2) as (_, ((axes,),)):
        axes.set(xscale="log", xlabel=f"{money or 'seconds'} per 1,000 answers", ylabel=TITLES[measure])
        spent = [max(one[cost], LEAST) for _, one in known]
        for name, one in known:
            color, point = LINES[0] if one["pareto"] else LINES[6], (max(one[cost], LEAST), one[measure])
            axes.plot([point[0]] * 2, [one[f"{measure}_low"], one[f"{measure}_high"]], color="#cccccc", zorder=1)
            axes.plot(*point, "o", color=color, zorder=3)
            side, shift = ("right", -7) if point[0] ** 2 > min(spent) * max(spent) else ("left", 7)
            axes.annotate(name, point, (shift, 4), textcoords="offset points", fontsize=8, color=color, ha=side)
        best = sorted((max(one[cost], LEAST), one[measure]) for _, one in known if one["pareto"])
        axes.step(*zip(*best, strict=True), where="post", color=LINES[0], linewidth=1, zorder=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.15, y=0.1)
        axes.grid(color="#dddddd", linewidth=0.6)
    alt = "; ".join(f"{one['arm']}: {TITLES[measure]} {one[measure]:.3f} for {one[cost]:.3g}" for _, one in known)
    return Figure(file, f"{TITLES[measure]} by cost; blue: no configuration is better and cheaper", alt)


def _label_distribution(comparison: Comparison, names: Sequence[str], labels: Sequence[str], file: Path) -> Figure:
    run = comparison.groups[0].runs[0]
    rows = {
        f"true, {split}": [counts.get(label, 0) for label in run.labels]
        for split, counts in run.ledger.get("splits", {}).items()
        if sum(counts.values()) and split != "test"
    }
    rows["true, test"] = np.bincount(run.gold, minlength=len(labels)).tolist()
    for name, group in zip(names, comparison.groups, strict=True):
        rows[name] = np.bincount(group.predicted.ravel(), minlength=len(labels)).tolist()
    by_label = {name: dict(zip(labels, counts, strict=True)) for name, counts in rows.items()}
    shown = drawing.frequent(by_label.values(), labels)
    by_label = {name: drawing.folded(counts, labels, shown) for name, counts in by_label.items()}
    labels = list(by_label["true, test"])
    colors = palette(len(labels), CLASSES)
    table = np.array([list(counts.values()) for counts in by_label.values()])
    with canvas(file, 1.2 + 0.32 * len(by_label)) as (figure, ((axes,),)):
        drawing.stacked_shares(axes, table, colors, least=0.06)
        axes.set_yticks(range(len(by_label)), list(by_label))
        axes.set_ylim(len(by_label) - 0.4, -0.6)
        axes.set_xlabel("share of the rows; configurations: predicted on the test rows")
        patches = [Patch(color=color) for color in colors]
        figure.legend(patches, labels, loc="outside upper center", ncols=min(5, len(labels)), frameon=False)
    alt = "; ".join(f"{name}: {', '.join(map(str, counts.values()))}" for name, counts in by_label.items())
    title = "Labels: true by split, predicted by configuration"
    return Figure(file, title, f"Rows by class {', '.join(labels)}. {alt}")
