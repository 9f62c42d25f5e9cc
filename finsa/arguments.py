"""Check the command line and the composed configuration before anything heavy is imported.

Hydra alone would stop at its first complaint, accept a misspelt key behind ``+``, and know no types. Here every problem
of the whole command is found and reported at once, with the nearest name and the file a wrong value came from.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from finsa.config import ROOT, RunConfig
from finsa.errors import ConfigError, Problem, nearest, suggest

CONF = ROOT / "conf"
MAX_CHECKED_JOBS = 64


def check(overrides: Sequence[str]) -> None:
    """Check a command's overrides, sweeps included, without running anything.

    Args:
        overrides: arguments such as ``method=lora`` or ``train.epochs=3,5``.

    Raises:
        ConfigError: with every problem found.
    """
    parsed, problems = _parse(overrides)
    sound = []
    for override in parsed:
        found = list(_check_override(override))
        problems += found
        if not found:
            sound.append(override)
    problems += _against_run(sound)
    for job in _jobs(sound):
        problems += _check_job(job)
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def build(values: dict[str, Any], choices: dict[str, str | None], overrides: Sequence[str]) -> RunConfig:
    """Turn composed values into the one frozen configuration.

    Args:
        values: the composed configuration as plain values.
        choices: the file chosen in each group, to name where a wrong value was written.
        overrides: what the command line said.

    Raises:
        ConfigError: with every wrong value, its path, and its origin.
    """
    try:
        # JSON is the mode in which pydantic is strict about types and yet takes a list for a tuple.
        return RunConfig.model_validate_json(json.dumps(values, ensure_ascii=False))
    except ValidationError as error:
        raise ConfigError(_problems(error, values, choices, overrides)) from None


# ------------------------------------------------------------------------------------------------ the command line


def quote(word: str) -> str:
    """Quote Chinese words in a value, which Hydra's grammar takes only in quotes: ``data.labels=[利空,利好]``."""
    key, sign, value = word.partition("=")
    if not sign or value.isascii() or "'" in value or '"' in value:
        return word
    return key + sign + re.sub(r"[^\s,\[\]{}:()]*[^\x00-\x7f][^\s,\[\]{}:()]*", lambda found: f"'{found[0]}'", value)


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem(text, f"not of the form key=value ({reason})", "command line"))
    return parsed, problems


def _check_override(override: Override) -> Iterator[Problem]:
    key, text = override.key_or_group, str(override.input_line)
    if key.split(".")[0].split("/")[0] == "hydra":
        return
    if override.is_delete():
        yield Problem(text, f"nothing can be removed; set a value instead, such as {key}=null", "command line")
    elif key in groups():
        yield from _check_choice(override)
    else:
        unknown = _unknown(key)
        if unknown:
            yield unknown
        elif override.is_add() and not override.is_force_add():
            yield Problem(key, f"is there already; write {text.lstrip('+')} without the +", "command line")


def _against_run(overrides: Sequence[Override]) -> Iterator[Problem]:
    """A run folder brings its own model, method and seed; another one beside it would be ignored, so it is refused."""
    if any(override.key_or_group == "run" and override.value() is not None for override in overrides):
        for override in overrides:
            if override.key_or_group.split(".")[0] in ("model", "method", "seed", "experiment"):
                text = "comes from the run folder that run=<folder> names; leave it out"
                yield Problem(override.key_or_group, text, "command line")


def _check_choice(override: Override) -> Iterator[Problem]:
    group = override.key_or_group
    if override.is_add():
        yield Problem(group, f"is chosen without a +: write {str(override.input_line).lstrip('+')}", "command line")
        return
    for value in _values(override):
        if value == "null" and group == "experiment":
            continue
        if value not in choices_of(group):
            yield Problem(group, f"there is no '{value}'. {suggest(value, choices_of(group))}", "command line")


def _values(override: Override) -> list[str]:
    if override.is_choice_sweep():
        return [str(value) for value in override.sweep_string_iterator()]
    return [override.get_value_element_as_str()]


@cache
def groups() -> tuple[str, ...]:
    """Names of the configuration groups."""
    return tuple(sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()))


@cache
def choices_of(group: str) -> tuple[str, ...]:
    """Names of the files in a group."""
    return tuple(sorted(file.stem for file in (CONF / group).glob("*.yaml")))


def _unknown(key: str) -> Problem | None:
    """Walk a dotted key through the types; None where it is known."""
    known: Any = RunConfig
    parts = key.split(".")
    for depth, part in enumerate(parts):
        names = _fields(known)
        if names is None:
            return None
        if part not in names:
            siblings = [".".join([*parts[:depth], name]) for name in names]
            if depth == 0 and nearest(part, names) is None and (elsewhere := _anywhere(part)):
                return Problem(key, f"unknown key. Did you mean '{elsewhere}'?", "command line")
            return Problem(key, f"unknown key. {suggest('.'.join(parts[: depth + 1]), siblings)}", "command line")
        known = names[part]
    return None


