"""The tables of a report, once as text cells; terminal, Markdown, CSV and the page show the same ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from finsa.evaluation import tables
from finsa.evaluation.comparison import SCORES, Comparison, Record
from finsa.evaluation.published import Judged

MISSING = "-"
TESTED = (
    *("difference", "difference_low", "difference_high", "bootstrap_p_holm"),
    *("fixed", "broken", "mcnemar_p_holm", "verdict"),
)
TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "weighted_f1": "weighted-F1"}


@dataclass(frozen=True)
class Sheet:
    """A table.

    Args:
        title: what it shows.
        columns: their names; the first names the rows.
        rows: cells.
        caption: how to read it.
        marked: number of the row that stands out; None: none does.
        words: columns that hold words, set flush left.
        optional: numbers of the columns that a narrow terminal goes without, the least important first.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    marked: int | None = None
    words: tuple[str, ...] = ()
    optional: Sequence[int] = ()


def cell(name: str, value: Any) -> str:
    """Write a record's value, the same way wherever it is shown; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if name.endswith(("_p", "_holm")) or name.startswith("p_"):
        return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}" if value > 0 else "<1e-300"
    if "difference" in name or name.endswith("_minus_published"):
        return f"{value:+.4f}"
    if name.endswith(("_per_second", "_gib")):
        return f"{value:.2f}"
    return f"{value:.1f}" if "seconds" in name else f"{value:.4f}"


def as_csv(records: Sequence[Record]) -> str:
    """Records as CSV, one column per number."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for record in records for name in record)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({name: cell(name, value) for name, value in record.items()} for record in records)
    return text.getvalue()


def as_markdown(sheet: Sheet) -> str:
    """A sheet as a Markdown table; the marked row is bold."""
    lines = [
        _row(sheet.columns),
        _row(["---", *("---" if name in sheet.words else "---:" for name in sheet.columns[1:])]),
    ]
    for number, row in enumerate(sheet.rows):
        cells = [one.replace("|", "\\|") for one in row]
        lines.append(_row([f"**{one}**" for one in cells] if number == sheet.marked else cells))
    caption = f"\n\n{sheet.caption}" if sheet.caption else ""
    return f"## {sheet.title}\n\n" + "\n".join(lines) + caption + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show(sheet: Sheet) -> None:
    """Print a sheet on the terminal."""
    table = Table(
        title=sheet.title, title_justify="left", title_style="bold", caption=sheet.caption, caption_justify="left"
    )
    for number, name in enumerate(sheet.columns):
        table.add_column(escape(name), justify="left" if number == 0 or name in sheet.words else "right")
    for number, row in enumerate(sheet.rows):
        table.add_row(*map(escape, row), style="bold" if number == sheet.marked else None)
    tables.show(table, sheet.optional)


# ------------------------------------------------------------------------------------------------ the sheets


def _show(record: Record, name: str) -> str:
    return cell(name, record[name]) or MISSING


def _score(record: Record, name: str) -> str:
    """``0.6808 ± 0.0123 (0.6450-0.7170)``; the spread where there are several runs."""
    spread = f" ± {_show(record, f'{name}_sd')}" if record[f"{name}_sd"] is not None else ""
    return f"{_show(record, name)}{spread} ({_show(record, f'{name}_low')}-{_show(record, f'{name}_high')})"


def scores(comparison: Comparison, title: str) -> Sheet:
    """Scores of all arms."""
    records = comparison.records
    rows = [
        [record["arm"], str(record["runs"]), *(_score(record, name) for name in SCORES)]
        + [_show(record, name) for name in ("macro_precision", "macro_recall", "calibration_error")]
        for record in records
    ]
    best = [number for number, record in enumerate(records) if record["best"]]
    several = " Several runs: mean ± standard deviation over seeds, bootstrap over rows and runs."
    caption = "In brackets 95 % intervals: accuracy Wilson, F1 bootstrap over rows." + several * any(
        record["runs"] > 1 for record in records
    )
    columns = ["arm", "runs", *TITLES.values(), "macro-P", "macro-R", "ECE"]
    return Sheet(title, columns, rows, caption, best[0] if best else None, optional=(7, 6, 5, 4, 1))


def tests(comparison: Comparison, reference: str, prefix: str, title: str) -> Sheet:
    """Paired tests of all arms against one.

    Args:
        reference: name of that arm.
        prefix: of the tests' names in the records.
        title: of the table.
    """
    rows = []
    for record in comparison.records:
        if record["arm"] == reference:
            continue
        test = {name: _show(record, prefix + name) for name in TESTED}
        interval = f"{test['difference_low']} to {test['difference_high']}"
        counts = f"{test['fixed']} / {test['broken']}"
        rows.append([record["arm"], test["difference"], interval, test["bootstrap_p_holm"]])
        rows[-1] += [counts, test["mcnemar_p_holm"], test["verdict"]]
    many = len(rows) > 1
    columns = ["arm", "macro-F1 difference", "interval", "p", "fixed / broken", "McNemar p", "verdict"]
    if many:
        columns = [f"{name} (Holm)" if name in ("interval", "p", "McNemar p") else name for name in columns]
    caption = (
        f"Difference: macro-F1 of the arm minus that of {reference}, by a paired bootstrap. Fixed, broken: rows that "
        f"only the arm, only {reference} classifies correctly, with the exact McNemar test. "
    )
    caption += (
        f"Holm: corrected for {len(rows)} comparisons; each interval has the confidence level of its comparison's step "
        "in Holm's procedure, 95 % or more. "
        if many
        else "The interval is for 95 %. "
    )
    caption += "Better or worse: p of the difference below 0.05, which is where its interval excludes 0."
    return Sheet(title, columns, rows, caption, words=("verdict",), optional=(5, 4, 2))


