"""Compose ``conf/`` into the configuration of a run, and report every wrong value with the place it was written in."""

from __future__ import annotations

import copy
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from finsa.config import catalogue, quoting, safety
from finsa.config.base import headline, locate
from finsa.config.catalogue import Files, Folders, origin_of
from finsa.config.keys import entry_of, fields_of, kind_of, takes_any_key, unknown_key
from finsa.config.run import RunConfig
from finsa.errors import ConfigError, Problem, suggest
from finsa.session import Job, current_job

REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # of Hydra and YAML; see `refused`


# Unresolved configurations and their chosen files, by what they were composed of: folders and choices.
Compositions = dict[tuple[object, ...], tuple[Any, Files]]


def compose_values(
    overrides: Sequence[str], folders: Folders = (), compositions: Compositions | None = None
) -> tuple[dict[str, Any], Files]:
    """Compose ``conf/`` and the folders of ``--config-dir`` with overrides.

    Args:
        overrides: words such as ``method=lora`` or ``train.epochs=3``.
        folders: added with ``--config-dir``.
        compositions: those made so far; a new one is added. Hydra takes a tenth of a second to read and merge files, so
            configurations with the same files, such as the jobs of a sweep over seeds, share a composition.

    Returns:
        The values, and the chosen file of each group.

    Raises:
        ConfigError: for what Hydra itself refuses.
    """
    if compositions is not None:
        try:
            choices, values = _choices_and_values(overrides)
            key = (catalogue.CONF, folders, choices)
            if key not in compositions:
                compositions[key] = _compose(choices, folders)
            composed, files = copy.deepcopy(compositions[key])
            for override in values:  # as Hydra sets them
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
            safety.require_no_code(OmegaConf.to_container(composed, resolve=False))
            return _plain(composed), files
        except (ConfigError, *REFUSALS):
            pass  # Hydra composes other kinds of overrides, and reports what is wrong
    try:
        composed, files = _compose(overrides, folders)
        return _plain(composed), files
    except REFUSALS as error:
        raise refused(error) from None


def _compose(overrides: Sequence[str], folders: Folders) -> tuple[Any, Files]:
    """Compose a ``DictConfig`` without Hydra's section."""
    search_path = [f"hydra.searchpath=[{','.join(repr(f'file://{folder}') for folder in folders)}]"] if folders else []
    running = GlobalHydra.instance()
    outer, running.hydra = running.hydra, None  # a running job may compose the configuration of another one
    try:
        with initialize_config_dir(str(catalogue.CONF), version_base="1.3"):
            composed = compose("config", [*overrides, *search_path], return_hydra_config=True)
    finally:
        running.hydra = outer
    files = _chosen_files(composed.hydra.runtime.choices, folders)
    safety.require_no_code(OmegaConf.to_container(composed, resolve=False))
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    OmegaConf.set_struct(composed, True)
    return composed, files


def _choices_and_values(overrides: Sequence[str]) -> tuple[tuple[str, ...], list[Override]]:
    """Separate choices of files from values of keys.

    Raises:
        HydraException: for other kinds of overrides.
    """
    choices, values = list[str](), list[Override]()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.get_key_element()  # with +, ~ and @
        if key in catalogue.groups():
            choices.append(str(override.input_line))
        elif key.split(".")[0] in RunConfig.model_fields and "@" not in key and not override.is_sweep_override():
            values.append(override)
        else:
            raise HydraException(f"{override.input_line} is neither a choice nor a value")
    return tuple(choices), values


def from_hydra(config: Any, job: Job) -> RunConfig:
    """Build the configuration of the job that Hydra is running.

    Args:
        config: the ``DictConfig`` that ``hydra.main`` passes to the task function.
        job: the job that Hydra is running.

    Raises:
        ConfigError: with every wrong value.
    """
    return build(_plain(config), _chosen_files(job.choices, job.folders), list(job.overrides))


def build(values: dict[str, Any], files: Files, overrides: Sequence[str]) -> RunConfig:
    """Validate composed values and freeze them.

    Args:
        values: the composed configuration as plain values.
        files: the chosen file of each group, to report where a wrong value was written.
        overrides: those of the command line.

    Raises:
        ConfigError: with every wrong value, its path, and its origin; for code that ships with weights, which a file
            may not allow.
    """
    values = _with_method_settings(_with_local_weights(_parsed(values, RunConfig, "")), overrides)
    values = _with_line_breaks(values, overrides)
    if isinstance(values["train"], dict) and isinstance(values["data"], dict) and not values["train"].get("select_by"):
        values["train"] = {**values["train"], "select_by": headline(str(values["data"].get("task")))}
    # An experiment's options of its own stage do not apply if the command has chosen another stage.
    known = catalogue.read(files.get("stage"))
    given = [f"{text.lstrip('+').split('=', 1)[0]}." for text in overrides]
    for key in catalogue.read(files.get("experiment")).get("stage") or ():
        if key not in known and not any(one.startswith(f"stage.{key}.") for one in given):
            values["stage"] = {name: value for name, value in values["stage"].items() if name != key}
    try:
        # From JSON, pydantic is strict about types and yet accepts a list for a tuple.
        cfg = RunConfig.model_validate_json(json.dumps(values, ensure_ascii=False))
    except ValidationError as error:
        raise ConfigError(_problems(error, values, files, overrides)) from None
    job = current_job()
    if cfg.model.trust_remote_code and not safety.consents([*overrides, *(job.overrides if job else ())]):
        text = (
            f"true runs Python code that ships with the weights; if you trust it, add {safety.REMOTE_CODE}=true to the "
            "command. A file alone cannot allow it"
        )
        raise ConfigError([Problem(safety.REMOTE_CODE, text, origin_of(safety.REMOTE_CODE, files, overrides))])
    return cfg