def _fields(annotation: Any) -> dict[str, Any] | None:
    """Fields below an annotation; {} for a leaf, None where any key goes (a mapping)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    origin = typing.get_origin(annotation)
    if origin is dict:
        return None
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        parts = [_fields(part) for part in typing.get_args(annotation) if part is not types.NoneType]
        if any(part is None for part in parts):
            return None
        return {name: field for part in parts for name, field in (part or {}).items()}
    return {}


def _anywhere(name: str) -> str | None:
    """The full path of a key that the user wrote without its section (``learning_rate``)."""
    full = {
        field: f"{section}.{field}"
        for section, annotation in reversed((_fields(RunConfig) or {}).items())
        for field in _fields(annotation) or {}
    }
    found = nearest(name, full)
    return full[found] if found else None


# ------------------------------------------------------------------------------------------------ the jobs of a command


def _jobs(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination a sweep would run, as override lists."""
    axes = []
    for override in overrides:
        line = str(override.input_line)
        if not override.is_sweep_override():
            axes.append([line])
        elif override.is_discrete_sweep():
            key = line.split("=", 1)[0]
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    combinations = product(*axes)
    return [list(job) for job, _ in zip(combinations, range(MAX_CHECKED_JOBS), strict=False)]


def _check_job(job: list[str]) -> list[Problem]:
    try:
        values, choices = compose_values(job)
        build(values, choices, job)
    except ConfigError as error:
        return error.problems
    return []


def compose_values(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Compose ``conf/`` with overrides.

    Returns:
        The values, and the chosen file of each group.

    Raises:
        ConfigError: for what Hydra itself refuses.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", list(overrides), return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        return plain(composed), choices
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise refused(error) from None


def plain(config: Any) -> dict[str, Any]:
    """Resolve a composed configuration into plain values."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def refused(error: Exception) -> ConfigError:
    """Turn an error of Hydra's into one of ours: its first lines, without its advice to append keys."""
    lines = [line for line in str(error).splitlines() if line and "HYDRA_FULL_ERROR" not in line]
    advice = ("To append to your config", "object_type=", "reference_type=")
    text = "; ".join(line.strip() for line in lines if not line.strip().startswith(advice))
    refused_key = re.match(r"Could not override '([^']+)'", text)
    if refused_key:
        section = refused_key[1].rpartition(".")[0]
        text = f"cannot be set, because {section} is null with these choices; choose a file of its group that has it"
        return ConfigError([Problem(refused_key[1], text, "command line")])
    cause = f" ({str(error.__cause__).splitlines()[0]})" if error.__cause__ else ""
    return ConfigError([Problem("configuration", text + cause)])


# ------------------------------------------------------------------------------------------------ wrong values


def _problems(
    error: ValidationError, values: dict[str, Any], choices: dict[str, str | None], overrides: Sequence[str]
) -> Iterator[Problem]:
    for fault in error.errors(include_url=False):
        # A union's location carries the branch's name; only what is a key of the values belongs to the path.
        path = _path(fault["loc"], values)
        yield Problem(path or "configuration", _describe(fault, path), _origin(path, choices, overrides))


def _path(location: Iterable[Any], values: Any) -> str:
    """Dotted path of a fault: the steps of its location that are keys, present or at least known."""
    parts: list[str] = []
    for step in location:
        if _has(values, step):
            values = values[step]
        elif not parts or not isinstance(values, dict) or _unknown(".".join([*parts, str(step)])):
            continue
        parts.append(str(step))
    return ".".join(parts)


def _has(values: Any, step: Any) -> bool:
    if isinstance(values, list):
        return isinstance(step, int) and step < len(values)
    return isinstance(values, dict) and step in values


def _describe(fault: Any, path: str) -> str:
    kind, given = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        section = ".".join(path.split(".")[:-1])
        unknown = _unknown(path)
        return unknown.text if unknown else f"unknown key in {section or 'the configuration'}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        allowed = [part.strip().strip("'") for part in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return f"there is no {given!r}. {suggest(str(given), allowed)}"
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, not {_shown(given)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    kind = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({kind.get(type(value).__name__, type(value).__name__)})"


def _origin(path: str, choices: dict[str, str | None], overrides: Sequence[str]) -> str:
    """Name the place where a value was written."""
    for text in overrides:
        key = text.split("=", 1)[0].lstrip("+")
        if key not in groups() and (path == key or path.startswith(key + ".") or key.startswith(path + ".")):
            return "command line"
    group, *rest = path.split(".")
    experiment = choices.get("experiment")
    if experiment and _states(CONF / "experiment" / f"{experiment}.yaml", path.split(".")):
        return f"conf/experiment/{experiment}.yaml"
    choice = choices.get(group)
    if not choice:
        return "conf/config.yaml"
    return f"conf/{group}/{_writer(group, choice, rest)}.yaml"


def _writer(group: str, choice: str, rest: list[str]) -> str:
    """Follow a file's defaults to the one that states the key; the chosen one where none does."""
    if _states(CONF / group / f"{choice}.yaml", rest):
        return choice
    for parent in _read(CONF / group / f"{choice}.yaml").get("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            found = _writer(group, parent, rest)
            if _states(CONF / group / f"{found}.yaml", rest):
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


def from_hydra(config: Any) -> RunConfig:
    """Build the configuration of the job that Hydra is running.

    Args:
        config: the ``DictConfig`` of ``hydra.main``'s task function.

    Raises:
        ConfigError: with every wrong value.
    """
    from hydra.core.hydra_config import HydraConfig

    job = HydraConfig.get()
    return build(plain(config), dict(job.runtime.choices), list(job.overrides.task))
