"""The command: compose, check, run a stage, return its objective. ``python run.py``, ``python -m finsa`` and ``finsa``.

Exit code 2: an error that the user can fix, reported in one message. 1: a job of a sweep failed. 130: interrupted.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module, util
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach `guard` instead of being printed by Hydra

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from finsa import sweeps
from finsa.config import USED_BY, RunConfig, catalogue, command_line, compose, safety
from finsa.errors import ConfigError, FinsaError, Problem
from finsa.models import folders
from finsa.runs import processes, run_folder, signals
from finsa.runs.run_folder import Result
from finsa.session import Job, Session, current_job

# Flags with which Hydra only prints something, or that change where it reads from: nothing for us to check before.
_HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of loading; hub.cache_alone shows those of downloads
}


def run() -> int:
    """Run the command line of this process and return its exit code."""
    session, errors = Session(), list[BaseException]()

    @hydra.main(version_base="1.3", config_path=str(catalogue.CONF), config_name="config")
    def main(config: DictConfig) -> float | None:
        """Run one job and return its objective (the validation score a sweeper may maximise)."""
        job = current_job()
        assert job is not None
        return run_job(compose.from_hydra(config, job), session.for_job(job), errors)

    return guard(main, sys.argv, errors)


def guard(main: Callable[[], object], argv: list[str], errors: list[BaseException] | None = None) -> int:
    """Run a command; show what the user can mend as one message.

    Args:
        main: the function decorated by ``hydra.main``.
        errors: where `main` leaves the error of a job.
        argv: the command line; ``--debug`` is taken out of it.

    Returns:
        The exit code: 0, 1 (jobs of a sweep failed, or a fault of finsa's own, shown with its traceback), 2 (to be
        mended by the user), 130 (interrupted) or 143 (terminated).
    """
    if "--debug" in argv:
        argv.remove("--debug")
        os.environ["FINSA_DEBUG"] = "1"
    argv[1:] = _flags_first(argv[1:])
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a faster kernel that few need
    if not processes.first():
        sys.stdout = Path(os.devnull).open("w")  # process 0 speaks for all  # noqa: SIM115
    typed = list(argv)
    try:
        argv[1:] = [command_line.quote(word) for word in argv[1:]]
        safety.require_plain_command(argv[1:])
        argv[1:], added = command_line.added_folders(argv[1:])
        if {"--help", "-h"} & set(argv[1:]):
            print(catalogue.help_page(added))
            return 0
        if not any(word.split("=")[0] in _HYDRA_FLAGS for word in argv[1:]):
            command_line.require_words(argv[1:], added)
            argv[1:] = command_line.expand(argv[1:], added)
            sweep = bool({"-m", "--multirun"} & set(argv[1:]))
            overrides = [word for word in argv[1:] if not word.startswith("-")]
            folders.require(command_line.check(overrides, sweep, added))
            GlobalHydra.instance().clear()
        if processes.world() > 1 and {"-m", "--multirun"} & set(argv[1:]):
            text = f"one job is shared by the {processes.world()} processes, and a sweep has many; start one job each"
            raise ConfigError([Problem("-m", text, "command line")])
        with signals.stopping():
            main()
            if errors:
                raise errors.pop()
            return sweeps.conclude(added)
    except KeyboardInterrupt as stop:
        print(f"{stop or 'interrupted'}. Continue with: {resuming(typed)}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except FinsaError as error:
        return _tell(error)
    except compose.REFUSALS as error:
        return _tell(compose.refused(error))
    except OSError as error:
        return _tell(FinsaError(f"{error.filename or 'input or output'}: {error.strerror or error}"))
    except Exception as error:
        return _unexpected(error, typed)


def _flags_first(words: list[str]) -> list[str]:
    """Words with the flags in front, wherever they were typed: argparse takes overrides in one run only."""
    flags, rest, after = list[str](), list[str](), False
    for word in words:
        (flags if after or word.startswith("-") else rest).append(word)
        after = word in ("--cfg", "-c", "--config-dir", "-cd", "--package", "-p")
    return [*flags, *rest]


def _unexpected(error: Exception, typed: list[str]) -> int:
    """Tell what nobody has put into words: too little memory, or a fault of finsa's own."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        text = "out of memory. Set train.micro_batch_size and train.score_tokens lower, or choose a smaller model"
        return _tell(FinsaError(f"{text}. Checkpoints are kept: {resuming(typed)}"))
    _show_traceback()
    return 1


