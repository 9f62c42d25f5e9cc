"""Self-contained HTML pages: no other files, no network; only the page of suspicious labels has a script."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finsa.evaluation.tables import Table, console, to_csv, visible
from finsa.runs import files

if TYPE_CHECKING:  # the service, which needs `environment` alone, does not load matplotlib
    from finsa.evaluation.examples import Example
    from finsa.evaluation.figures import Figure

TEMPLATES = Path(__file__).parent / "templates"
MANY_ROWS = 40  # longer tables are folded
TRUNCATED_SHOWN = 400  # characters of truncated text that an example shows


def environment(templates: Path) -> Environment:
    """A Jinja environment that escapes all values, with filters for images, languages and control characters."""
    templating = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templating.filters |= {
        "png": lambda file: "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode(),
        # of a text from the data, so that it is rendered and read aloud in its language
        "language": lambda text: "zh-Hans" if re.search(r"[\u4e00-\u9fff]", text) else "en",
        "say": translated,
        "visible": visible,
        "anchor": lambda name: name.lower().replace(" ", "-"),
    }
    return templating


def render(
    title: str,
    facts: Mapping[str, str],
    remarks: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Table], Sequence[Figure]]],
    figure_folder: str = "",
    examples: Sequence[Example] = (),
    chinese: bool = False,
) -> str:
    """Render a page as HTML; names and texts of the runs and the data are escaped.

    Args:
        title: page title.
        facts: names and values, shown as a table below the summary.
        remarks: the summary, one sentence each.
        sections: names, tables and figures; empty sections are omitted.
        figure_folder: folder of the figures, relative to the page.
        examples: rows as the model sees them, shown in a last section.
        chinese: whether the page is also in Chinese, with a switch.
    """
    template = environment(TEMPLATES).get_template("page.html.j2")
    return template.render(
        title=title,
        facts=facts,
        remarks=remarks,
        sections=[section for section in sections if section[1] or section[2]],
        figure_folder=figure_folder,
        examples=examples,
        chinese=chinese,
        many_rows=MANY_ROWS,
        truncated_shown=TRUNCATED_SHOWN,
    )


def publish(
    folder: Path,
    name: str,
    title: str,
    facts: Mapping[str, str],
    remarks: Sequence[str],
    shown: Sequence[Table],
    figure: Figure,
    records: Sequence[Mapping[str, Any]],
) -> None:
    """Print the results of a stage, and write them as ``<name>.html``, ``.md``, ``.csv`` and ``.json``.

    Args:
        folder: of the results; exists.
        name: of the files.
        title, facts, remarks: of the page, see `render`.
        shown: tables, each in its own section of the page.
        figure: in the first section.
        records: the numbers, one per row of the CSV.
    """
    sections = [(one.title, [one], [figure] if number == 0 else []) for number, one in enumerate(shown)]
    lists = ["\n".join(f"- {text}" for text in texts) for texts in ([f"{k}: {v}" for k, v in facts.items()], remarks)]
    picture = f"![{figure.title}]({figure.file.name})\n"
    texts = {
        "html": render(title, facts, remarks, sections),
        "md": "\n\n".join([f"# {title}", *lists, *(one.markdown() for one in shown), picture]),
        "csv": to_csv(records),
        "json": json.dumps({"remarks": list(remarks), "records": list(records)}, ensure_ascii=False, indent=1) + "\n",
    }
    for suffix, text in texts.items():
        files.write_text(folder / f"{name}.{suffix}", text)
    for table in shown:
        table.show()
    for remark in remarks:
        console().print(remark, highlight=False, markup=False)
    print(f"{title.lower()}: {folder / name}.html (also .md, .csv, .json, {figure.file.name})")


# ------------------------------------------------------------------------------------------------ languages


@cache
def _chinese() -> tuple[dict[str, str], list[tuple[re.Pattern[str], str]]]:
    """Phrases, and patterns with ``{}`` for whatever differs, with their translations."""
    phrases: dict[str, str] = yaml.safe_load((TEMPLATES / "chinese.yaml").read_text(encoding="utf-8"))
    longest_first = sorted(phrases.items(), key=lambda phrase: -len(phrase[0]))
    patterns = [(re.compile(re.escape(key).replace(r"\{\}", "(.+?)")), text) for key, text in longest_first]
    return phrases, [(key, text) for key, text in patterns if key.groups]


def translated(text: str) -> str | None:
    """The Chinese for a phrase or for several sentences of a page; None for names and texts of the data."""
    phrases, patterns = _chinese()
    if text in phrases:
        return phrases[text]
    whole = None
    for pattern, chinese in patterns:
        if match := pattern.fullmatch(text):
            whole = chinese.format(*(translated(one) or one for one in match.groups()))
            break
    sentences = re.split(r"(?<=\.) (?=[A-Z]|stage\.)", text)
    if whole is not None or len(sentences) == 1:
        return whole
    parts = [translated(sentence) for sentence in sentences]
    return None if None in parts else "".join(filter(None, parts))
