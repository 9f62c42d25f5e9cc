"""MkDocs hooks: the parts of the documentation that are generated from the code and from ``conf/``.

A line ``<!-- generated: reference -->`` becomes the reference of all keys, ``<!-- generated: choices -->`` the tables
of all files below ``conf/``. The benchmark chart is taken from ``benchmarks/results/``.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from finsa import config
from finsa.config import catalogue, compose

ROOT = Path(__file__).parent.parent
CHARTS = "benchmarks/results/"  # a page names a chart by its path in the repository, so that GitHub shows it too

LONGEST_WORD = 40  # characters of a word of code that stays on one line, on a phone too

# The file whose comments document a section, and the one whose values are the defaults.
COMMENTED = {"model": "qwen05b_instruct", "method": "lora", "data": "table", "train": "default", "tracking": "wandb"}
DEFAULT = {"model": "tiny", "method": "lora_response", "data": "sample", "train": "default", "tracking": "wandb"}
INNER = {  # sections that are null by default, and the file that sets them
    "data.hub": ("data", "hub", "hub"),
    "data.articles": ("data", "aidf_news", "articles"),
    "data.generator": ("data", "generated", "generator"),
    "data.corpus": ("data", "tiny_corpus", "corpus"),
    "method.adapter": ("method", "lora", "adapter"),
}


# A comment and what precedes it: quoted strings, and any other characters; a # within a word begins no comment.
COMMENT = re.compile(r"""(?:[^'"#]|'[^']*'|"(?:\\.|[^"\\])*"|(?<=\S)#)*?(?<!\S)# (.*)$""")


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Args:
        path: dotted path.
        kind: type, in words.
        default: as a YAML value; empty if there is none.
        meaning: description.
    """

    path: str
    kind: str
    default: str
    meaning: str


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with all files of the site: add the benchmark charts."""
    for chart in (ROOT / CHARTS).glob("*.png"):
        files.append(File.generated(config, f"pictures/{chart.name}", abs_src_path=str(chart)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page: insert the generated parts."""
    generators = {"reference": reference, "choices": choices}
    markdown = re.sub(r"<!-- generated: (\w+) -->", lambda match: generators[match[1]](), markdown)
    return markdown.replace(f"../{CHARTS}", "pictures/")


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of every page: mark the words of code that a browser would break inside."""

    def marked(match: re.Match[str]) -> str:
        words = match[1].split(" ")
        breakable = [re.search(r"[-/&]|[^\x00-\x7f]", word) and len(word) <= LONGEST_WORD for word in words]
        pairs = zip(words, breakable, strict=True)
        return f"<code>{' '.join(f'<span class=word>{word}</span>' if mark else word for word, mark in pairs)}</code>"

    return re.sub(r"<code>([^<\n]+)</code>", marked, html)


def choices() -> str:
    """Tables of all files of all config groups, each with the first sentence of its header."""
    parts = []
    for group in ("model", "method", "data", "train", "stage", "experiment", "published", "tracking"):
        names = catalogue.choices_of(group)
        rows = [f"| `{name}` | {_cell(catalogue.summary(catalogue.file_of(group, name)))} |" for name in names]
        parts.append("\n".join([f"### `{group}=`", "", "| name | description |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def reference() -> str:
    """All keys, one section of the page per section of the configuration."""
    parts = []
    for title, keys in sections():
        entries = []
        for key in keys:
            default = f", default `{key.default}`" if key.default else ""
            entries += [f'<a id="{key.path}"></a>`{key.path}` <small>{key.kind}{default}</small>']
            entries += [f":   {key.meaning.replace('<', '&lt;')}", ""]
        parts.append("\n".join([f"## {title}", "", '<div class="keys" markdown>', "", *entries, "</div>"]))
    return "\n\n".join(parts)


def sections() -> Iterator[tuple[str, list[Key]]]:
    """Every section of the configuration with its keys; those of a stage or baseline under its name."""
    main = _read(catalogue.CONF / "config.yaml")
    comments = key_comments(catalogue.CONF / "config.yaml")
    tops = [name for name in config.RunConfig.model_fields if name not in (*COMMENTED, "stage")]
    documentation = documented(config.RunConfig)
    yield "Top level", [_key(config.RunConfig, name, name, main.get(name), documentation, comments) for name in tops]
    for name in COMMENTED:
        model = typing.cast(type[BaseModel], config.RunConfig.model_fields[name].annotation)
        values = compose.compose_values([f"{name}={DEFAULT[name]}"])[0][name]
        comments = key_comments(catalogue.file_of(name, COMMENTED[name]))
        yield f"`{name}`", list(_keys(model, name, values, comments, ""))
    for baseline in branches(config.Baseline):
        kind = typing.get_args(baseline.model_fields["kind"].annotation)[0]
        file = catalogue.file_of("method", kind)
        values = compose.compose_values([f"method={kind}"])[0]["method"]["baseline"]
        yield (
            f"`method.baseline`, kind `{kind}`",
            list(_keys(baseline, "method.baseline", values, key_comments(file), "baseline.")),
        )
    for stage in branches(config.Stage):
        name = typing.get_args(stage.model_fields["name"].annotation)[0]
        file = catalogue.file_of("stage", name)
        yield (
            f"`stage`, with `stage={name}`",
            list(_keys(stage, "stage", _read(file), key_comments(file), "")),
        )


def key_comments(file: Path) -> dict[str, str]:
    """The comments beside the keys of a configuration file.

    Returns:
        By dotted key, the text after ``#`` on its line and on following lines that only consist of a comment.
    """
    comments: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        key = re.match(r"( *)(\w+):", line)
        comment = COMMENT.match(line)
        if key:
            path = [(indent, name) for indent, name in path if indent < len(key[1])] + [(len(key[1]), key[2])]
        dotted = ".".join(name for _, name in path)
        if comment and path and (key or (re.match(r" {10,}#", line) and dotted in comments)):
            comments[dotted] = f"{comments[dotted]} {comment[1].strip()}" if dotted in comments else comment[1].strip()
        elif not key:
            path = path if line.startswith(" ") else []
    return comments


def branches(union: Any) -> tuple[type[BaseModel], ...]:
    """The types that a discriminated union joins."""
    return typing.get_args(typing.get_args(union)[0])


def documented(model: type[BaseModel]) -> dict[str, str]:
    """Descriptions of a section's keys, from its docstring and those of its base classes."""
    descriptions: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if not issubclass(parent, BaseModel) or parent is BaseModel or not parent.__doc__:
            continue
        args = inspect.cleandoc(parent.__doc__).partition("Args:\n")[2]
        for names, text in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", args, re.MULTILINE):
            descriptions |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return descriptions


def _keys(model: type[BaseModel], path: str, values: Any, comments: dict[str, str], prefix: str) -> Iterator[Key]:
    """The keys of a section and of those within it.

    Args:
        path: dotted path of the section.
        values: default values of the section.
        comments: comments of the file that documents the section, by key.
        prefix: what precedes the section's keys in ``comments``.
    """
    documentation = documented(model)
    for name, field in model.model_fields.items():
        value = values.get(name) if isinstance(values, dict) else None
        below = {key.removeprefix(prefix): text for key, text in comments.items() if key.startswith(prefix)}
        yield _key(model, name, f"{path}.{name}", value, documentation, below)
        inner = _section(field.annotation)
        if inner is not None:
            rest = {key.removeprefix(f"{name}."): text for key, text in below.items() if key.startswith(f"{name}.")}
            given = value
            if f"{path}.{name}" in INNER:
                group, file, section = INNER[f"{path}.{name}"]
                given = value or _read(catalogue.file_of(group, file)).get(section)
                written = key_comments(catalogue.file_of(group, file))
                rest |= {k.removeprefix(f"{section}."): t for k, t in written.items() if k.startswith(f"{section}.")}
            yield from _keys(inner, f"{path}.{name}", given, rest, "")


def _key(
    model: type[BaseModel], name: str, path: str, value: Any, documentation: dict[str, str], comments: dict[str, str]
) -> Key:
    field = model.model_fields[name]
    kind = type_in_words(field.annotation, field.metadata)
    inner = _section(field.annotation)
    fallback = {"name": "name of the file", "kind": "kind of the baseline"}.get(name, "")
    about = (inspect.getdoc(inner) or "").split("\n")[0] if inner is not None else ""
    meaning = next((part for part in (documentation.get(name), comments.get(name), fallback, about) if part), "")
    default = "" if isinstance(value, dict) and inner is not None else yaml_line(value)
    return Key(path, kind, default, meaning.rstrip(".;").replace("``", "`"))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The nested section that an annotation allows, or None."""
    for part in [annotation, *typing.get_args(annotation)]:
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def yaml_line(value: Any) -> str:
    """A default value as one line of YAML, truncated if it is long."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
    return text if len(text) <= 60 else f"{text[:57]}…"


def type_in_words(annotation: Any, metadata: Any = ()) -> str:
    """A type in words: the allowed values, or the kind of value."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = [f"{sign} {getattr(limit, name)}" for limit in metadata for name, sign in _BOUNDS if hasattr(limit, name)]
    suffix = f" {', '.join(bounds)}" if bounds else ""
    if origin is typing.Literal:
        return " | ".join(f"`{value}`" for value in args)
    if origin is typing.Annotated:
        inner = [limit for part in annotation.__metadata__ for limit in getattr(part, "metadata", [part])]
        return type_in_words(args[0], inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_in_words(part, metadata) for part in args))
    if origin is tuple:
        return f"list of {type_in_words(args[0])}"
    if origin is dict:
        return f"mapping of {type_in_words(args[0])} to {type_in_words(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    words = {str: "string", int: "integer", float: "number", bool: "`true` | `false`", type(None): "`null`"}
    return words.get(annotation, "any value") + suffix


_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", "\\|", text).replace("<", "&lt;").replace("\n", " ")
