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

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from finsa import composition
from finsa.composition import (
    add_folder,
    below_mapping,
    build,
    choices_of,
    compose_values,
    experiment,
    groups,
    unknown_key,
)
from finsa.errors import ConfigError, Problem, plainly, suggest

MAX_CHECKED_JOBS = 64
SWEPT = ("train", "check")  # stages that an experiment's own sweep is meant for
# A word of a list or mapping that has a character outside ASCII.
_CHINESE = re.compile(r"[^\s,\[\]{}:()]*[^\x00-\x7f][^\s,\[\]{}:()]*")


def check(overrides: Sequence[str]) -> None:
    """Check a command's overrides, sweeps included, without running anything.

    Args:
        overrides: arguments such as ``method=lora`` or ``train.epochs=3,5``.

    Raises:
        ConfigError: with every problem found.
    """
    parsed, problems = _parse([quote(text) for text in overrides])
    problems += _twice(parsed)
    sound = []
    for override in parsed:
        found = list(_check_override(override))
        problems += found
        if not found:
            sound.append(override)
    problems += _against_run(sound)
    for job in _jobs(sound):
        problems += _check_job(tuple(job), composition.CONF)
    if problems:
        raise ConfigError(dict.fromkeys(problems))


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
    """Quote Chinese words in a value, which Hydra's grammar takes only in quotes: ``data.labels=[利空,利好]``."""
    key, sign, value = word.partition("=")
    if key == "text" and sign:  # any characters at all
        return word if re.fullmatch("'.*'", value, re.DOTALL) else f"text='{_escaped(value)}'"
    if not sign or value.isascii() or "'" in value or '"' in value:
        return word
    if value[0] not in "[{" and "," not in value:
        return f"{key}='{value}'"
    return key + sign + _CHINESE.sub(lambda found: f"'{found[0]}'", value)


def _escaped(text: str) -> str:
    """A text between Hydra's quotes: a backslash counts there before a quote alone, and ${ asks for another value."""
    quoted = re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", quoted)


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            problems.append(_unreadable(text, str(error).splitlines()[0]))
    return parsed, problems


def _unreadable(text: str, reason: str) -> Problem:
    """Why a word cannot be read; a key whose letters only look like the right ones is told as a key."""
    key, sign, _ = text.partition("=")
    if sign and not key.isascii():
        plain = plainly(key).lstrip("+~")
        known = None if plain in groups() else unknown_key(plain)
        if known is None:
            hint = f"Did you mean '{plain}'?"
            return Problem(key, f"has letters that only look like those of a key. {hint}", "command line")
        return Problem(key, f"has letters that no key has. {known.text}", "command line")
    reason = "quote it: Chinese needs quotes here" if not text.isascii() else reason
    return Problem(text, f"not of the form key=value ({reason})", "command line")


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
        return  # composed with the rest, where Hydra refuses unknown keys and `composition` what would run code
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
            yield Problem(group, f"there is no '{value}'. {suggest(value, choices_of(group))}", "command line")


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
            if override.key_or_group.split(".")[0] in own:
                text = "comes from the run folder that run=<folder> names; leave it out"
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
def _check_job(job: tuple[str, ...], conf: Path) -> list[Problem]:
    try:
        values, choices = compose_values(job)
        build(values, choices, job)
    except ConfigError as error:
        return error.problems
    return []
