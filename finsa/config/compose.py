"""Compose ``conf/`` into the one frozen configuration, and say of every wrong value where it was written."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from finsa.config import RunConfig, quoting, safety
from finsa.config.catalogue import (
    CONF,
    Choices,
    add_folder,
    added,
    choices_of,
    experiment,
    file_of,
    folder_added,
    groups,
    options_of_another_stage,
    origin_of,
    with_local_models,
    with_method_settings,
)
from finsa.errors import ConfigError, Problem, nearest, suggest
from finsa.session import Job, current_job

# for users of this module
__all__ = ["CONF", "add_folder", "added", "choices_of", "experiment", "file_of", "folder_added", "groups"]

REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def compose_values(overrides: Sequence[str]) -> tuple[dict[str, Any], Choices]:
    """Compose ``conf/`` with overrides.

    Returns:
        The values, and the chosen file of each group.

    Raises:
        ConfigError: for what Hydra itself refuses.
    """
    running = GlobalHydra.instance()
    outer, running.hydra = running.hydra, None  # a job of Hydra's may compose another job's configuration
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", [*overrides, *_search_path()], return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        safety.require_no_code(OmegaConf.to_container(composed, resolve=False))
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        return plain(composed), choices
    except REFUSALS as error:
        raise refused(error) from None
    finally:
        running.hydra = outer


def _search_path() -> list[str]:
    return [f"hydra.searchpath=[{','.join(repr(f'file://{folder}') for folder in added)}]"] if added else []


def plain(config: Any) -> dict[str, Any]:
    """Resolve a composed configuration into plain values."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def from_hydra(config: Any, job: Job) -> RunConfig:
    """Build the configuration of the job that Hydra is running.

    Args:
        config: the ``DictConfig`` of ``hydra.main``'s task function.
        job: the job that Hydra is running.

    Raises:
        ConfigError: with every wrong value.
    """
    return build(plain(config), job.choices, list(job.overrides))


def build(values: dict[str, Any], choices: Choices, overrides: Sequence[str]) -> RunConfig:
    """Turn composed values into the one frozen configuration.

    Args:
        values: the composed configuration as plain values.
        choices: the file chosen in each group, to name where a wrong value was written.
        overrides: what the command line said.

    Raises:
        ConfigError: with every wrong value, its path, and its origin; for code that ships with weights, which a file
            may not allow.
    """
    values = with_method_settings(with_local_models(_opened(values, RunConfig, "")), overrides)
    if others := options_of_another_stage(choices, overrides):
        values["stage"] = {key: value for key, value in values["stage"].items() if key not in others}
    try:
        # JSON is the mode in which pydantic is strict about types and yet takes a list for a tuple.
        cfg = RunConfig.model_validate_json(json.dumps(values, ensure_ascii=False))
    except ValidationError as error:
        raise ConfigError(_problems(error, values, choices, overrides)) from None
    if cfg.model.trust_remote_code and not safety.consents(
        [*overrides, *(job.overrides if (job := current_job()) else ())]
    ):
        text = (
            f"true runs Python code that ships with the weights; if you trust it, add {safety.REMOTE_CODE}=true to the "
        )
        text += "command. A file alone cannot allow it"
        raise ConfigError([Problem(safety.REMOTE_CODE, text, origin_of(safety.REMOTE_CODE, choices, overrides))])
    return cfg


def _opened(values: Any, annotation: Any, path: str) -> Any:
    """Values with lists and maps in place of the texts that stand for them; see `quoting`.

    Raises:
        ConfigError: for a text that is no list or map.
    """
    if isinstance(values, str) and takes_any_key(annotation) and quoting.is_bracketed(values):
        try:
            return quoting.read(values)
        except ValueError as error:
            raise ConfigError([Problem(path, str(error))]) from None
    if not isinstance(values, dict):
        return values
    names, entry = fields_below(annotation), _entry(annotation)
    below = {name: entry if names is None else names.get(name) for name in values}
    return {name: _opened(value, below[name], f"{path}.{name}".lstrip(".")) for name, value in values.items()}


