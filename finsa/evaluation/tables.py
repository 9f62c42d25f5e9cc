"""Tables on the terminal, and the comparison that ends a sweep."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finsa import files
from finsa.data.ledger import Ledger

COLUMNS = ("accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall")


def console() -> Console:
    """A console for results: the terminal's width, or wide enough for a table where the output is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def show_comparison(reports: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Print reports side by side, F1 and accuracy with their 95 % intervals.

    The best macro-F1 is bold only where its interval does not meet the second's.
    """
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    table.add_column("")
    for name in ("n", "accuracy", "macro-F1", "weighted-F1", "macro-P", "macro-R"):
        table.add_column(name, justify="right", no_wrap=True)
    best = clear_winner(reports)
    for name, report in reports.items():
        cells = [_cell(report, column) for column in COLUMNS]
        table.add_row(name, str(report["n"]), *cells, style="bold" if name == best else None)
    table.caption = "95 % intervals: accuracy Wilson, F1 bootstrap over rows"
    console().print(table)


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


def show_report(report: Mapping[str, Any], title: str) -> None:
    """Print one report's classes and its confusion matrix."""
    names = list(report["per_class"])
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for name in ("class", "precision", "recall", "F1", "rows"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for name in names:
        table.add_column(f"→ {name}", justify="right")
    for name, counts in zip(names, report["confusion"], strict=True):
        scores = report["per_class"][name]
        cells = [f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")]
        table.add_row(name, *cells, str(scores["support"]), *map(str, counts))
    table.caption = "→: rows of the class by predicted label"
    console().print(table)
    predicted = [
        name for name, total in zip(names, map(sum, zip(*report["confusion"], strict=True)), strict=True) if total
    ]
    if len(predicted) == 1 and report["n"] > 1:
        console().print(
            f"note: every row was predicted {escape(predicted[0])}; nothing was learnt that tells them apart. More "
            "steps, another learning rate, or words the model knows may help: data.labels may say which word stands "
            "for a class, such as {positive: 利好, neutral: 中性, negative: 利空}",
            highlight=False,
        )


def show_ledger(ledger: Ledger, truncated: Mapping[str, int]) -> None:
    """Print what became of the rows read."""
    table = Table(title="rows", title_justify="left", title_style="bold", caption_justify="left")
    labels = list(next(iter(ledger.splits.values())))
    for name in ("split", *labels, "together", "text cut"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, counts in ledger.splits.items():
        cut = truncated.get(split)
        table.add_row(split, *map(str, counts.values()), str(sum(counts.values())), "-" if cut is None else str(cut))
    table.caption = f"read {ledger.read.total():,}: {ledger.told(truncated)}"
    console().print(table)
    show_losses(ledger)


def show_losses(ledger: Ledger) -> None:
    """Print what happened to rows that are not used, with examples, and what was mended or is odd."""
    if ledger.examples:
        table = Table(title="rows left out", title_justify="left", title_style="bold", caption_justify="left")
        table.add_column("why")
        table.add_column("rows", justify="right")
        table.add_column("for example (file:line: text [label])", overflow="fold")
        for fate, examples in ledger.examples.items():
            table.add_row(fate, f"{ledger.buckets[fate]:,}", escape("\n".join(examples)))
        table.caption = "all of them, with reasons: dropped.jsonl in the run folder"
        console().print(table)
    for note in ledger.notes:
        console().print(f"note: {escape(note)}", highlight=False)


def show_plan(title: str, values: Mapping[str, object]) -> None:
    """Print names and values."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in values.items():
        table.add_row(name, str(value))
    console().print(table)


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
