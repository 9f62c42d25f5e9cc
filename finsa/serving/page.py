"""The pages: each one file that needs nothing else, and a policy that lets it load nothing else."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finsa.config import ServeStage
from finsa.evaluation import pages

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        html: the whole of it.
        policy: its Content-Security-Policy; script and style are named by their hashes.
    """

    html: str
    policy: str


def start(stage: ServeStage, served: dict[str, Any], guarded: bool) -> Page:
    """The page at ``/``.

    Args:
        stage: its bounds are the page's.
        served: what ``/model`` says; where a token is asked for, the page shows nothing of it.
        guarded: whether a token is asked for.
    """
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    return _render("page.html.j2", script=script, stage=stage, served=None if guarded else served, guarded=guarded)


def docs(document: dict[str, Any], url: str) -> Page:
    """The page at ``/docs``.

    Args:
        document: of OpenAPI.
        url: of the service, for the examples.
    """
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return _render("docs.html.j2", script="", operations=operations, url=url)


def _render(name: str, script: str, **values: Any) -> Page:
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    html = pages.environment(TEMPLATES).get_template(name).render(script=Markup(script), style=Markup(style), **values)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)


def _hash(content: str) -> str:
    if not content:
        return "'none'"
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
