"""The page of an inspection: one file that needs nothing else, for readers with and without eyes or a mouse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template

from finsa.data.near_duplicates import NearDuplicates
from finsa.evaluation import pages
from finsa.evaluation.confounds import percent
from finsa.evaluation.examples import Example, visible
from finsa.evaluation.figures import Figure

TEMPLATES = Path(__file__).parent / "templates"
CUT_SHOWN = 400  # characters of a cut text that are shown


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Args:
        title: of the page.
        facts: names and values that say what was inspected.
        numbers: of `inspection.inspect`.
        ledger: of ``ledger.json``.
        examples: rows as the model sees them.
        figures: with their PNG files.
        near: near duplicates; the first `shown` of each pair of splits are listed.
        shown: how many.
    """

    title: str
    facts: dict[str, str]
    numbers: dict[str, Any]
    ledger: dict[str, Any]
    examples: Sequence[Example]
    figures: dict[str, Figure]
    near: NearDuplicates
    shown: int


def render(page: Page) -> str:
    """Write the page as HTML; texts of the data are only ever text in it."""
    pairs = page.near.pairs.group_by("split", "other_split", maintain_order=True).head(page.shown)
    return _template().render(page=page, pairs=pairs.rows(named=True), cut_shown=CUT_SHOWN)


@cache
def _template() -> Template:
    environment = pages.environment(TEMPLATES)
    environment.filters |= {
        "number": lambda value: f"{value:,}",
        "percent": percent,
        "visible": visible,
        "sentence": lambda text: text[:1].upper() + text[1:],
        "unbroken": lambda text: text.replace(" %", "\u00a0%"),
        "tokens": lambda count: f"{count} token" if count == 1 else f"{count} tokens",
    }
    return environment.get_template("inspect.html.j2")
