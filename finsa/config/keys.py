"""Dotted keys of the configuration, looked up in the types: which ones exist, what they accept, which one was meant."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel

from finsa.config.run import RunConfig
from finsa.errors import Problem, nearest, suggest

# Keys that older versions had and that changed no result; `finsa.config.migration` leaves them out.
REMOVED = ("train.batch_tokens", "train.compile")


def fields_of(annotation: Any) -> dict[str, Any] | None:
    """Annotations of the fields below an annotation: {} for a plain value, None for a mapping, where any key goes."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    origin = typing.get_origin(annotation)
    if origin is dict:
        return None
    fields: dict[str, Any] = {}
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            inner = fields_of(part)
            if inner is None:
                return None
            fields |= inner
    return fields


def entry_of(annotation: Any) -> Any:
    """Annotation of the values of a mapping; None if there is no mapping."""
    mappings = (part for part in [annotation, *typing.get_args(annotation)] if typing.get_origin(part) is dict)
    return next((typing.get_args(part)[1] for part in mappings), None)


def kind_of(key: str) -> Any:
    """Annotation of a key's values; None if there is no such key."""
    known: Any = RunConfig
    for part in key.split("."):
        names = fields_of(known)
        known = Any if known is Any else entry_of(known) if names is None else names.get(part)
    return known


def below_mapping(key: str) -> bool:
    """Whether a key is below a mapping, to which any key may be added."""
    parts = key.split(".")
    return any(fields_of(kind_of(".".join(parts[:depth]))) is None for depth in range(1, len(parts)))


def takes_any_key(annotation: Any) -> bool:
    """Whether values may be maps whose keys are the user's words, rather than a fixed set of names."""
    mappings = [part for part in [annotation, *typing.get_args(annotation)] if typing.get_origin(part) is dict]
    return annotation is Any or any(
        typing.get_origin(typing.get_args(part)[0]) is not typing.Literal for part in mappings
    )


def replaces(annotation: Any) -> bool:
    """Whether a map replaces the one in ``conf/``, as a list does, instead of being merged: labels and their names."""
    entry = entry_of(annotation)
    return takes_any_key(annotation) and (entry is str or typing.get_args(entry)[:1] == (str,))


def unknown_key(key: str) -> Problem | None:
    """The problem with a key that does not exist, with a suggestion.

    Returns:
        None if the key exists, or is below a mapping, which takes any key.
    """
    unknown = _unknown_part(key)
    if unknown is None:
        return None
    if key in REMOVED:
        return Problem(key, "was removed, because it had no benefit; leave it out", "command line")
    near = nearest_key(key)
    hint = f"Did you mean '{near}'?" if near else suggest(*unknown)
    return Problem(key, f"unknown key. {hint}".strip(), "command line")


def nearest_key(key: str) -> str | None:
    """The key that was probably meant: the key itself if it exists; None if none is similar."""
    unknown = _unknown_part(key)
    if unknown is None:
        return key
    part, names = unknown
    parts = key.split(".")
    depth = parts.index(part)
    near = nearest(part, names)
    if near:
        return ".".join([*parts[:depth], near])
    # Written without its section (learning_rate), or, if it is spelt correctly, in another one.
    paths = {
        field: f"{section}.{field}"
        for section, annotation in reversed((fields_of(RunConfig) or {}).items())
        for field in fields_of(annotation) or {}
    }
    found = (part if part in paths else None) if depth else nearest(part, paths)
    return paths[found] if found else None


def _unknown_part(key: str) -> tuple[str, dict[str, Any]] | None:
    """The first part of a dotted key that does not exist, and the names that exist in its place."""
    known: Any = RunConfig
    for part in key.split("."):
        names = fields_of(known)
        if names is None:
            known = entry_of(known)
            if not (isinstance(known, type) and issubclass(known, BaseModel)):
                return None
        elif part not in names:
            return part, names
        else:
            known = names[part]
    return None
