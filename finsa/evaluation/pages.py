"""What all pages share: templates that escape whatever they are given, and pictures within the file."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def environment(templates: Path) -> Environment:
    """The templates of a folder, with the filters ``png`` (of a file) and ``language`` (of a text)."""
    made = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"png": _embedded, "language": _language}
    return made


def _embedded(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _language(text: str) -> str:
    """The language of a text from the data, so that it is read aloud and drawn as what it is."""
    return "zh-Hans" if re.search(r"[\u4e00-\u9fff]", text) else "en"
