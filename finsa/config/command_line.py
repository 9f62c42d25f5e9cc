"""Check a command line before anything heavy is imported.

Hydra alone would stop at its first complaint, accept a misspelt key behind ``+``, and know no types. Here every problem
of the whole command, each job of a sweep included, is found and reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from finsa.config import RunConfig, compose, locate, quoting
from finsa.config.catalogue import REPOSITORY, of_hub
from finsa.config.compose import (
    add_folder,
    below_mapping,
    build,
    choices_of,
    compose_values,
    experiment,
    groups,
    kind_of,
    nearest_key,
    replaces,
    several,
    takes_any_key,
    unknown_key,
)
from finsa.errors import ConfigError, Problem, nearest, plainly, suggest

MAX_CHECKED_JOBS = 64
# Flags that are taken: Hydra's, and finsa's --debug. `safety` says of some others why they are not.
FLAGS = (
    *("-m", "--multirun", "--config-dir", "-cd", "--debug", "--help", "-h", "--hydra-help", "--version", "--cfg", "-c"),
    *("--resolve", "--package", "-p", "--info", "-i", "--shell-completion", "-sc", "--run", "-r"),
)
# Sections of Hydra's configuration that exist and that finsa does not use.
_OF_HYDRA = (
    *("run", "sweep", "job", "mode", "searchpath", "output_subdir", "verbose", "runtime", "env", "output"),
    *("help", "hydra_help", "job_logging", "hydra_logging"),
)
# What a table is described by in training, and what says the same of the file that stage=predict reads.
_OF_INPUT = {"data.columns.text": "stage.text_column", "data.files": "input"}
SWEPT = ("train", "check")  # stages that an experiment's own sweep is meant for


def check(overrides: Sequence[str], sweep: bool = True) -> list[RunConfig]:
    """Check a command's overrides, sweeps included, without running anything.

    Args:
        overrides: arguments such as ``method=lora`` or ``train.epochs=3,5``.
        sweep: whether the command has ``-m``; without, a key has one value.

    Returns:
        The configuration of each job.

    Raises:
        ConfigError: with every problem found.
    """
    parsed, problems = _parse([quote(text) for text in overrides])
    problems += _twice(parsed)
    sound = []
    for override in parsed:
        found = list(_check_override(override))
        if not found and not sweep and override.is_discrete_sweep() and not isinstance(override.value(), Glob):
            values = [getattr(value, "text", value) for value in override.sweep_iterator()]
            found = [several(override.key_or_group, ",".join(map(str, values)))]
        problems += found
        if not found:
            sound.append(override)
    problems += _against_run(sound)
    configurations = list[RunConfig]()
    for job in _jobs(sound):
        checked = _check_job(tuple(job), compose.CONF)
        if isinstance(checked, RunConfig):
            configurations.append(checked)
        else:
            problems += checked
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return configurations


def require_words(words: Sequence[str]) -> None:
    """Refuse words that are neither ``key=value`` nor a flag, with the words that were probably meant.

    Args:
        words: the command line without the program.

    Raises:
        ConfigError: with each of them.
    """
    problems, rest = list[Problem](), list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and word.partition("=")[0] not in FLAGS:
            takes_next = "=" not in word and bool(rest) and "=" not in rest[0] and not rest[0].startswith("--")
            problems.append(_no_flag(word, rest.pop(0) if takes_next else None))
        elif word.startswith("-"):
            if "=" in word and word.partition("=")[0] in ("-m", "--multirun"):
                problems.append(Problem(word, f"takes no value; write -m {word.partition('=')[2]}", "command line"))
        elif "=" not in word and "＝" not in word:
            following = rest[0] if rest else ""
            taken = word in groups() and (following == "=" or following in choices_of(word))
            choice = rest.pop(1 if following == "=" else 0) if taken and len(rest) > (following == "=") else None
            if choice is not None and following == "=":
                rest.pop(0)
            problems.append(_no_pair(word, choice))
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _no_flag(word: str, following: str | None) -> Problem:
    """A flag of other programs; most are meant as a key: ``--epochs 3``."""
    flag, _, value = word.partition("=")
    name = flag.strip("-").replace("-", "_")
    key = name if name in groups() else nearest_key(name)
    value = value or following or "<value>"
    near = nearest(name, [known.strip("-") for known in FLAGS if known.startswith("--")])
    if key and (name == key or near is None):
        return Problem(flag, f"is no flag of finsa; values are set by key: write {key}={value}", "command line")
    hint = f"Did you mean '--{near}'?" if near else "python run.py --help shows them all"
    return Problem(flag, f"is no flag of finsa. {hint}", "command line")


def _no_pair(word: str, choice: str | None) -> Problem:
    """A word without ``=``: a choice without its group, a key without its value, a part of a text with blanks."""
    key, colon, value = word.partition(":")
    groups_of = [group for group in ("stage", *groups()) if word in choices_of(group)]
    if choice is not None:
        written = f"write {word}={choice}"
    elif word in ("help", "version"):
        written = f"write --{word}"
    elif groups_of:
        written = f"write {groups_of[0]}={word}"
    elif colon and (key in groups() or unknown_key(key) is None):
        written = f"write {key}={value}"
    elif word in groups() or unknown_key(word) is None:
        written = f"write {word}=<value>"
    else:
        near = nearest(word, choices_of("stage"))
        written = f"write stage={near}" if near else "a value with blanks needs quotes, as in text='two words'"
    return Problem(word, f"is not of the form key=value; {written}", "command line")


def expand(words: Sequence[str]) -> list[str]:
    """Add an experiment's own sweep to a command, but for what the command sets itself.

    ``experiment=aidf_ablation`` runs all arms, ``experiment=aidf_ablation method=lora`` this one.

    Args:
        words: the command line without the program, flags included.

    Returns:
        The same, or with ``-m`` in front and the sweep's axes behind.
    """
    given = dict(word.partition("=")[::2] for word in words if "=" in word and not word.startswith("-"))
    if given.get("stage", "train") not in SWEPT or given.get("experiment") not in choices_of("experiment"):
        return list(words)
    sweep = experiment(given["experiment"]).get("sweep") or {}
    axes = [f"{key}={','.join(map(str, values))}" for key, values in sweep.items() if key not in given]
    flag = ["-m"] if axes and not {"-m", "--multirun"} & set(words) else []
    return [*flag, *words, *axes]


def own_folder(words: Sequence[str]) -> list[str]:
    """Add the folder that ``--config-dir`` names to where choices are looked for, beside ``conf/``.

    Args:
        words: the command line without the program.

    Returns:
        The same, with flag and folder as one word.

    Raises:
        ConfigError: where there is no such folder.
    """
    found, rest = [], iter(words)
    for word in rest:
        flag, _, folder = word.partition("=")
        if flag not in ("--config-dir", "-cd"):
            found.append(word)
            continue
        path = Path(folder or next(rest, ""))
        if not path.is_dir() or path == Path():
            text = f"no such folder: {path}. It holds files as conf/ does, such as {path / 'data' / 'mine.yaml'}"
            raise ConfigError([Problem("--config-dir", text, "command line")])
        add_folder(path)
        found.append(f"--config-dir={path.absolute()}")
    return found


def quote(word: str) -> str:
    """Quote what Hydra's grammar takes in quotes only: Chinese words, and whole maps whose keys are the user's words.

    ``data.labels=[利空,利好]``, ``data.labels={利好: 正面, 利空: 负面}`` and sweeps over such need no quotes then.
    """
    key, sign, value = word.partition("=")
    if key == "text" and sign:  # any characters at all
        return word if re.fullmatch("'.*'", value, re.DOTALL) else f"text={quoting.quoted(value)}"
    kind = kind_of(key.lstrip("+~"))
    if not sign or (value.isascii() and not replaces(kind)):
        return word
    choice = re.fullmatch(r"choice\((.*)\)", value, re.DOTALL)  # Hydra loses the quotes within; a,b is the same
    pieces = quoting.split(choice[1] if choice else value, ",")
    try:
        return f"{key}={','.join(_quote(piece, kind) for piece in pieces)}"
    except ValueError as error:
        raise ConfigError([Problem(key, str(error), "command line")]) from None


def _quote(value: str, kind: Any) -> str:
    """One value of a sweep, or the only one."""
    if quoting.is_bracketed(value) and kind not in (str, str | None):
        if replaces(kind) or (takes_any_key(kind) and not value.isascii()):
            quoting.read(value)  # refuses what is no list or map
            return quoting.quoted(value.strip())
        return quoting.for_hydra(value)
    return value if value.isascii() or quoting.is_quoted(value) else quoting.quoted(value)


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException:
            problems.append(_unreadable(text))
    return parsed, problems


def _unreadable(text: str) -> Problem:
    """Why a word cannot be read, and how it is written."""
    key, sign, value = text.partition("=")
    if not sign and "＝" in text:
        return Problem(text, f"has a full-width ＝; write {text.replace('＝', '=', 1)}", "command line")
    if not sign:
        return _no_pair(text, None)
    if sign and not key.isascii():
        return _unreadable_key(key, value)
    written = f"{key}={quoting.quoted(value)}"
    return Problem(key, f"the value cannot be read; put it in quotes: {quoting.for_shell(written)}", "command line")


def _unreadable_key(key: str, value: str) -> Problem:
    """A key with letters that no key has: some only look like the right ones, others are words of the user's map."""
    name, plain = key.lstrip("+~"), plainly(key).lstrip("+~")
    section, _, word = name.rpartition(".")
    if section.isascii() and takes_any_key(kind_of(section)):
        written = quoting.for_shell(f"{section}={{{word}: {value.strip(chr(39))}}}")
        return Problem(key, f"words of your own are written as a map: {written}", "command line")
    known = None if plain in groups() else unknown_key(plain)
    if known is None:
        return Problem(key, f"has letters that only look like those of a key. Did you mean '{plain}'?", "command line")
    return Problem(key, f"has letters that no key has. {known.text}", "command line")


