"""Tables for terminal, Markdown, CSV and pages, and the tables of a single run."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement

from finsa.config import LOWER_IS_BETTER, Majority, Method, Network
from finsa.config.base import MEASURES, headline
from finsa.data.ledger import Ledger
from finsa.runs import files

WIDTH, UNBOUNDED = 120, 10_000  # columns of the screen
MISSING = "-"
FILTERED = (
    "filtered: data.split.rows",
    "filtered: not of domain",
    "filtered: mixture ratio",
)  # buckets that need no examples
NAMED = 8  # maximum number of hidden columns named in a caption
MANY, WORST = 20, 10  # more classes have no columns; the hardest classes and most frequent errors are shown
SCORES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "weighted_f1": "weighted-F1",
    "macro_precision": "macro-P",
    "macro_recall": "macro-R",
}
TITLES = SCORES | {
    **{"rmse": "RMSE", "mae": "MAE", "pearson": "Pearson", "spearman": "Spearman", "cosine": "cosine"},
    **{"micro_f1": "micro-F1", "subset_accuracy": "subset accuracy"},
}
# Control characters, which could break lines or control the terminal, are replaced by visible symbols.
SIGNS = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "␡", 0x0A: "↵\n", 0x0D: "␍", 0x09: "⇥"}


@dataclass(frozen=True)
class Table:
    """A table of text cells.

    Args:
        title: table title.
        columns: names; the first column names the rows.
        rows: cells.
        caption: explanation below the table.
        marked: number of the highlighted row; None for no highlight.
        words: text columns, aligned left, as the first column always is.
        optional: numbers of the columns that a narrow terminal omits, the least important first.
        folded: whether a page shows the table collapsed.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: int | None = None
    words: Collection[str] = ()
    optional: Sequence[int] = ()
    folded: bool = False

    def show(self) -> None:
        """Print the table on the terminal."""
        table = rich.table.Table(
            title=escape(self.title),
            title_justify="left",
            title_style="bold",
            caption=escape(self.caption) or None,
            caption_justify="left",
        )
        for number, name in enumerate(self.columns):
            table.add_column(escape(name), justify="left" if number == 0 or name in self.words else "right")
        for number, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style="bold" if number == self.marked else None)
        show(table, self.optional)

    def markdown(self) -> str:
        """Format the table as Markdown; the highlighted row is bold."""
        rule = ["---", *("---" if name in self.words else "---:" for name in self.columns[1:])]
        lines = [self.columns, rule]
        for number, row in enumerate(self.rows):
            cells = [cell.replace("|", "\\|") for cell in row]
            lines.append([f"**{cell}**" for cell in cells] if number == self.marked else cells)
        caption = f"\n\n{self.caption}" if self.caption else ""
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + caption + "\n"


def visible(text: str) -> str:
    """Replace control characters by visible symbols; a line break is kept, with a symbol before it."""
    return text.translate(SIGNS)


def percent(share: float, digits: int = 0) -> str:
    """Format a share: ``4.8 %``."""
    return f"{100 * share:.{digits}f} %"


def signed(difference: float) -> str:
    """A difference with its sign; one that rounds to zero has none."""
    text = f"{difference:+.4f}"
    return text[1:] if float(text) == 0 else text


