"""Write a report: from run folders to ``report.csv``, ``report.md``, ``report.html`` and figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from finsa.config import Published, ReportStage, data_title, demonstration
from finsa.errors import RunError
from finsa.evaluation import finished_runs, moe_tables, report_tables, run_groups, tables
from finsa.evaluation import published as publications
from finsa.evaluation.comparison import Comparison, compare
from finsa.evaluation.finished_runs import Run
from finsa.evaluation.report_tables import Sheet
from finsa.runs import files


@dataclass(frozen=True)
class Report:
    """What a report says.

    Args:
        title: of the page.
        facts: what was compared, and with what.
        remarks: what can be said, one sentence each.
        sheets: the tables by section.
        comparison: of the arms; None where only a published table is reported.
        judged: the published table's rows; None where there is none.
    """

    title: str
    facts: dict[str, str]
    remarks: list[str]
    sheets: dict[str, Sheet]
    comparison: Comparison | None
    judged: publications.Judged | None


def build(
    paths: Sequence[Path],
    options: ReportStage,
    published: Published | None,
    failed: Mapping[str, str],
    named: Collection[Path] = (),
) -> Report:
    """Read runs and compare them.

    Args:
        paths: run folders; none to report a published table alone.
        options: of the stage.
        published: the table to hold the runs against; None: the one that the runs themselves name.
        failed: jobs without a folder and their errors.
        named: those of the paths that the user has named one by one, which may not be left out.

    Raises:
        RunError: for folders that cannot be read, or runs that cannot be compared.
        ConfigError: for a baseline that is none of the arms.
    """
    found: dict[str, Sheet] = {}
    facts, remarks, comparison = {}, [], None
    reasons = dict(failed)
    if paths:
        runs, left_out = finished_runs.read(paths)
        runs, others = run_groups.comparable(runs, options.training_rows, named)
        grouped, notes = run_groups.group(runs)
        comparison = compare(grouped, options)
        published = published or _own_table(runs)
        reasons |= {**left_out, **others}
        facts, remarks = _facts(runs), [*comparison.remarks, *notes, *moe_tables.remarks(comparison)]
        remarks += list(dict.fromkeys(filter(None, (demonstration(run.config) for run in runs))))[:1]
        found = _sheets(comparison, published)
    judged = publications.judge(published) if published else None
    if published is not None and judged is not None:
        found["published"] = report_tables.published_table(judged, published.name, published.source)
        remarks += [f"Published table {published.name}: {remark}" for remark in judged.remarks]
    if reasons:
        found["left_out"] = report_tables.left_out(reasons)
        remarks.append(f"{len(reasons)} jobs or folders are left out: see the last table.")
    title = f"{facts.get('data', published.name if published else '')}: report"
    return Report(title, facts, remarks, found, comparison, judged)


def _sheets(comparison: Comparison, published: Published | None) -> dict[str, Sheet]:
    found = {"scores": report_tables.scores(comparison, "Scores on the test split")}
    if len(comparison.arms) > 1:
        top, baseline = comparison.arms[0].name, comparison.baseline
        title = f"Against the best, {top}"
        found["tests"] = report_tables.tests(comparison, top, "vs_best_", title)
        if baseline != top and len(comparison.arms) > 2:
            found["baseline"] = report_tables.tests(comparison, baseline, "", f"Against {baseline}")
    if published is not None:
        for arm, record in zip(comparison.arms, comparison.records, strict=True):
            record |= publications.beside(published, arm, record)
        differs = publications.mismatches(published, comparison.arms)
        found["beside"] = report_tables.beside_published(comparison, published.name, differs)
    for arm in comparison.arms:
        for number, sheet in enumerate(moe_tables.of(arm.name, arm.runs[0].metrics)):
            found[f"mixture {arm.name} {number}"] = sheet
    return {
        **found,
        "classes": report_tables.classes(comparison),
        "costs": report_tables.costs(comparison),
        "runs": report_tables.runs(comparison),
    }


def _own_table(runs: Sequence[Run]) -> Published | None:
    """The published table that the runs' own configurations name; None where they name none or several."""
    tables = {str(run.config.get("published")): run.config.get("published") for run in runs}
    (values, *others) = tables.values()
    if others or values is None:
        return None
    return Published.model_validate(values, strict=False)  # lists where YAML knows no tuples


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """What was compared, and with what."""
    first = runs[0]
    counts = zip(first.labels, np.bincount(first.gold, minlength=len(first.labels)), strict=True)
    facts: dict[str, Any] = {
        "data": data_title(first.config["data"]),
        "test rows": f"{len(first.rows):,}: {', '.join(f'{label} {count:,}' for label, count in counts)}",
        "data fingerprint": first.facts.get("data_fingerprint"),
        "model": ", ".join(dict.fromkeys(str(run.config["model"]["name"]) for run in runs)),
        "device": ", ".join(dict.fromkeys(str(run.facts["device"]) for run in runs if run.facts.get("device"))),
        "commit": ", ".join(dict.fromkeys(str(run.facts.get("git_commit"))[:12] for run in runs)),
        "written": datetime.now().astimezone().isoformat(timespec="minutes"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def write(report: Report, folder: Path) -> None:
    """Write tables, figures and the page into a folder."""
    from finsa.evaluation import report_page  # matplotlib and jinja2 take a second

    folder.mkdir(parents=True, exist_ok=True)
    if report.comparison is not None:
        _put(folder / "report.csv", report_tables.as_csv(report.comparison.records))
    if report.judged is not None:
        _put(folder / "published.csv", report_tables.as_csv(report.judged.records))
    figures = report_page.figures(report, folder / "figures")
    _put(folder / "report.md", _markdown(report, [figure.file.relative_to(folder) for figure in figures]))
    _put(folder / "report.html", report_page.render(report, figures))


def _markdown(report: Report, figures: Sequence[Path]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in report.facts.items())
    said = "\n".join(f"- {remark}" for remark in report.remarks)
    parts = [f"# {report.title}", facts, said, *(report_tables.as_markdown(sheet) for sheet in report.sheets.values())]
    drawn = "\n".join(f"![{file.stem.replace('_', ' ')}]({file.as_posix()})" for file in figures)
    return "\n\n".join(part.rstrip() for part in [*parts, drawn] if part) + "\n"


def _put(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        files.write_text(file, text)
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror}") from None


def show(report: Report, folder: Path, again: str | None) -> None:
    """Print what fits a terminal, and where the rest is.

    Args:
        again: the command that writes this report anew; None where no runs were compared.
    """
    console = tables.console()
    mixtures = [name for name in report.sheets if name.startswith("mixture ")]
    for name in ("scores", "tests", "baseline", *mixtures, "beside", "costs", "published", "left_out"):
        if name in report.sheets and (name != "published" or report.comparison is None):
            report_tables.show(report.sheets[name])
    for remark in report.remarks:
        console.print(remark, highlight=False, markup=False)
    print(f"report: {folder / 'report.html'} (also report.md, report.csv, figures/)")
    if again is not None:
        print(f"with another baseline: {again} stage.baseline=<arm>")