def refused(error: Exception) -> ConfigError:
    """Turn an error of Hydra's or YAML's into one of ours, without Hydra's advice to append keys."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return ConfigError([Problem(f"{mark.name}, line {mark.line + 1}", f"not valid YAML: {error.problem}")])
    lines = [line for line in str(error).splitlines() if line and "HYDRA_FULL_ERROR" not in line]
    advice = ("To append to your config", "object_type=", "reference_type=")
    text = "; ".join(line.strip() for line in lines if not line.strip().startswith(advice))
    launcher = re.search(
        r"Could not find 'hydra/launcher/([^']+)'; Available options in 'hydra/launcher':(.*); Config", text
    )
    if launcher:
        here = ", ".join(name.strip() for name in launcher[2].split(";") if name.strip())
        text = (
            f"no '{launcher[1]}' is installed, only {here}. pip install 'finsa[launchers]' or 'finsa[ray]' brings more"
        )
        return ConfigError([Problem("hydra/launcher", text, "command line")])
    listed = re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'; 1\. To use it as a list", text)
    if listed:
        return ConfigError([several(listed[1], listed[2])])
    asked = re.search(r"Unsupported interpolation type (\S+); full_key: ([^;\s]+)", text)
    if asked:
        return ConfigError(
            [Problem(asked[2], f"{asked[1]} is not allowed in a configuration: {safety.WHY_NO_RESOLVER}")]
        )
    key = re.match(r"Could not override '([^'@]+)'", text)
    if key:
        within = re.search(r"full_key: (\S+)", str(error.__cause__))  # a map may hold the unknown key
        path = within[1] if within else key[1]
        section = path.rpartition(".")[0] or "the configuration"
        text = f"cannot be set: with these choices {section} has no such key; choose a file of its group that has it"
        return ConfigError([unknown_key(path) or Problem(path, text, "command line")])
    absent = re.match(r"Could not delete from config\. '([^']+)' does not exist", text)
    if absent:
        return ConfigError([Problem(f"~{absent[1]}", "there is no such entry to remove", "command line")])
    other_kind = re.match(r"Error merging override ([^=\s]+)=", text)
    if other_kind and error.__cause__ and "Cannot merge" in str(error.__cause__):
        text = "a list and a map do not replace each other on the command line; write it into a file of conf/, or "
        text += "choose one that says nothing about it, such as data=table"
        return ConfigError([Problem(other_kind[1], text, "command line")])
    cause = f" ({str(error.__cause__).splitlines()[0]})" if error.__cause__ else ""
    return ConfigError([Problem("configuration", text + cause)])


def several(key: str, values: str) -> Problem:
    """Values with commas between them, without the flag of a sweep: what each reading of them is written as."""
    ways = [f"for a sweep, write -m {quoting.for_shell(f'{key}={values}')}"]
    kind = kind_of(key)
    if tuple in [typing.get_origin(part) for part in typing.get_args(kind)] and "[" not in values:
        ways.append(f"for a list, {quoting.for_shell(f'{key}=[{values}]')}")
    elif str in (kind, *typing.get_args(kind)):
        ways.append(f"for one text with a comma, {quoting.for_shell(f'{key}={quoting.quoted(values)}')}")
    return Problem(key, f"{values} is more than one value; {'; '.join(ways)}", "command line")


# ------------------------------------------------------------------------------------------------ known keys


def unknown_key(key: str) -> Problem | None:
    """Walk a dotted key through the types.

    Returns:
        None where it is known, or lies below a mapping, which takes any key.
    """
    unknown = _unknown_part(key)
    if unknown is None:
        return None
    near = nearest_key(key)
    hint = f"Did you mean '{near}'?" if near else suggest(*unknown)
    return Problem(key, f"unknown key. {hint}".strip(), "command line")


def nearest_key(key: str) -> str | None:
    """The key that was probably meant: the key itself where it is known; None where none is near."""
    unknown = _unknown_part(key)
    if unknown is None:
        return key
    part, names = unknown
    parts = key.split(".")
    depth = parts.index(part)
    near = nearest(part, names)
    return ".".join([*parts[:depth], near]) if near else _anywhere(part, exactly=depth > 0)


def _unknown_part(key: str) -> tuple[str, dict[str, Any]] | None:
    """The first part of a dotted key that is unknown, and the names that are known at its place."""
    known: Any = RunConfig
    for part in key.split("."):
        names = fields_below(known)
        if names is None:
            known = _mapped(known)
            if known is None:
                return None
            continue
        if part not in names:
            return part, names
        known = names[part]
    return None


def _mapped(annotation: Any) -> Any:
    """The section that every entry of a mapping is; None where entries are plain values."""
    value = _entry(annotation)
    return value if isinstance(value, type) and issubclass(value, BaseModel) else None


def _entry(annotation: Any) -> Any:
    """What every entry of a mapping is; None where there is no mapping."""
    return next(filter(None, map(_entry_of, [annotation, *typing.get_args(annotation)])), None)


def _entry_of(part: Any) -> Any:
    return typing.get_args(part)[1] if typing.get_origin(part) is dict else None


def below_mapping(key: str) -> bool:
    """Whether a key lies below a mapping, where any key may be added."""
    parts = key.split(".")
    return any(fields_below(kind_of(".".join(parts[:depth]))) is None for depth in range(1, len(parts)))


def kind_of(key: str) -> Any:
    """The annotation of a key's values; None where there is no such key."""
    known: Any = RunConfig
    for part in key.split("."):
        names = fields_below(known)
        known = Any if known is Any else _entry(known) if names is None else names.get(part)
    return known


