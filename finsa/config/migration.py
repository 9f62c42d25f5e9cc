"""The configuration of a run folder, also where an older version of finsa wrote it.

A key that has come since is filled in with what ``conf/`` says now for the same choices, or with what older versions
did where that is something else (``BEFORE``), and reported once per folder. A key that is gone, or a value that is no
longer allowed, is refused: what it did can no longer be done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finsa.config import RunConfig, compose
from finsa.errors import ConfigError, RunError

BEFORE = {"turns": "last"}  # by key: chats were read by their last user turn
_told: set[Path] = set()


def read(file: Path) -> RunConfig:
    """Read a run's ``config.yaml``.

    Raises:
        RunError: for a file that is damaged, or that this version cannot follow.
    """
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"run: {file} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise RunError(f"run: {file} is damaged: it holds no keys")
    try:
        return _built(values)
    except ValidationError:
        filled, keys = _filled(values, _of_now(values, file))
    version = text.splitlines()[0].removeprefix("# ") if text.startswith("# finsa ") else "an older version"
    try:
        cfg = _built(filled)
    except ValidationError as error:
        first = error.errors()[0]
        path, more = ".".join(map(str, first["loc"])), error.error_count() - 1
        raise RunError(
            f"run: {file}, written by {version}, does not fit this one: {path}: {first['msg']}"
            f"{f', and {more} more' if more else ''}. Train it again, or use the version that wrote it"
        ) from None
    if file not in _told:
        _told.add(file)
        print(f"{file}: written by {version}, which did not have these keys; taken are: {', '.join(keys)}")
    return cfg


def _built(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate_json(json.dumps(values))


def _of_now(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """What ``conf/`` says for the choices that a configuration names; the default's where a choice is gone."""
    chosen = {group: values[group].get("name") for group in compose.groups() if isinstance(values.get(group), dict)}
    known = [
        f"{group}={name}" for group, name in chosen.items() if name in compose.choices_of(group) and name != "chain"
    ]
    try:
        return compose.compose_values(known)[0]
    except (*compose.REFUSALS, ConfigError) as error:
        raise RunError(f"run: {file} does not fit this version: {str(error).splitlines()[0]}") from None


def _filled(values: dict[str, Any], now: dict[str, Any], path: str = "") -> tuple[dict[str, Any], list[str]]:
    """Values with the missing keys of `now`, and which these are."""
    filled, keys = dict(values), list[str]()
    for key, value in now.items():
        where = f"{path}{key}"
        if key not in values:
            filled[key] = BEFORE.get(key, value)
            keys.append(f"{where}={json.dumps(filled[key], ensure_ascii=False)}")
        elif isinstance(value, dict) and isinstance(values[key], dict):
            filled[key], below = _filled(values[key], value, f"{where}.")
            keys += below
    return filled, keys
