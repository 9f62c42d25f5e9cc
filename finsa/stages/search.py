"""Hyperparameter search with Optuna: trials of stage=train, scored on the validation split; poor ones are pruned."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import LOWER_IS_BETTER, Axis, RunConfig, SearchStage, catalogue, compose, keys
from finsa.config.base import headline
from finsa.data import dataset
from finsa.errors import ConfigError, FinsaError, Problem, Pruned
from finsa.evaluation import figures
from finsa.evaluation.tables import TITLES
from finsa.runs import files, nested, run_folder
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Parent, Session
from finsa.training import preflight

INTERRUPTED = "cut short"  # attribute of a trial whose process was killed; an older journal has the same value


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Run ``stage.trials`` trials; each is an ordinary run below ``trials/``.

    Every trial scores the test split, as every run does, but the search never reads these scores.
    """
    session = session or Session()
    knobs = cfg.stage
    assert isinstance(knobs, SearchStage)
    _check(knobs, session)
    optuna = _optuna()
    data = dataset.load(cfg.data, session)
    preflight.require_trainable(cfg, data, session)
    with run_folder.start(cfg, data.fingerprint, session) as folder:
        measure = headline(cfg.data.task)
        study = _study(optuna, knobs, folder.path, measure)
        while (number := len(_ended(study))) < knobs.trials:
            # The journal stores trials but no random state. With a new seed for each trial, a resumed search samples
            # the same hyperparameters as an uninterrupted one.
            study.sampler = optuna.samplers.TPESampler(seed=cfg.seed + number, n_startup_trials=knobs.startup)
            outcome = _trial(optuna, study, knobs, folder, number, session, measure)
            print(f"trial {number + 1} of {knobs.trials}: {outcome}", flush=True)
        return _conclude(study, knobs, folder, measure)


def _check(knobs: SearchStage, session: Session) -> None:
    """Refuse a search space with keys or values that cannot be searched, reporting all problems together."""
    searched = [axis.key for axis in knobs.space]
    fixed = ("data", "seed", "stage", "run", "output_dir")
    known = [key for key in searched if key.split(".")[0] not in fixed]
    problems = [
        Problem("stage.space", f"{key} changes what a score means, so it cannot be searched")
        for key in searched
        if key not in known
    ]
    unknown = (keys.unknown_key(key) for key in known if key not in catalogue.groups())
    problems += [Problem("stage.space", f"{one.path}: {one.text}") for one in unknown if one]
    if problems:
        raise ConfigError(problems)
    _config({axis.key: axis.first for axis in knobs.space}, session)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError([Problem("stage", "search needs Optuna: pip install 'finsa[search]'")]) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, knobs: SearchStage, folder: Path, measure: str) -> Any:
    """Open the study, whose journal in the run folder makes an interrupted search resumable."""
    journal = folder / "journal.log"
    _repair(journal)
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    pruner = optuna.pruners.MedianPruner(knobs.startup) if knobs.prune else optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            study_name="search",
            storage=optuna.storages.JournalStorage(backend),
            direction="minimize" if measure in LOWER_IS_BETTER else "maximize",
            pruner=pruner,
            load_if_exists=True,
        )
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a process that was killed
        optuna.trial.Trial(study, trial._trial_id).set_user_attr(INTERRUPTED, True)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _repair(journal: Path) -> None:
    """Remove what a killed process left behind: an incomplete last line, and its lock of the journal."""
    for leftover in journal.parent.glob(f"{journal.name}.lock*"):  # the lock of the run folder excludes other processes
        leftover.unlink(missing_ok=True)
    if journal.is_file():
        content = journal.read_bytes()
        with files.replacing(journal) as temporary:
            temporary.write_bytes(content[: content.rfind(b"\n") + 1])


def _ended(study: Any) -> list[Any]:
    """Finished trials, in order; interrupted ones are excluded, because they are repeated."""
    return [trial for trial in study.trials if trial.state.is_finished() and INTERRUPTED not in trial.user_attrs]