def _show_traceback() -> None:
    """Show the error at hand as Python does, without secrets of the environment."""
    print(safety.masked(traceback.format_exc()), end="", file=sys.stderr)


def resuming(argv: list[str]) -> str:
    """The command that goes on where one was stopped; sweeps and predictions do so by themselves."""
    words = [word for word in argv[1:] if not word.startswith("resume=")]
    stages = [word.partition("=")[2] for word in words if word.startswith("stage=")]
    resumes = "-m" not in words and "--multirun" not in words and (stages or ["train"])[-1] in USED_BY["resume"]
    return shlex.join(["python", "run.py", *words, *(["resume=true"] if resumes else [])])


def _tell(error: FinsaError) -> int:
    if os.environ.get("FINSA_DEBUG") == "1":
        _show_traceback()
    if processes.first():
        print(describe(error), file=sys.stderr)
    elif not isinstance(error, ConfigError):  # a wrong command is told once
        print(f"process {processes.rank()}: {describe(error)}", file=sys.stderr)
    return error.exit_code


def describe(error: BaseException) -> str:
    """One message for an error: a list where a configuration has several problems."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        return safety.masked(f"error: {len(error.problems)} problems\n{lines}")
    return safety.masked(f"error: {error}")


def run_job(cfg: RunConfig, session: Session, errors: list[BaseException]) -> float | None:
    """Run one job's stage.

    In a sweep a failing job is recorded and told at the end, so that the others go on. Outside of one its error is
    added to `errors` for `guard`, because Hydra would print a line of its own about it.

    Returns:
        The stage's objective; NaN for a failed job.
    """
    job = session.job if session.job is not None and session.job.sweep_dir is not None else None
    try:
        if job is not None:
            sweeps.begin(cfg, job)
            result = _earlier(cfg, job, session) or _run(_going_on(cfg, session), session)
        else:
            result = _run(cfg, session)
    except Exception as error:
        if job is None:
            errors.append(error)
        else:
            if os.environ.get("FINSA_DEBUG") == "1":
                _show_traceback()
            text = describe(error) if isinstance(error, FinsaError) else safety.masked(f"error: {error!r}")
            sweeps.failed(cfg, job, text)
        return float("nan")
    if job is not None:
        sweeps.finished(cfg, job, result)
    return result.objective


def _earlier(cfg: RunConfig, job: Job, session: Session) -> Result | None:
    """The job's result where it was finished before on the same rows."""
    if cfg.stage.name not in ("train", "evaluate") or cfg.run is not None:
        return None
    from finsa.data import dataset

    return sweeps.earlier(cfg, job, dataset.load(cfg.data, session).fingerprint)


def _going_on(cfg: RunConfig, session: Session) -> RunConfig:
    """A sweep's job that was killed before goes on in its own folder, unless another process is at it."""
    if cfg.stage.name != "train" or cfg.fresh or cfg.resume:
        return cfg
    from finsa.data import dataset

    path = run_folder.unfinished(cfg, dataset.load(cfg.data, session).fingerprint)
    if path is None:
        return cfg
    print(f"going on with {path}; fresh=true starts anew", flush=True)
    return cfg.model_copy(update={"resume": True})


def _run(cfg: RunConfig, session: Session) -> Result:
    """Import the stage and run it; a run folder that it reads is checked first."""
    path = require_stage(cfg.stage.name)
    processes.require(cfg)
    if cfg.run is not None and cfg.run not in run_folder.NAMED:  # the stage finds these, or makes them
        run_folder.read(cfg.run)
    with processes.joined(cfg):
        result: Result = import_module(path).run(cfg, session)
    return result


def require_stage(name: str) -> str:
    """Find a stage by its name: ``finsa/stages/<name>.py`` defines ``run``.

    Returns:
        The module's dotted name.

    Raises:
        ConfigError: for a stage that composes but is not built yet.
    """
    path = f"finsa.stages.{name}"
    if util.find_spec(path) is None:
        built = ", ".join(available_stages())
        text = f"'{name}' composes, but this version cannot run it yet. Stages that run: {built}."
        raise ConfigError([Problem("stage", text)])
    return path


def available_stages() -> Sequence[str]:
    """Names of the stages that can be run."""
    folder = Path(__file__).parent / "stages"
    return sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