def classes(comparison: Comparison) -> Sheet:
    """Precision, recall and F1 of every class."""
    labels = comparison.arms[0].runs[0].labels
    rows = [
        [record["arm"], label, *(_show(record, f"{name}_{label}") for name in ("precision", "recall", "f1"))]
        for record in comparison.records
        for label in labels
    ]
    return Sheet("By class", ["arm", "class", "precision", "recall", "F1"], rows, words=("class",))


COSTS = {
    "rows_per_second": "samples/s",
    "peak_memory_gib": "peak memory (GiB)",
    "trainable_parameters": "trainable parameters",
    "seconds_to_best": "seconds to the best score",
    "training_seconds": "training seconds",
    "wall_seconds": "seconds in all",
}


def costs(comparison: Comparison) -> Sheet:
    """What the arms cost."""
    rows = [[record["arm"], *(_show(record, name) for name in COSTS)] for record in comparison.records]
    place = 1 + list(COSTS).index("trainable_parameters")
    for row in rows:
        row[place] = f"{int(row[place]):,}" if row[place] != MISSING else MISSING
    caption = "Best score: the validation that chose the checkpoint, counted from the start of training."
    return Sheet("Cost", ["arm", *COSTS.values()], rows, caption, optional=(5, 4, 3, 6))


def beside_published(comparison: Comparison, name: str, differs: Sequence[str]) -> Sheet:
    """Published scores, and how far the arms' own are from them."""
    rows = [
        [record["arm"], record["published_row"] or MISSING]
        + [_show(record, key) for score in SCORES for key in (f"published_{score}", f"{score}_minus_published")]
        for record in comparison.records
    ]
    columns = ["arm", "published row"] + [text for title in TITLES.values() for text in (title, "difference")]
    caption = (
        "Scores as published: from the confusion matrix where there is one, otherwise as printed. Differences: these "
        "runs minus the publication."
    )
    if differs:
        caption += f" These runs are another experiment: {'; '.join(differs)}."
    return Sheet(
        f"Beside the published table {name}", columns, rows, caption, words=("published row",), optional=(7, 6, 3, 2, 1)
    )


def published_table(judged: Judged, name: str, source: str) -> Sheet:
    """A published table with intervals and tests."""
    rows = []
    for record in judged.records:
        low, high = _show(record, "p_low"), _show(record, "p_high")
        interval = f" ({_show(record, 'accuracy_low')}-{_show(record, 'accuracy_high')})"
        rows.append(
            [
                record["row"],
                _show(record, "right"),
                _show(record, "accuracy") + interval * (record["right"] is not None),
            ]
            + [_show(record, key) for key in ("macro_f1", "macro_f1_recomputed", "weighted_f1", "against")]
            + [low if low == high else f"{low} to {high}"]
            + [_show(record, key) for key in ("p_high_holm", "verdict")]
        )
    columns = ["row", "right", "accuracy", "macro-F1", "recomputed", "weighted-F1", "against"]
    columns += ["McNemar p", "largest p (Holm)", "verdict"]
    caption = (
        f"{source}. Scores as printed; recomputed: macro-F1 over the real classes, from the confusion matrix; 95 % "
        "Wilson intervals. Where only totals are published, p is the range over all pairs that fit them, and a "
        "verdict stands where it holds for all of them."
    )
    notes = [f"{record['row']}: {record['note']}" for record in judged.records if record["note"]]
    if notes:
        caption += f" Notes. {'. '.join(notes)}."
    title = f"The published table {name}"
    return Sheet(title, columns, rows, caption, words=("against", "verdict"), optional=(5, 1, 7, 4, 6, 8))


def runs(comparison: Comparison) -> Sheet:
    """Every single run."""
    rows = [
        [
            arm.name,
            str(run.config["seed"]),
            f"{run.report['accuracy']:.4f}",
            f"{run.report['macro_f1']:.4f}",
            str(run.path),
        ]
        for arm in comparison.arms
        for run in arm.runs
    ]
    return Sheet("Runs", ["arm", "seed", "accuracy", "macro-F1", "folder"], rows, words=("folder",))


def left_out(reasons: dict[str, str]) -> Sheet:
    """Jobs and folders that the report does not have, and why."""
    rows = [[name, reason] for name, reason in reasons.items()]
    return Sheet("Left out", ["job or folder", "why"], rows, words=("why",))
