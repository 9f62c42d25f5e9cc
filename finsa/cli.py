"""The command: compose, check, run a stage, return its objective. ``python run.py``, ``python -m finsa`` and ``finsa``.

Exit codes: 1 if a job of a sweep failed, or for a bug in finsa; 2 for an error that the user can fix, reported in one
message; 130 if interrupted; 143 if terminated.
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
from typing import TYPE_CHECKING

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach `guard` instead of being printed by Hydra

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from finsa import sweeps
from finsa.config import USED_BY, RunConfig, catalogue, command_line, compose, safety
from finsa.errors import ConfigError, FinsaError, Problem
from finsa.models import folders
from finsa.runs import processes, run_folder, signals, starts, trackers
from finsa.runs.run_folder import Result
from finsa.session import Session, current_job

if TYPE_CHECKING:  # what reads data is imported where it is used: a wrong option need not wait for it
    from finsa.data.dataset import Dataset


def run() -> int:
    """Run the command line of this process and return its exit code."""
    session = Session()
    return guard(hydra_main(session), sys.argv, session)


def hydra_main(session: Session) -> Callable[[], object]:
    """Build the function in which Hydra reads the command line and runs its jobs, see `run_job`."""

    @hydra.main(version_base="1.3", config_path=str(catalogue.CONF), config_name="config")
    def main(config: DictConfig) -> float | None:
        job = current_job()
        assert job is not None
        return run_job(compose.from_hydra(config, job), session.for_job(job))

    return main


def guard(main: Callable[[], object], argv: list[str], session: Session) -> int:
    """Run a command and report errors that the user can fix in one message.

    Args:
        main: built by `hydra_main`.
        argv: the command line; changed in place to what Hydra reads.
        session: the one of `main`.

    Returns:
        The exit code: 0; 1 if jobs of a sweep failed, or for a bug of finsa, shown with its traceback; 2 for an error
        that the user can fix; 130 if interrupted; 143 if terminated.
    """
    if "--debug" in argv:
        argv.remove("--debug")
        os.environ["FINSA_DEBUG"] = "1"
    processes.quiet()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a faster kernel that few need
    if not processes.is_main():
        sys.stdout = Path(os.devnull).open("w")  # process 0 prints for all  # noqa: SIM115
    typed = list(argv)
    try:
        argv[1:], added = prepare(argv[1:])
        if {"--help", "-h"} & set(argv[1:]):
            print(catalogue.help_page(added))
            return 0
        with signals.stopping():
            main()
            if session.errors:
                raise session.errors.pop()
            return sweeps.conclude(added)
    except KeyboardInterrupt as stop:
        if processes.is_main():
            again = resuming(typed, session, argv)
            print(f"{str(stop) or 'interrupted'}. Continue with: {again}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except FinsaError as error:
        return _report(error)
    except compose.REFUSALS as error:
        return _report(compose.refused(error))
    except OSError as error:  # without a number: of Ray, where no cluster runs
        place = "connection" if isinstance(error, ConnectionError) and not error.errno else "input or output"
        return _report(FinsaError(f"{error.filename or place}: {error.strerror or error}"))
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
            text = "out of memory. Set train.micro_batch_size and train.score_tokens lower, or choose a smaller model"
            return _report(FinsaError(f"{text}. Checkpoints are kept: {resuming(typed, session, argv)}"))
        _print_traceback()
        return 1


def prepare(words: list[str]) -> tuple[list[str], tuple[Path, ...]]:
    """Check a command line before Hydra reads it, so that all of its problems are reported at once.

    Args:
        words: the command line without the program.

    Returns:
        The words as Hydra reads them: flags first, values quoted, sweeps expanded; and the folders that
        ``--config-dir`` adds to ``conf/``.

    Raises:
        ConfigError: with all problems.
    """
    words, added, jobs = command_line.prepare(words, folders.require)
    if jobs:
        GlobalHydra.instance().clear()  # the check has composed the configuration; Hydra starts with a clean state
    if {"-m", "--multirun"} & set(words) and processes.world_size() > 1:
        text = f"{processes.world_size()} processes run one job, but a sweep has several: run its jobs one by one"
        raise ConfigError([Problem("-m", text, "command line")])
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key == "hydra.launcher.ray.init.address":
            processes.require_cluster(value, key)
    return words, added


def run_job(cfg: RunConfig, session: Session) -> float | None:
    """Run one job's stage.

    In a sweep, a failed job is recorded and the others still run. Outside of a sweep, the error is added to
    ``session.errors`` for `guard`, because Hydra would print a message of its own.

    Returns:
        The stage's objective, which a sweeper may maximize; NaN for a failed job.
    """
    processes.quiet()  # the launcher of a sweep may have started another process, on another machine
    sweep_job = session.job if session.job is not None and session.job.sweep_dir is not None else None
    try:
        cfg = starts.resolved(cfg, session)
        if sweep_job is None:
            return _run_stage(cfg, session).objective
        sweeps.begin(cfg, sweep_job)
        result = None
        if cfg.stage.name in ("train", "evaluate") and cfg.run is None:
            result = sweeps.earlier(cfg, sweep_job, _load(cfg, session).fingerprint)
        if result is None:
            if cfg.stage.name == "train" and not cfg.fresh and not cfg.resume:  # killed before: resume in its folder
                path = run_folder.unfinished(cfg, _load(cfg, session).fingerprint)
                if path is not None:
                    print(f"resuming {path} (fresh=true starts over)", flush=True)
                    cfg = cfg.model_copy(update={"resume": True})
            result = _run_stage(cfg, session)
    except Exception as error:
        if sweep_job is None:
            session.errors.append(error)
        else:
            if os.environ.get("FINSA_DEBUG") == "1":
                _print_traceback()
            sweeps.failed(cfg, sweep_job, describe(error if isinstance(error, FinsaError) else repr(error)))
        return float("nan")
    sweeps.finished(cfg, sweep_job, result)
    return result.objective


def _load(cfg: RunConfig, session: Session) -> Dataset:
    from finsa.data import dataset  # reads data: a wrong option need not wait for its import

    return dataset.load(cfg.data, session)


def _run_stage(cfg: RunConfig, session: Session) -> Result:
    """Import the stage and run it; a run folder that it reads is checked first."""
    path = require_stage(cfg.stage.name)
    processes.require(cfg)
    trackers.require_installed(cfg.tracking)
    if cfg.run is not None and cfg.run not in run_folder.NAMED:  # the stage finds these, or makes them
        run_folder.read(cfg.run)
    with processes.process_group(cfg):
        result: Result = import_module(path).run(cfg, session)
    return result


def resuming(typed: list[str], session: Session, prepared: Sequence[str] = ()) -> str:
    """The command that continues a stopped one.

    Sweeps and predictions resume when they are repeated; a run needs ``resume=true``, if its folder exists already.

    Args:
        typed: the command line, with the program.
        session: of the command.
        prepared: the command line as Hydra reads it, in which an experiment may have become a sweep.
    """
    words = [word for word in typed[1:] if not word.startswith("resume=")]
    stages = [word.partition("=")[2] for word in words if word.startswith("stage=")]
    sweep = {"-m", "--multirun"} & {*typed, *prepared}
    resumes = not sweep and (stages or ["train"])[-1] in USED_BY["resume"]
    begun = session.run_folders or "resume=true" in typed
    program = Path(typed[0])
    start = ["-m", "finsa"] if program.name == "__main__.py" else [typed[0]]
    if processes.world_size() > 1:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), *start]
    elif program.suffix == ".py":  # not the installed script `finsa`
        start = ["python", *start]
    return shlex.join([*start, *words, *(["resume=true"] if resumes and begun else [])])


def _print_traceback() -> None:
    """Print the current exception as Python does, without secrets from the environment."""
    print(safety.masked(traceback.format_exc()), end="", file=sys.stderr)


def _report(error: FinsaError) -> int:
    """Print an error once, whatever the number of processes, and return the exit code."""
    if os.environ.get("FINSA_DEBUG") == "1":
        _print_traceback()
    if processes.is_main():
        print(describe(error), file=sys.stderr)
    elif not isinstance(error, ConfigError):  # all processes have the same command
        print(f"process {processes.rank()}: {describe(error)}", file=sys.stderr)
    return error.exit_code


def describe(error: BaseException | str) -> str:
    """Format an error as one message: a list if a configuration has several problems."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        return safety.masked(f"error: {len(error.problems)} problems\n{lines}")
    return safety.masked(f"error: {error}")


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