def _plain(config: Any) -> dict[str, Any]:
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def _chosen_files(choices: Mapping[str, str | None], folders: Folders) -> Files:
    return {
        group: catalogue.file_of(group, choice, folders)
        for group, choice in choices.items()
        if choice is not None and group in catalogue.groups()
    }


def _parsed(values: Any, annotation: Any, path: str) -> Any:
    """Replace texts that stand for a list or a map; see `quoting`.

    Raises:
        ConfigError: for a text that cannot be parsed.
    """
    if isinstance(values, str) and takes_any_key(annotation) and quoting.is_bracketed(values):
        try:
            return quoting.parse(values)
        except ValueError as error:
            raise ConfigError([Problem(path, str(error))]) from None
    if not isinstance(values, dict):
        return values
    fields, entry = fields_of(annotation), entry_of(annotation)
    return {
        name: _parsed(value, entry if fields is None else fields.get(name), f"{path}.{name}".lstrip("."))
        for name, value in values.items()
    }


def _with_local_weights(values: dict[str, Any]) -> dict[str, Any]:
    """Set the path of the model, or of a baseline's encoder, if its repository has a folder below ``models``."""
    if not isinstance(values.get("models"), str):
        return values
    files = locate(values["models"]).glob("*/origin.json")  # none if the folder is missing, which is reported later
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


