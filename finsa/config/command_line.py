"""Check a command line before anything heavy is imported.

Hydra alone would stop at the first problem, accept a misspelt key after ``+``, and know no types. Here all problems of
a command, including those of every job of a sweep, are found and reported together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from finsa.config import catalogue, quoting, safety
from finsa.config.base import locate
from finsa.config.catalogue import REPOSITORY, Folders
from finsa.config.compose import Compositions, build, compose_values, several_values
from finsa.config.keys import below_mapping, kind_of, nearest_key, replaces, takes_any_key, unknown_key
from finsa.config.run import RunConfig
from finsa.errors import ConfigError, Problem, latinize, nearest, suggest

MAX_CHECKED_JOBS = 64
# Flags that are accepted: Hydra's, and --debug. `safety` explains why some others are not.
FLAGS = (
    *("-m", "--multirun", "--config-dir", "-cd", "--debug", "--help", "-h", "--hydra-help", "--version", "--cfg", "-c"),
    *("--resolve", "--package", "-p", "--info", "-i", "--shell-completion", "-sc", "--run", "-r"),
)
# Flags with which Hydra only prints something or reads other files: there is nothing to check first.
_HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
# Sections of Hydra's configuration that exist but are not used by finsa.
_UNUSED_BY_FINSA = (
    *("run", "sweep", "job", "mode", "searchpath", "output_subdir", "verbose", "runtime", "env", "output"),
    *("help", "hydra_help", "job_logging", "hydra_logging"),
)
# Keys that describe the training data, and the keys that describe the input of stage=predict.
_FOR_INPUT = {"data.columns.text": "stage.text_column", "data.files": "input"}
SWEPT = ("train", "check")  # stages that run an experiment's sweep
Choices = Mapping[str, Sequence[str]]


def prepare(
    words: Sequence[str], require: Callable[[list[RunConfig]], None]
) -> tuple[list[str], Folders, list[RunConfig]]:
    """Check a command line before Hydra reads it, so that all of its problems are reported at once.

    Args:
        words: the command line without the program.
        require: refuses configurations for reasons other than their values, such as missing model folders.

    Returns:
        The words as Hydra reads them: flags first, values quoted, sweeps expanded; the folders that ``--config-dir``
        adds to ``conf/``; and the configuration of each job, none for a flag with which Hydra only prints something.

    Raises:
        ConfigError: with all problems.
    """
    words = [quote(word) for word in _flags_first(words)]
    safety.require_plain_command(words)
    words, added = added_folders(words)
    if any(word.split("=")[0] in _HYDRA_FLAGS for word in words):
        return words, added, []
    require_words(words, added)
    words = expand(words, added)
    sweep = bool({"-m", "--multirun"} & set(words))
    jobs = check([word for word in words if not word.startswith("-")], sweep, added)
    require(jobs)
    return defer_to_jobs(words) if sweep else words, added, jobs


def _flags_first(words: Sequence[str]) -> list[str]:
    """Move the flags to the front, wherever they were typed: argparse reads overrides in one block only."""
    flags, rest, after = list[str](), list[str](), False
    for word in words:
        (flags if after or word.startswith("-") else rest).append(word)
        after = word in ("--cfg", "-c", "--config-dir", "-cd", "--package", "-p")
    return [*flags, *rest]


def check(
    overrides: Sequence[str], sweep: bool = True, folders: Folders = (), compositions: Compositions | None = None
) -> list[RunConfig]:
    """Check the overrides of a command, including those of a sweep, without running anything.

    Args:
        overrides: words such as ``method=lora`` or ``train.epochs=3,5``.
        sweep: whether the command has ``-m``; without it, a key has one value.
        folders: added with ``--config-dir``.
        compositions: those made before, see `compose_values`.

    Returns:
        The configuration of each job.

    Raises:
        ConfigError: with every problem.
    """
    choices = _choices(folders)
    parser = OverridesParser.create()
    valid, problems = list[Override](), list[Problem]()
    given: dict[str, str] = {}
    for word in overrides:
        text = quote(word)
        try:
            override = parser.parse_override(text)
        except HydraException:
            problems.append(_unreadable(text, choices))
            continue
        key = override.get_key_element().lstrip("+~")
        if key in given:  # Hydra would silently use the last one
            problems.append(Problem(key, f"is given twice, {given[key]} and {text}; keep one", "command line"))
        given.setdefault(key, text)
        found = list(_check_override(override, choices, folders))
        if not found and not sweep and override.is_discrete_sweep() and not isinstance(override.value(), Glob):
            values = [getattr(value, "text", value) for value in override.sweep_iterator()]
            found = [several_values(override.key_or_group, ",".join(map(str, values)))]
        problems += found
        if not found:
            valid.append(override)
    problems += _conflicts_with_run(valid, choices)
    configurations = list[RunConfig]()
    compositions = {} if compositions is None else compositions
    for job in _jobs(valid, choices):
        try:
            configurations.append(build(*compose_values(job, folders, compositions), job))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return configurations


def require_words(words: Sequence[str], folders: Folders = ()) -> None:
    """Refuse words that are neither ``key=value`` nor a flag, and suggest what was probably meant.

    Args:
        words: the command line without the program.
        folders: added with ``--config-dir``.

    Raises:
        ConfigError: with each of them.
    """
    choices = _choices(folders)
    problems, rest = list[Problem](), list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and word.partition("=")[0] not in FLAGS:
            takes_next = "=" not in word and bool(rest) and "=" not in rest[0] and not rest[0].startswith("--")
            problems.append(_unknown_flag(word, rest.pop(0) if takes_next else None, choices))
        elif word.startswith("-"):
            if "=" in word and word.partition("=")[0] in ("-m", "--multirun"):
                problems.append(Problem(word, f"takes no value; write -m {word.partition('=')[2]}", "command line"))
        elif "=" not in word and "＝" not in word:
            following = rest[0] if rest else ""
            takes_next = word in choices and (following == "=" or following in choices[word])
            choice = rest.pop(1 if following == "=" else 0) if takes_next and len(rest) > (following == "=") else None
            if choice is not None and following == "=":
                rest.pop(0)
            problems.append(_not_a_pair(word, choice, choices))
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def expand(words: Sequence[str], folders: Folders = ()) -> list[str]:
    """Add the sweep of an experiment to a command, except for keys that the command itself sets.

    ``experiment=aidf_ablation`` runs all methods, ``experiment=aidf_ablation method=lora`` only this one.

    Args:
        words: the command line without the program, including flags.
        folders: added with ``--config-dir``.

    Returns:
        The same words, or with ``-m`` in front and the axes of the sweep at the end.
    """
    given = dict(word.partition("=")[::2] for word in words if "=" in word and not word.startswith("-"))
    if given.get("stage", "train") not in SWEPT or "experiment" not in given:
        return list(words)
    sweep = catalogue.read(catalogue.file_of("experiment", given["experiment"], folders)).get("sweep") or {}
    axes = [f"{key}={','.join(map(str, values))}" for key, values in sweep.items() if key not in given]
    flag = ["-m"] if axes and not {"-m", "--multirun"} & set(words) else []
    return [*flag, *words, *axes]


def defer_to_jobs(words: Sequence[str]) -> list[str]:
    """Let Hydra set values below a swept group only in the jobs of a sweep.

    Hydra first composes a command without its sweeps, with the default file of each group, and would refuse a key such
    as ``method.baseline.epochs`` that only the swept files have. A sweep over one value is set in the jobs only.

    Args:
        words: a checked command line with ``-m``, without the program.
    """
    parser = OverridesParser.create()
    parsed = {word: parser.parse_override(word) for word in words if not word.startswith("-")}
    swept = tuple(
        f"{each.key_or_group}."
        for each in parsed.values()
        if each.is_sweep_override() and each.key_or_group in catalogue.groups()
    )

    def defer(word: str) -> str:
        key, _, value = word.partition("=")
        # Within choice(), Hydra drops quotes and refuses null.
        plain = value.isascii() and not set(value) & {"'", '"'} and value.lower() != "null"
        fixed = word in parsed and not parsed[word].is_sweep_override()
        return f"{key}=choice({value})" if fixed and plain and key.startswith(swept) else word

    return [defer(word) for word in words] if swept else list(words)


def added_folders(words: Sequence[str]) -> tuple[list[str], Folders]:
    """Find the folder that ``--config-dir`` adds.

    Args:
        words: the command line without the program.

    Returns:
        The words, with the flag and the absolute path of the folder as one word, and the folder.

    Raises:
        ConfigError: if there is no such folder.
    """
    kept, folders, rest = list[str](), list[Path](), iter(words)
    for word in rest:
        flag, _, folder = word.partition("=")
        if flag not in ("--config-dir", "-cd"):
            kept.append(word)
            continue
        path = Path(folder or next(rest, ""))
        if not path.is_dir() or path == Path():
            text = f"no such folder: {path}. It must contain files as conf/ does, such as {path / 'data' / 'mine.yaml'}"
            raise ConfigError([Problem("--config-dir", text, "command line")])
        folders.append(path.absolute())
        kept.append(f"--config-dir={path.absolute()}")
    return kept, tuple(folders)


def quote(word: str) -> str:
    """Quote what Hydra's grammar only accepts in quotes: Chinese words, and whole maps whose keys are the user's words.

    ``data.labels=[利空,利好]`` and ``data.labels={利好: 正面, 利空: 负面}`` then need no quotes; nor do sweeps.
    """
    key, sign, value = word.partition("=")
    if key in ("text", "target") and sign:  # any characters at all
        return word if re.fullmatch("'.*'", value, re.DOTALL) else f"{key}={quoting.quoted(value)}"
    kind = kind_of(key.lstrip("+~"))
    if not sign or (value.isascii() and not replaces(kind)):
        return word
    choice = re.fullmatch(r"choice\((.*)\)", value, re.DOTALL)  # Hydra drops quotes within it; a,b means the same
    pieces = quoting.split(choice[1] if choice else value, ",")
    try:
        return f"{key}={','.join(_quote_value(piece, kind) for piece in pieces)}"
    except ValueError as error:
        raise ConfigError([Problem(key, str(error), "command line")]) from None


def _quote_value(value: str, kind: Any) -> str:
    if quoting.is_bracketed(value) and kind not in (str, str | None):
        if replaces(kind) or (takes_any_key(kind) and not value.isascii()):
            quoting.parse(value)  # raises for what cannot be parsed
            return quoting.quoted(value.strip())
        return quoting.for_hydra(value)
    return value if value.isascii() or quoting.is_quoted(value) else quoting.quoted(value)


def _choices(folders: Folders) -> Choices:
    return {group: catalogue.choices_of(group, folders) for group in catalogue.groups()}


# ------------------------------------------------------------------------------------------------ words


def _unknown_flag(word: str, following: str | None, choices: Choices) -> Problem:
    """A flag in the style of other programs, which is mostly meant as a key: ``--epochs 3``."""
    flag, _, value = word.partition("=")
    name = flag.strip("-").replace("-", "_")
    key = name if name in choices else nearest_key(name)
    near = nearest(name, [known.strip("-") for known in FLAGS if known.startswith("--")])
    if key and (name == key or near is None):
        text = f"is not a flag of finsa; values are set by key: write {key}={value or following or '<value>'}"
    else:
        hint = f"Did you mean '--{near}'?" if near else "python run.py --help lists all flags"
        text = f"is not a flag of finsa. {hint}"
    return Problem(flag, text, "command line")


def _not_a_pair(word: str, choice: str | None, choices: Choices) -> Problem:
    """A word without ``=``: a choice without its group, a key without its value, a part of a text with spaces."""
    key, colon, value = word.partition(":")
    groups = [group for group in ("stage", *choices) if word in choices[group]]
    if choice is not None:
        written = f"write {word}={choice}"
    elif word in ("help", "version"):
        written = f"write --{word}"
    elif groups:
        written = f"write {groups[0]}={word}"
    elif colon and (key in choices or unknown_key(key) is None):
        written = f"write {key}={value}"
    elif word in choices or unknown_key(word) is None:
        written = f"write {word}=<value>"
    else:
        near = nearest(word, [name for name in choices["stage"] if name[:1] == word[:1].lower()])
        written = f"write stage={near}" if near else "a value with spaces needs quotes, as in text='two words'"
    return Problem(word, f"is not of the form key=value; {written}", "command line")


def _unreadable(text: str, choices: Choices) -> Problem:
    """Why Hydra cannot parse a word, and how to write it."""
    key, sign, value = text.partition("=")
    if not sign and "＝" in text:
        return Problem(text, f"has a full-width ＝; write {text.replace('＝', '=', 1)}", "command line")
    if not sign:
        return _not_a_pair(text, None, choices)
    if key.isascii():
        written = quoting.for_shell(f"{key}={quoting.quoted(value)}")
        return Problem(key, f"the value cannot be parsed; put it in quotes: {written}", "command line")
    # Letters that no key has: some only look like the right ones, others are words of the user's map.
    section, _, word = key.lstrip("+~").rpartition(".")
    if section.isascii() and takes_any_key(kind_of(section)):
        written = quoting.for_shell(f"{section}={{{word}: {value.strip(chr(39))}}}")
        return Problem(key, f"keys of your own are written as a map: {written}", "command line")
    latin = latinize(key).lstrip("+~")
    unknown = None if latin in choices else unknown_key(latin)
    if unknown is None:
        return Problem(key, f"has letters that only look like those of a key. Did you mean '{latin}'?", "command line")
    return Problem(key, f"contains letters that no key contains. {unknown.text}", "command line")


# ------------------------------------------------------------------------------------------------ overrides


def _check_override(override: Override, choices: Choices, folders: Folders) -> Iterator[Problem]:
    key, text = override.key_or_group, str(override.input_line)
    if key.split(".")[0].split("/")[0] == "hydra":
        yield from _check_hydra(key, str(override.get_value_element_as_str()))  # Hydra's own checks come later
    elif override.is_delete() and not below_mapping(key):
        yield Problem(text, f"nothing can be removed; set a value instead, such as {key}=null", "command line")
    elif key in choices:
        yield from _check_choice(override, choices, folders)
    else:
        unknown = unknown_key(key)  # for an entry of a mapping, Hydra refuses to remove one that is not there
        if unknown:
            yield unknown
        elif override.is_add() and not override.is_force_add() and not below_mapping(key):
            yield Problem(key, f"already exists; write {text.lstrip('+')} without the +", "command line")


def _check_hydra(key: str, value: str) -> Iterator[Problem]:
    """Refuse keys of Hydra's own section that would have no effect, or without which a sweep has no report."""
    if re.match(r"hydra[/.](launcher|sweeper)\b|hydra\.sweep\.dir$|hydra\.job\.env_|hydra\.callbacks\b", key):
        return
    if key == "hydra" or not re.match(rf"hydra[/.]({'|'.join(_UNUSED_BY_FINSA)})\b", key):
        return  # Hydra reports unknown keys itself
    use = {
        "hydra.run.dir": f"run folders are created below output_dir: write output_dir={value}",
        "hydra.sweep.subdir": f"jobs are numbered in the folder of the sweep, hydra.sweep.dir={value}",
        "hydra.searchpath": "folders with your own files are added with --config-dir <folder>",
        "hydra.mode": "a sweep is started with -m",
    }.get(key, "only hydra.sweep.dir and the keys of Hydra's launcher and sweeper are used; leave it out")
    yield Problem(key, f"has no effect here; {use}", "command line")


