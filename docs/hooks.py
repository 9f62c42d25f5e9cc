"""Fills the pages that are made from the project itself, when ``make docs`` builds them: nothing to keep in step.

A line ``<!-- made: reference -->`` becomes the table of all keys, ``<!-- made: choices -->`` the list of all files.
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
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from finsa import config
from finsa.config import catalogue, compose

# Where the remarks and the default values of a section stand.
WRITTEN = {"model": "qwen05b_instruct", "method": "lora", "data": "table", "train": "default", "tracking": "wandb"}
DEFAULT = {"model": "tiny", "method": "lora_response", "data": "sample", "train": "default", "tracking": "wandb"}
INNER = {  # sections that a default leaves empty, and the file that has them
    "data.hub": ("data", "hub", "hub"),
    "data.articles": ("data", "aidf_news", "articles"),
    "data.generator": ("data", "generated", "generator"),
    "data.corpus": ("data", "tiny_corpus", "corpus"),
    "method.adapter": ("method", "lora", "adapter"),
}


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Args:
        path: dotted.
        kind: what it takes.
        default: as a YAML value; empty where there is none.
        meaning: in words.
    """

    path: str
    kind: str
    default: str
    meaning: str


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page: put in what is made."""
    made = {"reference": reference, "choices": choices}
    return re.sub(r"<!-- made: (\w+) -->", lambda found: made[found[1]](), markdown)


def choices() -> str:
    """All files of all groups, each with the first sentence it says about itself."""
    parts = []
    for group in ("model", "method", "data", "train", "stage", "experiment", "published", "tracking"):
        names = catalogue.choices_of(group)
        rows = [f"| `{name}` | {_cell(catalogue.summary(catalogue.file_of(group, name)))} |" for name in names]
        parts.append("\n".join([f"## `{group}=`", "", "| name | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def reference() -> str:
    """Tables of all keys, a section each."""
    parts = []
    for title, keys in sections():
        rows = [f"| `{key.path}` | {_cell(key.kind)} | {_code(key.default)} | {_cell(key.meaning)} |" for key in keys]
        head = [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def sections() -> Iterator[tuple[str, list[Key]]]:
    """Every section of the configuration with its keys; a stage's and a baseline's own ones under their names."""
    main = _read(catalogue.CONF / "config.yaml")
    remarks = catalogue.key_comments(catalogue.CONF / "config.yaml")
    tops = [name for name in config.RunConfig.model_fields if name not in (*WRITTEN, "stage")]
    told = documented(config.RunConfig)
    yield "At the top", [_key(config.RunConfig, name, name, main.get(name), told, remarks) for name in tops]
    for name in WRITTEN:
        model = typing.cast(type[BaseModel], config.RunConfig.model_fields[name].annotation)
        values = compose.compose_values([f"{name}={DEFAULT[name]}"])[0][name]
        remarks = catalogue.key_comments(catalogue.file_of(name, WRITTEN[name]))
        yield f"`{name}`", list(_keys(model, name, values, remarks, ""))
    for baseline in branches(config.Baseline):
        kind = typing.get_args(baseline.model_fields["kind"].annotation)[0]
        file = catalogue.file_of("method", kind)
        values = compose.compose_values([f"method={kind}"])[0]["method"]["baseline"]
        yield (
            f"`method.baseline`, kind `{kind}`",
            list(_keys(baseline, "method.baseline", values, catalogue.key_comments(file), "baseline.")),
        )
    for stage in branches(config.Stage):
        name = typing.get_args(stage.model_fields["name"].annotation)[0]
        file = catalogue.file_of("stage", name)
        yield (
            f"`stage`, with `stage={name}`",
            list(_keys(stage, "stage", _read(file), catalogue.key_comments(file), "")),
        )


def branches(union: Any) -> tuple[type[BaseModel], ...]:
    """The types that a discriminated union joins."""
    return typing.get_args(typing.get_args(union)[0])


def documented(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a section and its bases say about its keys."""
    found: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if not issubclass(parent, BaseModel) or parent is BaseModel or not parent.__doc__:
            continue
        args = inspect.cleandoc(parent.__doc__).partition("Args:\n")[2]
        for names, text in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", args, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def _keys(model: type[BaseModel], path: str, values: Any, remarks: dict[str, str], prefix: str) -> Iterator[Key]:
    """The keys of a section and of those within it.

    Args:
        path: of the section.
        values: its default values.
        remarks: of the file it is written in, by key below ``prefix``.
    """
    told = documented(model)
    for name, field in model.model_fields.items():
        value = values.get(name) if isinstance(values, dict) else None
        below = {key.removeprefix(prefix): text for key, text in remarks.items() if key.startswith(prefix)}
        yield _key(model, name, f"{path}.{name}", value, told, below)
        inner = _section(field.annotation)
        if inner is not None:
            rest = {key.removeprefix(f"{name}."): text for key, text in below.items() if key.startswith(f"{name}.")}
            given = value
            if f"{path}.{name}" in INNER:
                group, file, section = INNER[f"{path}.{name}"]
                given = value or _read(catalogue.file_of(group, file)).get(section)
                written = catalogue.key_comments(catalogue.file_of(group, file))
                rest |= {k.removeprefix(f"{section}."): t for k, t in written.items() if k.startswith(f"{section}.")}
            yield from _keys(inner, f"{path}.{name}", given, rest, "")


def _key(
    model: type[BaseModel], name: str, path: str, value: Any, told: dict[str, str], remarks: dict[str, str]
) -> Key:
    field = model.model_fields[name]
    kind = shown(field.annotation, field.metadata)
    inner = _section(field.annotation)
    own = {"name": "the file's name", "kind": "what learns"}.get(name, "")
    about = (inspect.getdoc(inner) or "").split("\n")[0] if inner is not None else ""
    meaning = next((part for part in (told.get(name), remarks.get(name), own, about) if part), "")
    default = "" if isinstance(value, dict) and inner is not None else composition_line(value)
    return Key(path, kind, default, meaning.rstrip(".;").replace("``", "`"))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The one section that an annotation allows; none where it is a union of several, or a mapping."""
    for part in [annotation, *typing.get_args(annotation)]:
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def composition_line(value: Any) -> str:
    """A default on one line, cut where it is long."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
    return text if len(text) <= 60 else f"{text[:57]}…"


def shown(annotation: Any, metadata: Any = ()) -> str:
    """A type in words: the allowed values, or what kind of value."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = [f"{sign} {getattr(limit, name)}" for limit in metadata for name, sign in _BOUNDS if hasattr(limit, name)]
    suffix = f" {', '.join(bounds)}" if bounds else ""
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in args)
    if origin is typing.Annotated:
        inner = [limit for part in annotation.__metadata__ for limit in getattr(part, "metadata", [part])]
        return shown(args[0], inner)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(dict.fromkeys(shown(part, metadata) for part in args))
    if origin is tuple:
        return f"list of {shown(args[0])}"
    if origin is dict:
        return f"mapping of {shown(args[0])} to {shown(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    words = {str: "text", int: "whole number", float: "number", bool: "`true` \\| `false`", type(None): "`null`"}
    return words.get(annotation, "any value") + suffix


_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", "\\|", text).replace("<", "&lt;").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{_cell(text)}`".replace("&lt;", "<") if text else ""
