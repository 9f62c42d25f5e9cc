"""Read the configuration of a run folder, including those written by an older version of finsa.

A key that has been added since is filled in from ``conf/`` for the same choices, or with what older versions did if
that was different (``BEFORE``), and reported once per folder. A key of ``keys.REMOVED`` is left out, because it changed
no result. Any other unknown key, and a value that is no longer allowed, is refused: its effect cannot be reproduced.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finsa.config import catalogue, compose
from finsa.config.keys import REMOVED
from finsa.config.run import RunConfig
from finsa.errors import ConfigError, RunError

BEFORE = {"turns": "last"}  # by key: only the last user turn of a chat was read


def read(file: Path, folders: catalogue.Folders = ()) -> RunConfig:
    """Read a run's ``config.yaml``.

    Args:
        folders: added with ``--config-dir``.

    Raises:
        RunError: for a file that is damaged, or that does not fit this version.
    """
    try:
        return _parse(file.read_text(encoding="utf-8"), file, folders)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"run: {file} is damaged: {str(error).splitlines()[0]}") from None


@cache  # a command reads a run several times, and should report keys that are filled in once
def _parse(text: str, file: Path, folders: catalogue.Folders) -> RunConfig:
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise RunError(f"run: {file} is damaged: it contains no keys")
    for key in REMOVED:
        section, name = key.split(".")
        if isinstance(values.get(section), dict):
            values[section].pop(name, None)
    try:
        return _validated(values)
    except ValidationError:
        filled, keys = _fill(values, _current_values(values, file, folders))
    version = text.splitlines()[0].removeprefix("# ") if text.startswith("# finsa ") else "an older version"
    try:
        cfg = _validated(filled)
    except ValidationError as error:
        first = error.errors()[0]
        path, more = ".".join(map(str, first["loc"])), error.error_count() - 1
        raise RunError(
            f"run: {file}, written by {version}, is not compatible with this one: {path}: {first['msg']}"
            f"{f', and {more} more' if more else ''}. Train it again, or use the version that wrote it"
        ) from None
    print(f"{file}: written by {version}, which did not have these keys; they are set to: {', '.join(keys)}")
    return cfg


def _validated(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate_json(json.dumps(values))


def _current_values(values: dict[str, Any], file: Path, folders: catalogue.Folders) -> dict[str, Any]:
    """The values of ``conf/`` for the choices that a configuration names; the default if a choice no longer exists."""
    chosen = {group: values[group].get("name") for group in catalogue.groups() if isinstance(values.get(group), dict)}
    available = {group: catalogue.choices_of(group, folders) for group in chosen}
    known = {group: name for group, name in chosen.items() if name in available[group] and name != "chain"}
    try:
        return compose.compose_values([f"{group}={name}" for group, name in known.items()], folders)[0]
    except (*compose.REFUSALS, ConfigError) as error:
        raise RunError(f"run: {file} does not fit this version: {str(error).splitlines()[0]}") from None


def _fill(values: dict[str, Any], current: dict[str, Any], path: str = "") -> tuple[dict[str, Any], list[str]]:
    """Add the keys that are missing, and list them."""
    filled, keys = dict(values), list[str]()
    for key, value in current.items():
        if key not in values:
            filled[key] = BEFORE.get(key, value)
            keys.append(f"{path}{key}={json.dumps(filled[key], ensure_ascii=False)}")
        elif isinstance(value, dict) and isinstance(values[key], dict):
            filled[key], below = _fill(values[key], value, f"{path}{key}.")
            keys += below
    return filled, keys
