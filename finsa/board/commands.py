"""Commands that are composed in the board: checked as in a shell, and kept within the folders of the board."""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from finsa.config import ROOT, USED_BY, BoardStage, RunConfig, catalogue, command_line, locate, quoting, safety
from finsa.errors import ConfigError, FinsaError, Problem
from finsa.models import folders

PLACES = {"files", "path", "cache", "input", "output", "output_dir", "run", "runs", "models", "prices", "calibration"}
SERVERS = ("board", "serve")  # stages that listen on a port
_COMPOSING = threading.Lock()  # Hydra composes one configuration at a time in a process


@dataclass(frozen=True)
class Scope:
    """What commands of the board may name.

    Args:
        output_dir: parent of the run folders.
        named: the same, as it was written.
        allowed: folders that a value may lead to.
        always: words that belong to every command: ``--config-dir`` and ``output_dir``, as the board was started with.
    """

    output_dir: Path
    named: Path
    allowed: tuple[Path, ...]
    always: tuple[str, ...]

    @classmethod
    def of(cls, cfg: RunConfig, stage: BoardStage, added: Sequence[Path]) -> Scope:
        """The scope of a board: ``output_dir``, ``data`` and ``stage.folders``.

        Args:
            added: folders of ``--config-dir``.
        """
        output = Path(cfg.output_dir).absolute()
        allowed = [output, ROOT / "data", Path("data"), *map(locate, stage.folders)]
        always = [f"--config-dir={folder}" for folder in added]
        if output != Path("outputs").absolute():
            always.append(f"output_dir={cfg.output_dir}")
        return cls(output, Path(cfg.output_dir), tuple(folder.resolve() for folder in allowed), tuple(always))


@cache
def defaults() -> dict[str, str]:
    """The choice of each group without any word of a command; groups that are not chosen are empty."""
    listed = catalogue.read(catalogue.CONF / "config.yaml")["defaults"]
    chosen = {group: choice for one in listed if isinstance(one, dict) for group, choice in one.items()}
    return {group: chosen.get(group) or "" for group in catalogue.ORDER}


def words(choices: Mapping[str, str | None], text: str, scope: Scope) -> list[str]:
    """The words of a command: what is always there, choices that differ from the defaults, and typed overrides.

    Args:
        choices: of each group.
        text: overrides as a user types them in a shell, on one line or several.
        scope: of the board.

    Raises:
        ConfigError: for a quote that is not closed.
    """
    try:
        typed = [word for line in text.splitlines() for word in shlex.split(line)]
    except ValueError as error:
        problem = Problem("overrides", f"{str(error).lower()}; close it, or put the word in double quotes", "board")
        raise ConfigError([problem]) from None
    chosen = [f"{group}={choice}" for group, choice in choices.items() if choice and choice != defaults()[group]]
    return [*scope.always, *chosen, *typed]


def check(given: Sequence[str], scope: Scope) -> list[RunConfig]:
    """Check a command as a shell does, and refuse what would lead out of the folders of the board.

    Args:
        given: the words of the command; those of ``scope.always`` come first.
        scope: of the board.

    Returns:
        The configuration of each job.

    Raises:
        ConfigError: with all problems.
    """
    typed = [word for word in given[len(scope.always) :] if word not in ("-m", "--multirun")]
    folders.raise_any(problem for word in typed for problem in _refusals(word))
    keys = {word.partition("=")[0].lstrip("+~") for word in typed} - set(catalogue.groups())

    def require(jobs: list[RunConfig]) -> None:
        folders.raise_any(problem for job in jobs for problem in _outside(job.model_dump(), keys, scope.allowed))
        folders.require(jobs)  # afterwards: its messages list what is in a folder

    with _COMPOSING:
        return command_line.prepare(given, require)[2]