def _twice(overrides: Sequence[Override]) -> Iterator[Problem]:
    """What is said twice: the later word would win without a sound."""
    seen: dict[str, str] = {}
    for override in overrides:
        key, text = override.get_key_element().lstrip("+~"), str(override.input_line)
        if seen.setdefault(key, text) is not text:
            yield Problem(key, f"is given twice, {seen[key]} and {text}; keep one", "command line")


def _check_override(override: Override) -> Iterator[Problem]:
    key, text = override.key_or_group, str(override.input_line)
    if key.split(".")[0].split("/")[0] == "hydra":
        yield from _check_hydra(key, str(override.get_value_element_as_str()))  # its own refusals come with composing
        return
    if override.is_delete() and below_mapping(key):  # an entry of a mapping; Hydra refuses one that is not there
        yield from filter(None, [unknown_key(key)])
    elif override.is_delete():
        yield Problem(text, f"nothing can be removed; set a value instead, such as {key}=null", "command line")
    elif key in groups():
        yield from _check_choice(override)
    else:
        unknown = unknown_key(key)
        if unknown:
            yield unknown
        elif override.is_add() and not override.is_force_add() and not below_mapping(key):
            yield Problem(key, f"is there already; write {text.lstrip('+')} without the +", "command line")


def _check_hydra(key: str, value: str) -> Iterator[Problem]:
    """Refuse keys of Hydra's own section that finsa does not use: they would be ignored, or lose a sweep's report."""
    if re.match(r"hydra[/.](launcher|sweeper)\b|hydra\.sweep\.dir$|hydra\.job\.env_|hydra\.callbacks\b", key):
        return
    if key == "hydra" or not re.match(rf"hydra[/.]({'|'.join(_OF_HYDRA)})\b", key):
        return  # Hydra knows no such key and says so
    use = {
        "hydra.run.dir": f"runs are made below output_dir: write output_dir={value}",
        "hydra.sweep.subdir": f"jobs are numbered in the sweep's folder, hydra.sweep.dir={value}",
        "hydra.searchpath": "files of your own are added with --config-dir <folder>",
        "hydra.mode": "a sweep is started with -m",
    }.get(key, "of Hydra's keys those of its launcher and sweeper, and hydra.sweep.dir, are used; leave it out")
    yield Problem(key, f"has no effect here; {use}", "command line")