def _trial(
    optuna: Any, study: Any, knobs: SearchStage, folder: RunFolder, number: int, session: Session, measure: str
) -> str:
    """Run one trial and report it to the study; returns a message with its settings and score."""
    trial = study.ask()
    values = _values(knobs, {axis.key: _suggest(trial, axis) for axis in knobs.space})
    started = time.monotonic()

    def watch(step: int, record: dict[str, float]) -> None:
        score = record.get(f"eval_{measure}")
        if score is not None:
            trial.report(score, step)
            if trial.should_prune():
                raise Pruned(f"after {step} steps {score:.4f} is worse than the median of earlier trials")

    place = folder.path / "trials" / f"{number + 1:03d}"
    if place.is_dir():
        files.remove(place)  # of an interrupted trial; the pruner needs all its steps, so it starts over
    place.mkdir(parents=True)
    try:
        with (place / "stdout.txt").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            result = nested.run(_config(values, session), session.below(Parent(place, folder.path.name, watch)))
        score = result.objective or 0.0
        study.tell(trial, score)
        outcome = f"{TITLES[measure]} {score:.4f} on validation"
    except Pruned as reason:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        outcome = f"pruned: {reason}"
    except FinsaError as error:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        outcome = f"failed: {error}"
    return f"{' '.join(_overrides(values))}: {outcome}, {time.monotonic() - started:.0f} s"


def _suggest(trial: Any, axis: Axis) -> Any:
    if axis.values is not None:
        return trial.suggest_categorical(axis.key, list(axis.values))
    draw = trial.suggest_int if isinstance(axis.low, int) and isinstance(axis.high, int) else trial.suggest_float
    return draw(axis.key, axis.low, axis.high, log=axis.log)


def _values(knobs: SearchStage, drawn: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial; sampled numbers are rounded to four digits, so that they can be typed."""
    values = dict[str, Any]()
    for axis in knobs.space:
        value = drawn[axis.key]
        if axis.low is not None and axis.high is not None and isinstance(value, float):
            value = min(max(float(f"{value:.4g}"), axis.low), axis.high)
        values[axis.key] = value
    return values


def _overrides(values: dict[str, Any]) -> list[str]:
    """The overrides that set these values."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def _config(values: dict[str, Any], session: Session) -> RunConfig:
    """The configuration of a trial: that of the command with stage=train and the values of the trial."""
    kept = [text for text in session.overrides if text.split("=")[0].split(".")[0] not in ("stage", "resume")]
    overrides = [*kept, "stage=train", "stage.compare_base=false", *_overrides(values)]
    return compose.build(*compose.compose_values(overrides, session.folders), overrides)


def _conclude(study: Any, knobs: SearchStage, folder: RunFolder, measure: str) -> Result:
    """Write all trials, and print the best one."""
    trials = [
        {"trial": number, "state": one.state.name.lower(), measure: one.value, **_values(knobs, one.params)}
        for number, one in enumerate(_ended(study), start=1)
    ]
    if not any(one["state"] == "complete" for one in trials):
        raise FinsaError("no trial was completed; see the last lines of trials/*/stdout.txt for the reasons")
    best = study.best_trial
    number = [one.number for one in _ended(study)].index(best.number) + 1
    values = _values(knobs, best.params)
    folder.write_json("search.json", {"best": {"trial": number, measure: best.value, **values}, "trials": trials})
    with files.replacing(folder.path / "trials.csv") as temporary:
        pl.DataFrame(trials, infer_schema_length=None).write_csv(temporary)
    with files.replacing(folder.path / "search.png") as temporary:
        figures.search([one[measure] for one in trials], temporary, measure)
    print(f"best: trial {number} of {len(trials)}, {TITLES[measure]} {best.value:.4f} on the validation split")
    print(f"use it with: {' '.join(_overrides(values))}")
    print(f"run folder: {folder.path}")
    return Result("search", folder.path, {"validation": {measure: best.value}}, best.value)