def format_value(name: str, value: Any) -> str:
    """Format a value of a record by the name of its column; empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if name.endswith(("_p", "_holm")) or name.startswith("p_"):
        return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}" if value > 0 else "<1e-300"
    if "difference" in name or name.endswith("_minus_published"):
        return signed(value)
    if name.endswith("_per_1000"):
        return f"{value:.3g}"
    if name.endswith(("_per_second", "_gib")):
        return f"{value:.2f}"
    return f"{value:.1f}" if "seconds" in name or name in ("prompt_tokens", "thought_tokens") else f"{value:.4f}"


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Format records as CSV, one column per key."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: format_value(name, value) for name, value in record.items()} for record in records)
    return text.getvalue()


def of_records(
    title: str,
    records: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    caption: str,
    words: Collection[str] = (),
    optional: Sequence[int] = (),
) -> Table:
    """A table of records; ``columns`` are their keys and titles. A value with an interval has it in parentheses."""
    rows = []
    for record in records:
        cells = []
        for key in columns:
            low, high = record.get(f"{key}_low"), record.get(f"{key}_high")
            interval = "" if low is None or high is None else f" ({low:.3f}-{high:.3f})"
            cells.append((format_value(key, record[key]) or MISSING) + interval)
        rows.append(cells)
    return Table(title, list(columns.values()), rows, caption, words=words, optional=optional)


# ------------------------------------------------------------------------------------------------ terminal


def console() -> Console:
    """The console for results: as wide as ``COLUMNS`` or the terminal, otherwise 120 columns."""
    default = Console()
    return default if _has_width(default) else Console(width=WIDTH)


def _has_width(default: Console) -> bool:
    return default.is_terminal or os.environ.get("COLUMNS", "").isdigit()


def show(table: rich.table.Table, optional: Sequence[int] = ()) -> None:
    """Print a table without cutting off borders, headers or words.

    Cells wrap between words. If that is not enough, optional columns are omitted and named in the caption. If the
    output has no width (a pipe, a file), the table is as wide as needed.

    Args:
        table: the table to print.
        optional: numbers of the columns that can be omitted, the least important first.
    """
    out, hidden = console(), []
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", False
    if not _has_width(Console()):
        out = Console(width=max(WIDTH, _minimum_width(table, out)))
    columns = list(table.columns)
    for number in optional:
        if _minimum_width(table, out) <= out.width:
            break
        table.columns.remove(columns[number])
        hidden.append(number)
    if hidden:
        names = [str(columns[number].header) for number in sorted(hidden)]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        note = f"Not shown at this width: {', '.join(names[:NAMED])}{more}."
        table.caption = f"{table.caption}\n{note}" if table.caption else note
    _set_widths(table, out)
    out.print(table)


def _minimum_width(table: rich.table.Table, out: Console) -> int:
    """Minimum width of a table whose cells wrap between words."""
    return Measurement.get(out, out.options.update(max_width=UNBOUNDED), table).minimum


def _set_widths(table: rich.table.Table, out: Console) -> None:
    """Set the column widths, each at least that of its longest word, which rich does not ensure."""
    options = out.options.update(max_width=UNBOUNDED)
    needs = [
        [Measurement.get(out, options, cell) for cell in (column.header, *column.cells)] for column in table.columns
    ]
    widths = [max(one.minimum for one in cells) for cells in needs]
    wanted = [max(one.maximum for one in cells) - width for cells, width in zip(needs, widths, strict=True)]
    left = out.width - _minimum_width(table, out)
    if left < 0 or left >= sum(wanted):
        return
    for number, place in enumerate(sorted(range(len(widths)), key=wanted.__getitem__)):
        more = min(wanted[place], left // (len(widths) - number))
        widths[place], left = widths[place] + more, left - more
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width


def show_plan(title: str, values: Mapping[str, object]) -> None:
    """Print names and values."""
    table = rich.table.Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in values.items():
        table.add_row(name, str(value))
    show(table)


# ------------------------------------------------------------------------------------------------ scores


def scores_of(report: Mapping[str, Any]) -> dict[str, str]:
    """The scores that are shown for the task of a report, with their titles."""
    names = MEASURES.get(report.get("task", ""))
    return SCORES if names is None else {name: TITLES[name] for name in names}


def scores(reports: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Reports side by side, with their 95 % intervals; reports of several tasks have the columns of each.

    The best macro-F1, or of numbers the best RMSE, is highlighted only if its interval does not overlap any other.
    """
    rows = []
    shown = {name: title for report in reports.values() for name, title in scores_of(report).items()}
    between = "-" if shown == SCORES else " to "  # correlations may be negative
    measures = list(dict.fromkeys(name for report in reports.values() for name in report.get("measures") or {}))
    for name, report in reports.items():
        cells = []
        for score in shown:
            interval, value = report["intervals"].get(score), report.get(score)
            known = MISSING if value is None else f"{value:.4f}"
            cells.append(known + (f" ({interval[0]:.3f}{between}{interval[1]:.3f})" if interval else ""))
        for measure in measures:
            value, interval = (report.get("measures") or {}).get(measure), report["intervals"].get(measure)
            known = MISSING if value is None else f"{value:.4f}"
            cells.append(known + (f" ({interval[0]:.3f}-{interval[1]:.3f})" if interval else ""))
        rows.append([name, f"{report['n']:,}", *cells])
    best = clear_winner(reports)
    marked = None if best is None else list(reports).index(best)
    plain = shown == SCORES
    caption = f"95 % intervals: {'accuracy Wilson, F1 ' if plain else ''}bootstrap over rows"
    columns = ["", "rows", *shown.values(), *(name.replace("_", " ") for name in measures)]
    optional = (6, 5, 4, 1) if plain else (*range(len(shown) + 1, 2, -1), 1)
    return Table(title, columns, rows, caption, marked, optional=optional)