def _check_choice(override: Override, choices: Choices, folders: Folders) -> Iterator[Problem]:
    group = override.key_or_group
    if override.is_add():
        text = f"is chosen without a +: write {str(override.input_line).lstrip('+')}"
        yield Problem(group, text, "command line")
        return
    if override.package is not None:
        yield Problem(group, f"cannot be moved to another place: write {group}=<name> without @", "command line")
        return
    for value in _values(override, choices):
        if value == "null" and group == "experiment":
            yield Problem(group, "leave it out instead of setting it to null", "command line")
        elif value not in choices[group]:
            hint = _hint_for_path(group, value, folders) or suggest(value, choices[group])
            yield Problem(group, f"there is no '{value}'. {hint}", "command line")


def _hint_for_path(group: str, value: str, folders: Folders) -> str | None:
    """What to write for a folder or a hub repository given in place of a choice; None for anything else."""
    exists = locate(value).exists() and not locate(value).is_relative_to(catalogue.CONF)
    if group == "model" and exists:
        return f"For a model in a folder: model=local model.path={value}"
    if group == "model" and "/" in value:
        hint = f"For a folder: model=local model.path={value}"
        if REPOSITORY.fullmatch(value):
            return f"For a model of the hub: {catalogue.hub_model(value, folders)}. {hint}"
        return hint
    if group == "method" and exists:
        return f"To train an adapter further: method.adapter.init={value}"
    if group == "data" and exists:
        return f"For files of your own: data=table data.files={value}"
    return None


