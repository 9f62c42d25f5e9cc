"""Start jobs: the guard around the whole command, and the one place where a job's errors are shown."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module, util
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from finsa import arguments, composition, runs, sweeps
from finsa.config import RunConfig
from finsa.data import sampling, table, task
from finsa.errors import ConfigError, FinsaError, Problem
from finsa.modeling import quantization
from finsa.runs import Result, sweep_name
from finsa.training import schedule

# Flags with which Hydra only prints something, or that change where it reads from: nothing for us to check before.
_HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
_HYDRA_VALUES = ("--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun")

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def guard(main: Callable[[], object], argv: list[str]) -> int:
    """Run a command; show what the user can mend as one message.

    Args:
        main: the function decorated by ``hydra.main``.
        argv: the command line; ``--debug`` is taken out of it.

    Returns:
        The exit code: 0, 1 (jobs of a sweep failed), 2 (to be mended by the user) or 130 (interrupted).
    """
    if "--debug" in argv:
        argv.remove("--debug")
        os.environ["FINSA_DEBUG"] = "1"
    # argparse takes overrides in one run only; with the flags in front they are one, wherever -m was typed
    argv[1:] = sorted(argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    argv[1:] = [arguments.quote(word) for word in argv[1:]]
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        argv[1:] = arguments.own_folder(argv[1:])
        if not any(word.split("=")[0] in _HYDRA_FLAGS + _HYDRA_VALUES for word in argv[1:]):
            argv[1:] = arguments.expand(argv[1:])
            arguments.check([word for word in argv[1:] if not word.startswith("-")])
            GlobalHydra.instance().clear()
        main()
        if _raised:
            raise _raised.pop()
        return sweeps.conclude()
    except KeyboardInterrupt:
        told = (
            "interrupted; a run is marked, and resume=true goes on from its last checkpoint; a model's answers are kept"
        )
        print(f"{told}, and the same command goes on from them", file=sys.stderr)
        return 130
    except FinsaError as error:
        return _tell(error)
    except composition.REFUSALS as error:
        return _tell(composition.refused(error))
    except OSError as error:
        return _tell(FinsaError(f"{error.filename or 'input or output'}: {error.strerror or error}"))


def _tell(error: FinsaError) -> int:
    if os.environ.get("FINSA_DEBUG") == "1":
        traceback.print_exc()
    print(f"{describe(error)}", file=sys.stderr)
    return error.exit_code


def describe(error: BaseException) -> str:
    """One message for an error: a list where a configuration has several problems."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return f"error: {len(error.problems)} problems\n" + "\n".join(f"  {problem}" for problem in error.problems)
    return f"error: {error}"


_raised: list[BaseException] = []


def run_job(cfg: RunConfig) -> float | None:
    """Run one job's stage.

    In a sweep a failing job is recorded and told at the end, so that the others go on. Outside of one its error is
    kept for `guard`, because Hydra would print a line of its own about it.

    Returns:
        The stage's objective; NaN for a failed job.
    """
    sweep = sweep_name() is not None
    try:
        if sweep:
            sweeps.begin(cfg)
        result = (_earlier(cfg) if sweep else None) or _run(cfg)
    except Exception as error:
        if not sweep:
            _raised.append(error)
        else:
            if os.environ.get("FINSA_DEBUG") == "1":
                traceback.print_exc()
            sweeps.failed(cfg, describe(error) if isinstance(error, FinsaError) else f"error: {error!r}")
        return float("nan")
    if sweep:
        sweeps.finished(cfg, result)
    return result.objective


def _earlier(cfg: RunConfig) -> Result | None:
    """The job's result where it was finished before on the same rows."""
    if cfg.stage.name not in ("train", "evaluate") or cfg.run is not None:
        return None
    return sweeps.earlier(cfg, table.load(cfg.data).fingerprint)


def _run(cfg: RunConfig) -> Result:
    """Check what can be checked without torch, then import the stage and run it."""
    path = require_stage(cfg.stage.name)
    if cfg.run is not None:
        if cfg.run not in runs.NAMED:  # the stage finds these, or makes them
            runs.read(cfg.run)
    elif cfg.stage.name in ("train", "check", "evaluate", "search", "moe_joint"):
        _preflight(cfg, table.load(cfg.data))
    result: Result = import_module(path).run(cfg)
    return result


def _preflight(cfg: RunConfig, data: table.Table) -> None:
    """Tell about rows and prompts that cannot be trained on in a second rather than after torch is there."""
    quantization.require_library(cfg.method)
    if cfg.method.baseline is not None:
        data.require("train", "validation", "test")
        return
    if cfg.stage.name != "evaluate" and cfg.method.learn != "nothing":
        data.require("train", "validation", "test")
        gold = data.splits["train"]["label"].to_list()
        order = sampling.chosen(gold, cfg.method, cfg.seed)
        counts = sampling.class_counts(gold, order, data.labels.names, cfg.method.loss)
        schedule.steps_of(cfg.train, sum(counts), int(os.environ.get("WORLD_SIZE", "1")))
    from finsa.modeling import tokenizers  # a second of imports that most errors need not wait for

    tokenizer = tokenizers.peek(cfg.model)
    if tokenizer is not None:
        task.build(cfg, data, tokenizer)


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