def clear_winner(reports: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The report whose interval of macro-F1, or of RMSE, is better than all others; None if there is none."""
    tasks = {report.get("task") for report in reports.values()}
    if len(tasks) != 1:
        return None
    measure = headline(*tasks)
    sign = -1 if measure in LOWER_IS_BETTER else 1
    ranked = sorted(reports, key=lambda name: -sign * reports[name][measure])
    if len(ranked) < 2:
        return None
    ends = {name: sorted(sign * end for end in report["intervals"][measure]) for name, report in reports.items()}
    return ranked[0] if ends[ranked[0]][0] > max(ends[name][1] for name in ranked[1:]) else None


def write_comparison(reports: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write the reports of a sweep's jobs as ``comparison.csv`` and ``comparison.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.replacing(folder / "comparison.csv") as place, place.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        shown = list(dict.fromkeys(name for report in reports.values() for name in scores_of(report)))
        measures = list(dict.fromkeys(headline(report.get("task")) for report in reports.values()))
        ends = [f"{measure}_{end}" for measure in measures for end in ("low", "high")]
        writer.writerow(["job", "n", *shown, *ends])
        for name, report in reports.items():
            values = ["" if report.get(score) is None else f"{report[score]:.6f}" for score in shown]
            found = [report["intervals"].get(measure, ("", "")) for measure in measures]
            values += [end if end == "" else f"{end:.6f}" for interval in found for end in interval]
            writer.writerow([name, report["n"], *values])
    files.write_text(folder / "comparison.json", json.dumps(reports, ensure_ascii=False, indent=1) + "\n")


def by_class(report: Mapping[str, Any], title: str) -> Table:
    """Precision, recall and F1 of the classes, and the confusion matrix; of many classes only those of the hardest."""
    names = list(report["per_class"])
    predicted = names if "confusion" in report and len(names) <= MANY else []
    rows = []
    for name, counts in zip(names, report.get("confusion") or [[]] * len(names), strict=True):
        values = report["per_class"][name]
        cells = [f"{values[key]:.4f}" for key in ("precision", "recall", "f1")]
        rows.append([name, *cells, f"{values['support']:,}", *(f"{count:,}" for count in counts if predicted)])
    columns = ["class", "precision", "recall", "F1", "rows", *(f"→ {name}" for name in predicted)]
    caption = "→: rows of the class by predicted label" if predicted else ""
    if len(names) > MANY:
        hardest = sorted(names, key=lambda name: report["per_class"][name]["f1"])[:WORST]
        caption = f"{WORST} of {len(names)} classes, those with the lowest F1; metrics.json has all of them"
        rows = [row for row in rows if row[0] in hardest]
    return Table(title, columns, rows, caption, optional=range(4 + len(predicted), 4, -1))


def frequent_errors(report: Mapping[str, Any]) -> Table:
    """The pairs of a true and a predicted class with the most rows."""
    names, confusion = list(report["per_class"]), report["confusion"]
    wrong = [(rows, a, b) for a, line in enumerate(confusion) for b, rows in enumerate(line) if rows and a != b]
    errors = [
        [names[a], names[b], f"{rows:,}", f"{rows / sum(confusion[a]):.0%}"]
        for rows, a, b in sorted(wrong, key=lambda one: -one[0])[:WORST]
    ]
    columns, caption = ["class", "predicted", "rows", "share of the class"], f"{len(errors)} of {len(wrong)} pairs"
    return Table("Most frequent errors", columns, errors, f"{caption} of classes", words=("predicted",))


def by_period(periods: Mapping[str, Mapping[str, Any]]) -> Table:
    """Scores by period, of one or several configurations by name."""
    rows = []
    for name, found in periods.items():
        for period, one in found.items():
            cells = []
            for score in ("accuracy", "macro_f1"):
                ends = one["intervals"][score]
                value = MISSING if one[score] is None else f"{one[score]:.4f}"
                cells.append(value + (f" ({ends[0]:.3f}-{ends[1]:.3f})" if ends else ""))
            rows.append([name, period, f"{one['n']:,}", *cells])
    caption = "95 % intervals: accuracy Wilson, F1 bootstrap over rows. No macro-F1 where a class has no rows."
    columns = ["configuration", "period", "rows", "accuracy", "macro-F1"]
    return Table("Scores by period", columns, rows, caption, words=("period",), optional=(2,))


def show_report(report: Mapping[str, Any], title: str, method: Method) -> None:
    """Print the classes of one report and its confusion matrix.

    Args:
        report: of one split.
        title: table title.
        method: that made the predictions; determines the advice if all predictions are the same.
    """
    if "per_class" not in report:
        return
    names, confusion, table = list(report["per_class"]), report.get("confusion"), by_class(report, title)
    table.show()
    if confusion is None:
        return
    if len(names) > MANY and frequent_errors(report).rows:
        frequent_errors(report).show()
    predicted = [name for name, total in zip(names, map(sum, zip(*confusion, strict=True)), strict=True) if total]
    if len(predicted) == 1 and report["n"] > 1 and not isinstance(method.baseline, Majority):
        note = f"note: every row was predicted as {predicted[0]}. {_advice(method, names)}".rstrip()
        console().print(note, highlight=False, markup=False)


def _advice(method: Method, names: Sequence[str]) -> str:
    """Settings that may help a method that predicts one label for all rows, limited to those it uses."""
    if isinstance(method.baseline, Network):
        return "More epochs (method.baseline.epochs) or another method.baseline.learning_rate may help."
    if method.baseline is not None:  # its penalty grid has already been searched
        return ""
    more = "More steps (train.epochs, train.max_steps) or another train.learning_rate may help."
    words = (
        "Label words that the model knows in the prompt's language may help: data.labels sets the word for each class, "
        f"as in {{{', '.join(f'{name}: <word>' for name in names[:3])}{', ...' if len(names) > 3 else ''}}}."
    )
    if method.head == "classifier":
        return more
    if set(names) <= {"利好", "中性", "利空"}:  # the default label words
        return "" if method.learn == "nothing" else more
    return words if method.learn == "nothing" else f"{more} {words}"


# ------------------------------------------------------------------------------------------------ ledger


def rows_by_split(ledger: Mapping[str, Any]) -> Table:
    """Used rows by split and label, from ``ledger.json``; for many labels, only their number and extremes."""
    splits = {split: counts for split, counts in ledger.get("splits", {}).items() if counts}
    labels = list(next(iter(splits.values()), {}))
    many, truncated = len(labels) > MANY, ledger.get("truncated", {})
    rows = []
    for split, by_label in splits.items():
        counts = list(by_label.values())
        numbers = [sum(map(bool, counts)), min(counts), max(counts)] if many else counts
        last = MISSING if truncated.get(split) is None else f"{truncated[split]:,}"
        total = ledger.get("rows", {}).get(split, sum(counts))  # a row may have several labels
        rows.append([split, *(f"{number:,}" for number in (*numbers, total)), last])
    columns = ["classes", "rows of the smallest", "of the largest"] if many else labels
    buckets = ", ".join(f"{name} {count:,}" for name, count in ledger.get("buckets", {}).items() if count)
    caption = f"read {sum(ledger.get('read', {}).values()):,}: {buckets}" if buckets else ""
    optional = () if many else range(len(labels), 0, -1)
    return Table("Rows by split", ["split", *columns, "total", "truncated"], rows, caption, optional=optional)


def show_ledger(ledger: Ledger, truncated: Mapping[str, int]) -> None:
    """Print the used rows by split and label, and the rows that are not used."""
    rows_by_split(ledger.as_dict(truncated)).show()
    show_losses(ledger)


def show_losses(ledger: Ledger) -> None:
    """Print the rows that are not used, with reasons and examples, and the ledger's notes."""
    rows = [
        [bucket, f"{ledger.buckets[bucket]:,}", "\n".join(examples)]
        for bucket, examples in ledger.examples.items()
        if not bucket.startswith(FILTERED)
    ]
    if rows:
        example = "examples (file:line: text [label])"
        caption = "all of them, with reasons: dropped.jsonl in the run folder"
        Table("Rows not used", ["reason", "rows", example], rows, caption, words=(example,)).show()
    for note in ledger.notes:
        console().print(f"note: {escape(note)}", highlight=False)