def _refusals(word: str) -> Iterator[Problem]:
    """Why the board does not take a word that a shell takes."""
    key, _, value = word.partition("=")
    name, text = key.lstrip("+~"), ""
    if word.startswith("-"):
        text = "the board takes key=value and -m; --config-dir belongs to the command that starts the board"
    elif re.split(r"[./]", name)[0] in ("hydra", "per_method"):
        text = "cannot be set in the board; write it into a file of conf/experiment, or use a shell"
    elif safety.REMOTE_CODE.split(".")[1] in word and (name, value.strip().lower()) != (safety.REMOTE_CODE, "false"):
        text = "code that ships with weights can only be allowed in a shell"
    elif "${" in value:
        text = "the board takes values, not references to other keys; write the value itself"
    elif name == "stage" and set(value.split(",")) & set(SERVERS):
        text = f"{value} is started from a shell"
    if text:
        yield Problem(name or word, text, "board")


def _outside(values: Any, keys: Collection[str], allowed: Sequence[Path], path: str = "") -> Iterator[Problem]:
    """Values that a command sets and that name a file outside of the allowed folders."""
    entries = values.items() if isinstance(values, Mapping) else ()
    for name, value in entries:
        started = value.get("name") if isinstance(value, Mapping) else value
        if name == "stage" and started in SERVERS:  # of a link: the stage of the command is refused by `_refusals`
            yield Problem(f"{path}.{name}".lstrip("."), f"{started} is started from a shell", "board")
        yield from _outside(value, keys, allowed, f"{path}.{name}".lstrip("."))
    for value in values if isinstance(values, list | tuple) else ():
        yield from _outside(value, keys, allowed, path)
    if isinstance(values, str) and any(f"{path}.".startswith(f"{key}.") for key in keys):
        if not (_names_a_file(values) or PLACES & set(path.split("."))) or within(values, allowed):
            return
        shown = ", ".join(map(str, dict.fromkeys(allowed)))
        text = f"{values} is outside of the folders of the board: {shown}. Add others with stage.folders=[<folder>]"
        yield Problem(path, text, "board")


def _names_a_file(text: str) -> bool:
    try:
        path = Path(text)
        return text.startswith(("~", "file:")) or path.is_absolute() or ".." in path.parts or locate(text).exists()
    except (OSError, ValueError, RuntimeError):  # too long for a name: a prompt
        return False


def within(text: str | Path, allowed: Sequence[Path]) -> bool:
    """Whether a path, after resolving links, is inside one of the folders."""
    try:
        place = locate(text).resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return ".." not in Path(text).parts and any(place.is_relative_to(folder) for folder in allowed)


def in_shell(given: Sequence[str]) -> str:
    """The command line to type in a shell."""
    return " ".join([catalogue.COMMAND, *map(quoting.for_shell, given)])


def as_yaml(jobs: Sequence[RunConfig]) -> str:
    """The resulting configuration as in a run folder's ``config.yaml``; of a sweep, that of the first job."""
    shown = yaml.safe_dump(jobs[0].model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    return f"# job 1 of {len(jobs)}\n{shown}" if len(jobs) > 1 else shown


def of_plan(given: Sequence[str]) -> list[str]:
    """The words of ``stage=check`` for a training run."""
    kept = [word for word in given if not word.startswith(("stage=", "stage.", "+stage.", "resume=", "fresh="))]
    return [*kept, "stage=check"]


def resuming(given: Sequence[str]) -> list[str] | None:
    """The words that resume a run; None for a stage that is not resumed.

    Args:
        given: the words that started it.
    """
    kept = [word for word in given if not word.startswith("resume=")]
    if {"-m", "--multirun"} & set(kept):  # a sweep resumes when its command is repeated
        return kept
    stage = next((word.partition("=")[2] for word in reversed(kept) if word.startswith("stage=")), "train")
    return [*kept, "resume=true"] if stage in USED_BY["resume"] else None


def problems(error: FinsaError) -> list[str]:
    """The problems of an error, as the shell prints them."""
    return [str(one) for one in error.problems] if isinstance(error, ConfigError) else [str(error)]