def takes_any_key(annotation: Any) -> bool:
    """Whether values may be maps whose keys are the user's words, rather than those of a section or of a few."""
    maps = [typing.get_args(part)[0] for part in [annotation, *typing.get_args(annotation)] if _entry_of(part)]
    return annotation is Any or any(typing.get_origin(key) is not typing.Literal for key in maps)


def replaces(annotation: Any) -> bool:
    """Whether a map replaces the one in ``conf/``, as a list does, rather than adding to it: labels and their names."""
    entry = _entry(annotation)
    return takes_any_key(annotation) and (entry is str or typing.get_args(entry)[:1] == (str,))


def fields_below(annotation: Any) -> dict[str, Any] | None:
    """Fields below an annotation; {} for a leaf, None where any key goes (a mapping)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    origin = typing.get_origin(annotation)
    if origin is dict:
        return None
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        parts = [fields_below(part) for part in typing.get_args(annotation) if part is not types.NoneType]
        if any(part is None for part in parts):
            return None
        return {name: field for part in parts for name, field in (part or {}).items()}
    return {}


def _anywhere(name: str, exactly: bool) -> str | None:
    """The full path of a key that the user wrote without its section (``learning_rate``), or in another one."""
    full = {
        field: f"{section}.{field}"
        for section, annotation in reversed((fields_below(RunConfig) or {}).items())
        for field in fields_below(annotation) or {}
    }
    found = (name if name in full else None) if exactly else nearest(name, full)
    return full[found] if found else None


# ------------------------------------------------------------------------------------------------ wrong values


def _problems(
    error: ValidationError, values: dict[str, Any], choices: Choices, overrides: Sequence[str]
) -> Iterator[Problem]:
    found: dict[str, Problem] = {}
    faults: dict[str, list[Any]] = {}
    for fault in error.errors(include_url=False):
        # A union's location carries the branch's name; only what is a key of the values belongs to the path.
        path = _path(fault["loc"], values)
        faults.setdefault(path, []).append(fault)
    for path, own in faults.items():
        origin = origin_of(path, choices, overrides) if path else ""
        found[path] = Problem(path or "configuration", _words(own) or _describe(own[0], path), origin)
    # A union whose one branch fits but for an entry also complains about its other branches, at a shorter path.
    yield from (problem for path, problem in found.items() if not any(other.startswith(f"{path}.") for other in found))


def _path(location: Iterable[Any], values: Any) -> str:
    """Dotted path of a fault: the steps of its location that are keys, present or at least known."""
    parts: list[str] = []
    steps = list(location)
    for at, step in enumerate(steps):
        if _has(values, step):
            values = values[step]
        elif at + 1 < len(steps) and _has(values, steps[at + 1]):
            continue  # a branch may be called as a key that another branch has
        elif not parts or not isinstance(values, dict) or unknown_key(".".join([*parts, str(step)])):
            continue
        parts.append(str(step))
    return ".".join(parts)


def _has(values: Any, step: Any) -> bool:
    if isinstance(values, list):
        return isinstance(step, int) and step < len(values)
    return isinstance(values, dict) and step in values


def _words(faults: list[Any]) -> str | None:
    """What is wrong with a word where a few words, and true and false or a number, would be right; None elsewhere."""
    literal = next((fault for fault in faults if fault["type"] == "literal_error"), None)
    if literal is None or len(faults) == 1 or not isinstance(literal["input"], str):
        return None
    kinds = {fault["type"].partition("_")[0] for fault in faults}
    allowed = [*_expected(literal), *(["true", "false"] if "bool" in kinds else [])]
    number = " A number is right as well" if kinds & {"int", "float"} else ""
    return f"there is no {literal['input']!r}. {suggest(literal['input'], allowed)}{number}"


def _expected(fault: Any) -> list[str]:
    return [part.strip().strip("'") for part in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _describe(fault: Any, path: str) -> str:
    kind, given = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        unknown = unknown_key(path)
        return unknown.text if unknown else f"unknown key in {path.rpartition('.')[0] or 'the configuration'}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        section, _, key = path.rpartition(".")
        place = f" A folder goes into {section}.path" if key == "weights" and "/" in str(given) else ""
        return f"there is no {given!r}. {suggest(str(given), _expected(fault))}{place}"
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, not {_shown(given)}"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False)
    kind = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({kind.get(type(value).__name__, type(value).__name__)})"
