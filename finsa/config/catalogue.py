"""Where the choices of the configuration lie: ``conf/``, and folders of the user's beside it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from finsa.config import ROOT, locate
from finsa.errors import ConfigError, Problem

CONF = ROOT / "conf"
# Owner and name, or the name alone of some old repositories; never a path such as ./weights or /weights.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
added: list[Path] = []  # folders that are read like conf/
Choices = dict[str, str | None]


@cache
def groups() -> tuple[str, ...]:
    """Names of the configuration groups."""
    return tuple(sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()))


def add_folder(folder: Path) -> None:
    """Look for choices in a folder of the user's as well; ``--config-dir`` on the command line."""
    added.append(folder.absolute())
    choices_of.cache_clear()


@contextmanager
def folder_added(folder: Path) -> Iterator[None]:
    """Look for choices in a folder as well, for as long as this lasts."""
    add_folder(folder)
    try:
        yield
    finally:
        added.remove(folder.absolute())
        choices_of.cache_clear()


@cache
def choices_of(group: str) -> tuple[str, ...]:
    """Names of the files in a group."""
    return tuple(sorted({file.stem for folder in (CONF, *added) for file in (folder / group).glob("*.yaml")}))


def page() -> str:
    """What ``--help`` prints, as Hydra does; asked for the choices, Hydra copies its whole state once per group."""
    template: str = _read(CONF / "config.yaml")["hydra"]["help"]["template"]
    told = "".join(f"{group}: {', '.join(choices_of(group))}\n" for group in groups())
    return template.replace("$APP_CONFIG_GROUPS", told)


def file_of(group: str, name: str) -> Path:
    """The file of a choice: below ``conf/``, or in a folder that was added."""
    places = [folder / group / f"{name}.yaml" for folder in (CONF, *added)]
    return next((file for file in places if file.is_file()), places[0])


def stated(group: str, name: str) -> dict[str, Any]:
    """What the file of a choice itself states, defaults not followed."""
    return _read(file_of(group, name))


def experiment(name: str) -> dict[str, Any]:
    """What an experiment's file itself states, defaults not followed."""
    return stated("experiment", name)


def of_hub(repository: str) -> str:
    """The words of a command that choose a model of the hub."""
    for choice in choices_of("model"):
        if str(stated("model", choice).get("hub_id")).lower() == repository.lower():
            return f"model={choice}"
    return f"model=local model.hub_id={repository}"


def options_of_another_stage(choices: Choices, overrides: Sequence[str]) -> list[str]:
    """Stage options that an experiment's file states for its own stage, where the command has chosen another one.

    Those that the command itself sets are not among them: it means them for the stage it chose.
    """
    stated = experiment(choices.get("experiment") or "").get("stage") or {}
    own = _read(file_of("stage", choices.get("stage") or ""))
    said = [text.lstrip("+").split("=", 1)[0] for text in overrides]
    return [key for key in stated if key not in own and not any(f"{one}.".startswith(f"stage.{key}.") for one in said)]


def origin_of(path: str, choices: Choices, overrides: Sequence[str]) -> str:
    """Name the place where a value was written."""
    for text in overrides:
        key = text.split("=", 1)[0].lstrip("+~")
        if key not in groups() and (path == key or path.startswith(key + ".") or key.startswith(path + ".")):
            return "command line"
    group, *rest = path.split(".")
    experiment = choices.get("experiment")
    if experiment and _states(file_of("experiment", experiment), path.split(".")):
        return _told(file_of("experiment", experiment))
    choice = choices.get(group)
    if not choice:
        return "conf/config.yaml"
    return _told(file_of(group, _writer(group, choice, rest)))


def _told(file: Path) -> str:
    return file.relative_to(CONF.parent).as_posix() if file.is_relative_to(CONF) else str(file)


def _writer(group: str, choice: str, rest: list[str]) -> str:
    """Follow a file's defaults to the one that states the key; the chosen one where none does."""
    if _states(file_of(group, choice), rest):
        return choice
    for parent in _read(file_of(group, choice)).get("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            found = _writer(group, parent, rest)
            if _states(file_of(group, found), rest):
                return found
    return choice


def _states(file: Path, keys: list[str]) -> bool:
    values: Any = _read(file)
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return isinstance(values, list)
        values = values[key]
    return True


@cache
def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def with_local_models(values: dict[str, Any]) -> dict[str, Any]:
    """Values in which the model and the encoder of a baseline have the path of their folder below ``models``."""
    if not isinstance(values.get("models"), str):
        return values
    files = locate(values["models"]).glob("*/origin.json")  # none where the folder is missing, which a start reports
    origins = {file.parent: json.loads(file.read_text(encoding="utf-8")) for file in files}
    folders = {origin.get("original"): str(folder) for folder, origin in sorted(origins.items(), reverse=True)}

    def located(section: dict[str, Any] | None) -> dict[str, Any] | None:
        if not section or section.get("path") is not None or section.get("hub_id") not in folders:
            return section
        return section | {"path": folders[section["hub_id"]]}

    method = values["method"]
    if method.get("baseline"):
        method = method | {"baseline": located(method["baseline"])}
    return values | {"model": located(values["model"]), "method": method}


def with_method_settings(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Values with those in their places that ``per_method`` has for the chosen method and the command does not set.

    Raises:
        ConfigError: for a key below another one that is no section.
    """
    settings, method = values.get("per_method"), values["method"]["name"]
    if not isinstance(settings, dict) or not isinstance(settings.get(method, {}), dict):
        return values  # what it is instead is reported with the other wrong values
    given = {override.partition("=")[0] for override in overrides}
    values = copy.deepcopy(values | {"per_method": None})
    for key, value in settings.get(method, {}).items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError([Problem(f"per_method.{method}", f"{key} is no key; {parent} has none below it")])
        if key not in given:
            section[last] = value
    return values
