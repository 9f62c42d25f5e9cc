"""Tables on the terminal, and the comparison that ends a sweep."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from finsa.config import Majority, Method, Network
from finsa.data.ledger import Ledger
from finsa.runs import files

WIDTH, UNBOUNDED = 120, 10_000  # columns of the screen
CHOSEN = ("filtered: data.split.rows", "filtered: not of domain", "filtered: mixture ratio")  # no examples are needed
NAMED = 8  # hidden columns that a caption names
MANY, WORST = 20, 10  # classes that are too many for a column each; of those the hardest ones and confusions shown
COLUMNS = ("accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall")


def console() -> Console:
    """The console for results: as wide as ``COLUMNS`` or the terminal says, otherwise 120 columns."""
    plain = Console()
    return plain if _bounded(plain) else Console(width=WIDTH)


def _bounded(plain: Console) -> bool:
    return plain.is_terminal or os.environ.get("COLUMNS", "").isdigit()


def show(table: Table, optional: Sequence[int] = ()) -> None:
    """Print a table so that no border, header or word of it is lost.

    Cells wrap between words. Where that is not enough, optional columns are left out and named in the caption; where
    the output has no width of its own (a pipe, a file), the table is as wide as it has to be.

    Args:
        table: any.
        optional: numbers of the columns that can be left out, the least important first.
    """
    out, hidden = console(), []
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", False
    if not _bounded(Console()):
        out = Console(width=max(WIDTH, _narrowest(table, out)))
    columns = list(table.columns)
    for number in optional:
        if _narrowest(table, out) <= out.width:
            break
        table.columns.remove(columns[number])
        hidden.append(number)
    if hidden:
        names = [str(columns[number].header) for number in sorted(hidden)]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        note = f"Not shown at this width: {', '.join(names[:NAMED])}{more}."
        table.caption = f"{table.caption}\n{note}" if table.caption else note
    _lay_out(table, out)
    out.print(table)


def _narrowest(table: Table, out: Console) -> int:
    """Columns of the screen that a table needs if its cells wrap between words."""
    return Measurement.get(out, out.options.update(max_width=UNBOUNDED), table).minimum


def _lay_out(table: Table, out: Console) -> None:
    """Set the widths of a table's columns, each at least its longest word, which rich does not see to."""
    options = out.options.update(max_width=UNBOUNDED)
    needs = [
        [Measurement.get(out, options, cell) for cell in (column.header, *column.cells)] for column in table.columns
    ]
    widths = [max(one.minimum for one in cells) for cells in needs]
    wanted = [max(one.maximum for one in cells) - width for cells, width in zip(needs, widths, strict=True)]
    left = out.width - _narrowest(table, out)
    if left < 0 or left >= sum(wanted):
        return
    for number, place in enumerate(sorted(range(len(widths)), key=wanted.__getitem__)):
        more = min(wanted[place], left // (len(widths) - number))
        widths[place], left = widths[place] + more, left - more
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width


def show_comparison(reports: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Print reports side by side, F1 and accuracy with their 95 % intervals.

    The best macro-F1 is bold only where its interval does not meet the second's.
    """
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    table.add_column("")
    for name in ("n", "accuracy", "macro-F1", "weighted-F1", "macro-P", "macro-R"):
        table.add_column(name, justify="right")
    best = clear_winner(reports)
    for name, report in reports.items():
        cells = [_cell(report, column) for column in COLUMNS]
        table.add_row(name, str(report["n"]), *cells, style="bold" if name == best else None)
    table.caption = "95 % intervals: accuracy Wilson, F1 bootstrap over rows"
    show(table, optional=(6, 5, 4, 1))


def clear_winner(reports: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The report whose macro-F1 interval lies above all others; None where none does."""
    ranked = sorted(reports, key=lambda name: -reports[name]["macro_f1"])
    if len(ranked) < 2:
        return None
    highest = max(reports[name]["intervals"]["macro_f1"][1] for name in ranked[1:])
    return ranked[0] if reports[ranked[0]]["intervals"]["macro_f1"][0] > highest else None


def _cell(report: Mapping[str, Any], column: str) -> str:
    interval = report["intervals"].get(column)
    value = f"{report[column]:.4f}"
    return f"{value} ({interval[0]:.3f}-{interval[1]:.3f})" if interval else value


def show_report(report: Mapping[str, Any], title: str, method: Method) -> None:
    """Print one report's classes and its confusion matrix.

    Args:
        report: of one split.
        title: of the table.
        method: what answered; it decides what is advised where all answers are the same.
    """
    names, per_class = list(report["per_class"]), report["per_class"]
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for name in ("class", "precision", "recall", "F1", "rows"):
        table.add_column(name, justify="left" if name == "class" else "right")
    many = len(names) > MANY
    for name in [] if many else names:
        table.add_column(f"→ {name}", justify="right")
    shown = sorted(names, key=lambda name: per_class[name]["f1"])[:WORST] if many else names
    for name, counts in zip(names, report["confusion"], strict=True):
        scores = per_class[name]
        cells = [f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")]
        if name in shown:
            table.add_row(name, *cells, str(scores["support"]), *([] if many else map(str, counts)))
    table.caption = "→: rows of the class by predicted label"
    if many:
        table.caption = f"{len(shown)} of {len(names)} classes, those with the lowest F1; metrics.json has all of them"
    show(table, optional=() if many else range(4 + len(names), 4, -1))
    if many:
        _show_confusions(report["confusion"], names)
    predicted = [
        name for name, total in zip(names, map(sum, zip(*report["confusion"], strict=True)), strict=True) if total
    ]
    if len(predicted) == 1 and report["n"] > 1 and not isinstance(method.baseline, Majority):
        said = f"note: every row was predicted {predicted[0]}. {_advice(method, names)}".rstrip()
        console().print(said, highlight=False, markup=False)


def _show_confusions(counts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Print the most frequent confusions of two classes, where a matrix would be too wide."""
    wrong = [(rows, a, b) for a, line in enumerate(counts) for b, rows in enumerate(line) if rows and a != b]
    if not wrong:
        return
    table = Table(title="most frequent errors", title_justify="left", title_style="bold", caption_justify="left")
    for name in ("class", "predicted", "rows", "share of the class"):
        table.add_column(name, justify="left" if name in ("class", "predicted") else "right")
    for rows, a, b in sorted(wrong, key=lambda one: -one[0])[:WORST]:
        table.add_row(names[a], names[b], str(rows), f"{rows / sum(counts[a]):.0%}")
    table.caption = f"{min(WORST, len(wrong))} of {len(wrong)} pairs of classes"
    show(table)


def _advice(method: Method, names: Sequence[str]) -> str:
    """What may help a method that gives all rows one label: only settings that it reads."""
    if isinstance(method.baseline, Network):
        return "More epochs (method.baseline.epochs) or another method.baseline.learning_rate may help."
    if method.baseline is not None:  # its grid of penalties has been searched
        return ""
    more = "More steps (train.epochs, train.max_steps) or another train.learning_rate may help."
    words = (
        "Label words that the model knows in the prompt's language may help: data.labels sets the word for each class, "
        f"as in {{{', '.join(f'{name}: <word>' for name in names[:3])}{', ...' if len(names) > 3 else ''}}}."
    )
    if method.head == "classifier":
        return more
    if set(names) <= {"利好", "中性", "利空"}:  # words that were chosen
        return "" if method.learn == "nothing" else more
    return words if method.learn == "nothing" else f"{more} {words}"


def show_ledger(ledger: Ledger, truncated: Mapping[str, int]) -> None:
    """Print what became of the rows read."""
    table = Table(title="rows", title_justify="left", title_style="bold", caption_justify="left")
    labels = list(next(iter(ledger.splits.values())))
    many = len(labels) > MANY
    columns = ("classes", "rows of the smallest", "of the largest") if many else labels
    for name in ("split", *columns, "together", "text cut"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, counts in ledger.splits.items():
        cut, found = truncated.get(split), list(counts.values())
        shown = (sum(map(bool, found)), min(found), max(found)) if many else found
        table.add_row(split, *map(str, shown), str(sum(found)), "-" if cut is None else str(cut))
    table.caption = f"read {ledger.read.total():,}: {ledger.told(truncated)}"
    show(table, optional=() if many else range(len(labels), 0, -1))
    show_losses(ledger)


def show_losses(ledger: Ledger) -> None:
    """Print what happened to rows that are not used, with examples, and what was mended or is odd."""
    lost = {fate: examples for fate, examples in ledger.examples.items() if not fate.startswith(CHOSEN)}
    if lost:
        table = Table(title="rows left out", title_justify="left", title_style="bold", caption_justify="left")
        table.add_column("why")
        table.add_column("rows", justify="right")
        table.add_column("for example (file:line: text [label])")
        for fate, examples in lost.items():
            table.add_row(fate, f"{ledger.buckets[fate]:,}", escape("\n".join(examples)))
        table.caption = "all of them, with reasons: dropped.jsonl in the run folder"
        show(table)
    for note in ledger.notes:
        console().print(f"note: {escape(note)}", highlight=False)


def show_plan(title: str, values: Mapping[str, object]) -> None:
    """Print names and values."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in values.items():
        table.add_row(name, str(value))
    show(table)


def write_comparison(reports: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write the comparison as ``comparison.csv`` and ``comparison.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.replacing(folder / "comparison.csv") as place, place.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "n", *COLUMNS, "macro_f1_low", "macro_f1_high"])
        for name, report in reports.items():
            scores = [f"{report[column]:.6f}" for column in COLUMNS]
            writer.writerow([name, report["n"], *scores, *(f"{end:.6f}" for end in report["intervals"]["macro_f1"])])
    files.write_text(folder / "comparison.json", json.dumps(reports, ensure_ascii=False, indent=1) + "\n")