def _values(override: Override, choices: Choices) -> list[str]:
    """The values of an override: one, those of a sweep, or the choices that match a glob."""
    value = override.value()
    if isinstance(value, Glob):
        return value.filter(list(choices[override.key_or_group]))
    if override.is_choice_sweep():
        return [str(name) for name in override.sweep_string_iterator()]
    return [override.get_value_element_as_str()]


def _conflicts_with_run(overrides: Sequence[Override], choices: Choices) -> Iterator[Problem]:
    """Refuse a model, method or seed next to run=<folder>: they are defined by the run, so they would be ignored."""
    if not any(override.key_or_group == "run" and override.value() is not None for override in overrides):
        return
    stages = {name for override in overrides if override.key_or_group == "stage" for name in _values(override, choices)}
    from_run = ("model", "method", "seed", "experiment", *["data"] * bool(stages & {"predict", "export"}))
    for override in overrides:
        key = override.key_or_group
        consent = key == "model.trust_remote_code"  # which a run folder cannot give
        input_format = key.startswith("data.csv.") and "predict" in stages  # of the input file
        if key.split(".")[0] not in from_run or consent or input_format:
            continue
        text = "comes from the run folder that run=<folder> names; leave it out"
        if "predict" in stages and key in _FOR_INPUT:
            value = override.get_value_element_as_str()
            text = f"comes from the run; for the input file, write {_FOR_INPUT[key]}={value}"
        yield Problem(key, text, "command line")


def _jobs(overrides: Sequence[Override], choices: Choices) -> list[list[str]]:
    """The overrides of each job of a sweep; of a very large sweep, only the first ones."""
    axes = []
    for override in overrides:
        line = str(override.input_line)
        if isinstance(override.value(), Glob):
            axes.append([f"{override.key_or_group}={name}" for name in _values(override, choices)])
        elif not override.is_sweep_override():
            axes.append([line])
        elif override.is_discrete_sweep():
            key = line.split("=", 1)[0]
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return [list(job) for job in islice(product(*axes), MAX_CHECKED_JOBS)]
