"""The page of a report: one file that needs nothing else, no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template

from finsa.evaluation import moe_figures, pages, report_figures
from finsa.evaluation.figures import Figure
from finsa.evaluation.report import Report
from finsa.evaluation.report_tables import Sheet

TEMPLATES = Path(__file__).parent / "templates"
MANY_ROWS = 40  # longer tables are folded up
# Sections of the page: what it is called, its tables, its figures (by file name).
SECTIONS = (
    ("Scores", ("scores",), ("f1", "calibration")),
    ("Tests", ("tests", "baseline"), ()),
    ("Mixture", ("mixture",), ("router",)),
    ("Published", ("beside", "published"), ()),
    ("Classes", ("classes",), ("confusion_matrices", "precision_recall", "label_distribution")),
    ("Training and cost", ("costs",), ("training_curves", "penalties")),
    ("Runs", ("runs", "left_out"), ()),
)


def figures(report: Report, folder: Path) -> list[Figure]:
    """Draw the figures; a published table alone has none."""
    if report.comparison is None:
        return []
    metrics = {arm.name: arm.runs[0].metrics for arm in report.comparison.arms}
    routers = {name: one["router"] for name, one in metrics.items() if one.get("router")}
    drawn = moe_figures.router(routers, folder / "router.png")
    return [*report_figures.draw(report.comparison, folder), *([drawn] if drawn else [])]


def render(report: Report, figures: Sequence[Figure]) -> str:
    """Write the page as HTML; names and texts of the runs are only ever text in it."""
    drawn = {figure.file.stem: figure for figure in figures}
    sections = [
        (
            name,
            [sheet for one in tables for key, sheet in report.sheets.items() if key.split(" ")[0] == one],
            [drawn[one] for one in pictures if one in drawn],
        )
        for name, tables, pictures in SECTIONS
    ]
    return fill(report, sections, "figures/")


def fill(head: Any, sections: Sequence[tuple[str, Sequence[Sheet], Sequence[Figure]]], place: str) -> str:
    """Write a page: a title, facts and remarks, then sections of tables and figures, empty ones left out.

    Args:
        head: has ``title``, ``facts`` and ``remarks``.
        sections: their names, tables and figures.
        place: of the figures' files, seen from the page.
    """
    present = [section for section in sections if section[1] or section[2]]
    return _template().render(report=head, sections=present, many=MANY_ROWS, place=place)


@cache
def _template() -> Template:
    environment = pages.environment(TEMPLATES)
    environment.filters["anchor"] = lambda name: name.lower().replace(" ", "-")
    return environment.get_template("report.html.j2")