def _check_choice(override: Override) -> Iterator[Problem]:
    group = override.key_or_group
    if override.is_add():
        yield Problem(group, f"is chosen without a +: write {str(override.input_line).lstrip('+')}", "command line")
        return
    if override.package is not None:
        yield Problem(group, f"goes to no other place: write {group}=<name> without @", "command line")
        return
    for value in _values(override):
        if value == "null" and group == "experiment":
            yield Problem(group, "leave it out instead of setting it to null", "command line")
        elif value not in choices_of(group):
            hint = _of_path(group, value) or suggest(value, choices_of(group))
            yield Problem(group, f"there is no '{value}'. {hint}", "command line")


def _of_path(group: str, value: str) -> str | None:
    """What to write for a folder or a name of the hub where the name of a choice belongs; None for anything else."""
    there = locate(value).exists() and not locate(value).is_relative_to(compose.CONF)
    if group == "model" and there:
        return f"For a model in a folder: model=local model.path={value}"
    if group == "model" and "/" in value:
        folder = f"For a folder: model=local model.path={value}"
        return f"For a model of the hub: {of_hub(value)}. {folder}" if REPOSITORY.fullmatch(value) else folder
    if group == "method" and there:
        return f"To train an adapter further: method.adapter.init={value}"
    if group == "data" and there:
        return f"For files of your own: data=table data.files={value}"
    return None


