"""The files of ``conf/`` and of ``--config-dir`` folders: the choices of each group, and how they describe themselves.

``folders`` are those that a command adds with ``--config-dir``. They are laid out like ``conf/``, and files of the same
name in ``conf/`` take precedence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finsa.config.base import ROOT

CONF = ROOT / "conf"
COMMAND = "python run.py"
# The groups in the order in which a run is composed.
ORDER = ("model", "method", "data", "train", "stage", "experiment", "published", "behavior", "tracking")
# Owner and name on the hub, or only the name for some old repositories; never a path such as ./weights or /weights.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
Folders = tuple[Path, ...]
Files = Mapping[str, Path | None]  # the chosen file of each group


def groups() -> tuple[str, ...]:
    """Names of the configuration groups."""
    return tuple(sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()))


def choices_of(group: str, folders: Folders = ()) -> tuple[str, ...]:
    """Names of the files in a group."""
    return tuple(sorted({file.stem for folder in (CONF, *folders) for file in (folder / group).glob("*.yaml")}))


def file_of(group: str, name: str, folders: Folders = ()) -> Path:
    """The file of a choice; the path that it would have in ``conf/`` if there is none."""
    files = [folder / group / f"{name}.yaml" for folder in (CONF, *folders)]
    return next((file for file in files if file.is_file()), files[0])


def read(file: Path | None) -> dict[str, Any]:
    """What a file itself states, without its defaults; empty if there is no such file."""
    if file is None or not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def help_page(folders: Folders = ()) -> str:
    """The text of ``--help``; Hydra would copy its whole state once per group to list the choices."""
    template: str = read(CONF / "config.yaml")["hydra"]["help"]["template"]
    choices = "".join(f"{group}: {', '.join(choices_of(group, folders))}\n" for group in groups())
    return template.replace("$APP_CONFIG_GROUPS", choices)


def hub_model(repository: str, folders: Folders = ()) -> str:
    """The overrides that choose a model of the hub: its file, or ``model=local``."""
    for choice in choices_of("model", folders):
        if str(read(file_of("model", choice, folders)).get("hub_id")).lower() == repository.lower():
            return f"model={choice}"
    return f"model=local model.hub_id={repository}"


def origin_of(path: str, files: Files, overrides: Sequence[str]) -> str:
    """Where a value was written: ``command line``, or a file, found by following the defaults of the chosen files."""
    for text in overrides:
        key = text.split("=", 1)[0].lstrip("+~")
        if key not in groups() and (path == key or path.startswith(key + ".") or key.startswith(path + ".")):
            return "command line"
    keys = path.split(".")
    chosen = files.get(keys[0])
    experiment = files.get("experiment")
    written = experiment and _writer(experiment, keys)
    if not written:
        written = _writer(chosen, keys[1:]) or chosen if chosen else CONF / "config.yaml"
    return written.relative_to(CONF.parent).as_posix() if written.is_relative_to(CONF) else str(written)


def _writer(file: Path, keys: list[str]) -> Path | None:
    """The file that states a key: the given one, or one of its defaults."""
    values = read(file)
    if _states(values, keys):
        return file
    for parent in values.get("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            written = _writer(file_of(file.parent.name, parent, (file.parent.parent,)), keys)
            if written:
                return written
    return None


def _states(values: Any, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return isinstance(values, list)
        values = values[key]
    return True


def description(file: Path) -> str:
    """The comment at the top of a file, up to the command that uses it, as one line."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or COMMAND in line:
            break
        if "@package" not in line:
            words.append(line.removeprefix("#").strip())
    return " ".join(words)


def summary(file: Path) -> str:
    """The first sentence of the description."""
    return re.split(r"(?<! al)\. ", description(file), maxsplit=1)[0].rstrip(".") + "."