def _with_method_settings(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set the values that ``per_method`` has for the chosen method, except those that the command sets.

    Raises:
        ConfigError: for a key below one that is not a section.
    """
    settings, method = values.get("per_method"), values["method"]["name"]
    if not isinstance(settings, dict) or not isinstance(settings.get(method, {}), dict):
        return values  # a wrong type is reported together with the other wrong values
    given = {override.partition("=")[0] for override in overrides}
    values = copy.deepcopy(values | {"per_method": None})
    for key, value in settings.get(method, {}).items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError([Problem(f"per_method.{method}", f"{key} is not a key; {parent} is not a section")])
        if key not in given:
            section[last] = value
    return values


def _with_line_breaks(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    r"""Read ``\n`` and ``\t`` in prompts that the command sets as a line break and a tab, as YAML does in files."""
    values = copy.deepcopy(values)
    for override in overrides:
        *parents, last = override.partition("=")[0].lstrip("+").split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if parents[:1] != ["data"] or last not in ("prompt", "answers") or not isinstance(section, dict):
            continue
        written = section.get(last)
        if isinstance(written, str):
            section[last] = written.replace("\\n", "\n").replace("\\t", "\t")
        elif isinstance(written, list):
            section[last] = [str(one).replace("\\n", "\n").replace("\\t", "\t") for one in written]
    return values


# ------------------------------------------------------------------------------------------------ refused by Hydra


def refused(error: Exception) -> ConfigError:
    """Turn an error of Hydra or YAML into one of ours, without Hydra's advice to append keys."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return ConfigError([Problem(f"{mark.name}, line {mark.line + 1}", f"not valid YAML: {error.problem}")])
    advice = ("To append to your config", "object_type=", "reference_type=")
    lines = [line.strip() for line in str(error).splitlines() if line and "HYDRA_FULL_ERROR" not in line]
    text = "; ".join(line for line in lines if not line.startswith(advice))
    return ConfigError([_refusal(text, str(error.__cause__ or ""))])


def _refusal(text: str, cause: str) -> Problem:
    """The problem that Hydra reports with a text and with the text of the error that caused it."""
    launcher = re.search(
        r"Could not find 'hydra/launcher/([^']+)'; Available options in 'hydra/launcher':(.*); Config", text
    )
    if launcher:
        installed = ", ".join(name.strip() for name in launcher[2].split(";") if name.strip())
        hint = f"'{launcher[1]}' is not installed, only {installed}. Install more: pip install 'finsa[launchers]' or "
        return Problem("hydra/launcher", f"{hint}'finsa[ray]'", "command line")
    several = re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'; 1\. To use it as a list", text)
    if several:
        return several_values(several[1], several[2])
    resolver = re.search(r"Unsupported interpolation type (\S+); full_key: ([^;\s]+)", text)
    if resolver:
        hint = f"{resolver[1]} is not allowed in a configuration: {safety.WHY_NO_RESOLVER}"
        return Problem(resolver[2], hint)
    key = re.match(r"Could not override '([^'@]+)'", text)
    if key:
        within = re.search(r"full_key: (\S+)", cause)  # the unknown key may be in a map
        path = within[1] if within else key[1]
        section = path.rpartition(".")[0] or "the configuration"
        hint = f"cannot be set: with these choices {section} has no such key; choose a file of its group that has it"
        return unknown_key(path) or Problem(path, hint, "command line")
    absent = re.match(r"Could not delete from config\. '([^']+)' does not exist", text)
    if absent:
        return Problem(f"~{absent[1]}", "there is no such entry to remove", "command line")
    merged = re.match(r"Error merging override ([^=\s]+)=", text)
    if merged and "Cannot merge" in cause:
        hint = (
            "a list cannot replace a map on the command line, nor a map a list; write it into a file of conf/, or "
            "choose a file that does not set it, such as data=table"
        )
        return Problem(merged[1], hint, "command line")
    return Problem("configuration", f"{text} ({cause.splitlines()[0]})" if cause else text)


def several_values(key: str, values: str) -> Problem:
    """The problem with comma-separated values in a command without ``-m``, with the ways to write what was meant."""
    ways = [f"for a sweep, write -m {quoting.for_shell(f'{key}={values}')}"]
    kind = kind_of(key)
    if tuple in [typing.get_origin(part) for part in typing.get_args(kind)] and "[" not in values:
        ways.append(f"for a list, {quoting.for_shell(f'{key}=[{values}]')}")
    elif str in (kind, *typing.get_args(kind)):
        ways.append(f"for one text with a comma, {quoting.for_shell(f'{key}={quoting.quoted(values)}')}")
    return Problem(key, f"{values} is more than one value; {'; '.join(ways)}", "command line")


# ------------------------------------------------------------------------------------------------ wrong values


def _problems(
    error: ValidationError, values: dict[str, Any], files: Files, overrides: Sequence[str]
) -> Iterator[Problem]:
    faults: dict[str, list[Any]] = {}
    for fault in error.errors(include_url=False):
        faults.setdefault(_path(fault["loc"], values), []).append(fault)
    for path, of_path in faults.items():
        # A union with a branch that fits except for an entry also reports its other branches, at a shorter path.
        if not any(other.startswith(f"{path}.") for other in faults):
            origin = origin_of(path, files, overrides) if path else ""
            yield Problem(path or "configuration", _wrong_word(of_path) or _describe(of_path[0], path), origin)


def _path(location: Iterable[Any], values: Any) -> str:
    """Dotted path of a fault: the steps of its location that are keys, and not names of a union's branches."""
    parts: list[str] = []
    steps = list(location)
    for at, step in enumerate(steps):
        if _has(values, step):
            values = values[step]
        elif at + 1 < len(steps) and _has(values, steps[at + 1]):
            continue  # a branch may have the name of a key of another branch
        elif not parts or not isinstance(values, dict) or unknown_key(".".join([*parts, str(step)])):
            continue
        parts.append(str(step))
    return ".".join(parts)


def _has(values: Any, step: Any) -> bool:
    if isinstance(values, list):
        return isinstance(step, int) and step < len(values)
    return isinstance(values, dict) and step in values


def _wrong_word(faults: list[Any]) -> str | None:
    """What is wrong with a word if only some words, or values of another type, are allowed; None for other faults."""
    literal = next((fault for fault in faults if fault["type"] == "literal_error"), None)
    if literal is None or len(faults) == 1 or not isinstance(literal["input"], str):
        return None
    kinds = {fault["type"].partition("_")[0] for fault in faults}
    allowed = [*_expected(literal), *(["true", "false"] if "bool" in kinds else [])]
    number = " A number is also allowed" if kinds & {"int", "float"} else ""
    return f"there is no {literal['input']!r}. {suggest(literal['input'], allowed)}{number}"


def _expected(fault: Any) -> list[str]:
    return [part.strip().strip("'") for part in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _describe(fault: Any, path: str) -> str:
    kind, given = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        unknown = unknown_key(path)
        return unknown.text if unknown else f"unknown key in {path.rpartition('.')[0] or 'the configuration'}"
    if kind == "missing":
        last = fault["loc"][-1]
        return f"has too few values, {last}; it needs {last + 1} or more" if isinstance(last, int) else "is missing"
    if kind == "literal_error":
        section, _, key = path.rpartition(".")
        place = f" A folder goes into {section}.path" if key == "weights" and "/" in str(given) else ""
        return f"there is no {given!r}. {suggest(str(given), _expected(fault))}{place}"
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    shown = "null"
    if given is not None:
        text = json.dumps(given, ensure_ascii=False)
        kinds = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
        type_name = type(given).__name__
        shown = f"{text[:60]}{'…' if len(text) > 60 else ''} ({kinds.get(type_name, type_name)})"
    return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, not {shown}"