def _values(override: Override) -> list[str]:
    """The choices that an override names: one, a sweep's, or those a glob matches."""
    value = override.value()
    if isinstance(value, Glob):
        return value.filter(list(choices_of(override.key_or_group)))
    if override.is_choice_sweep():
        return [str(name) for name in override.sweep_string_iterator()]
    return [override.get_value_element_as_str()]


def _against_run(overrides: Sequence[Override]) -> Iterator[Problem]:
    """A run folder brings its own model, method and seed; another one beside it would be ignored, so it is refused."""
    if any(override.key_or_group == "run" and override.value() is not None for override in overrides):
        stages = {name for override in overrides if override.key_or_group == "stage" for name in _values(override)}
        own = ("model", "method", "seed", "experiment", *["data"] * bool(stages & {"predict", "export"}))
        for override in overrides:
            if override.key_or_group == "model.trust_remote_code":  # consent, which no run folder can give
                continue
            if override.key_or_group.startswith("data.csv.") and "predict" in stages:  # how the input is written
                continue
            if override.key_or_group.split(".")[0] in own:
                text = "comes from the run folder that run=<folder> names; leave it out"
                key, value = override.key_or_group, override.get_value_element_as_str()
                if "predict" in stages and key in _OF_INPUT:
                    text = f"is the run's own; for the input file write {_OF_INPUT[key]}={value}"
                yield Problem(override.key_or_group, text, "command line")


def _jobs(overrides: Sequence[Override]) -> list[list[str]]:
    """The combinations that a sweep would run, as override lists; of a very large sweep the first ones."""
    axes = []
    for override in overrides:
        line = str(override.input_line)
        if isinstance(override.value(), Glob):
            axes.append([f"{override.key_or_group}={name}" for name in _values(override)])
        elif not override.is_sweep_override():
            axes.append([line])
        elif override.is_discrete_sweep():
            key = line.split("=", 1)[0]
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return [list(job) for job in islice(product(*axes), MAX_CHECKED_JOBS)]


@cache
def _check_job(job: tuple[str, ...], conf: Path) -> RunConfig | list[Problem]:
    try:
        values, choices = compose_values(job)
        return build(values, choices, job)
    except ConfigError as error:
        return error.problems
