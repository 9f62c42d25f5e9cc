"""Search settings for the best validation score: trials of stage=train, chosen by Optuna, poor ones stopped early."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Axis, RunConfig, SearchStage, catalogue, compose, keys
from finsa.data import dataset
from finsa.errors import ConfigError, FinsaError, Problem, Pruned
from finsa.evaluation import figures
from finsa.runs import files, nested, run_folder
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Parent, Session
from finsa.training import preflight

SCORE = "eval_macro_f1"
CUT = "cut short"  # marks a trial that a kill ended


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Run trials until there are as many as asked for; each is an ordinary run below ``trials/``.

    The test split is scored by every trial, as by every run, and never read here.
    """
    session = session or Session()
    knobs = cfg.stage
    assert isinstance(knobs, SearchStage)
    _check(knobs, session)
    optuna = _optuna()
    data = dataset.load(cfg.data, session)
    preflight.require_trainable(cfg, data, session)
    with run_folder.start(cfg, data.fingerprint, session) as folder:
        study = _study(optuna, knobs, folder.path)
        while (number := _done(study)) < knobs.trials:
            # A journal keeps trials and no generator: each trial draws from a seed of its own, and so a stopped search
            # goes on as if it had not been stopped.
            study.sampler = optuna.samplers.TPESampler(seed=cfg.seed + number, n_startup_trials=knobs.startup)
            print(
                f"trial {number + 1} of {knobs.trials}: {_trial(optuna, study, knobs, folder, number, session)}",
                flush=True,
            )
        return _conclude(study, knobs, folder)


def _check(knobs: SearchStage, session: Session) -> None:
    """Refuse a space whose keys or first values do not fit, all of it at once."""
    searched = [axis.key for axis in knobs.space]
    fixed = ("data", "seed", "stage", "run", "output_dir")
    known = [key for key in searched if key.split(".")[0] not in fixed]
    problems = [
        Problem("stage.space", f"{key} decides what a score means, so it is not searched")
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


def _study(optuna: Any, knobs: SearchStage, folder: Path) -> Any:
    """The study, kept in a journal in the run folder, so that a stopped search goes on from it."""
    journal = folder / "journal.log"
    _mend(journal)
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    pruner = optuna.pruners.MedianPruner(knobs.startup) if knobs.prune else optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            study_name="search",
            storage=optuna.storages.JournalStorage(backend),
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a process that is gone
        optuna.trial.Trial(study, trial._trial_id).set_user_attr(CUT, True)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _mend(journal: Path) -> None:
    """Undo what a kill left: half a line at the journal's end, and the lock of a process that is gone."""
    for left in journal.parent.glob(f"{journal.name}.lock*"):  # the run folder's own lock says that nobody is there
        left.unlink(missing_ok=True)
    if journal.is_file():
        content = journal.read_bytes()
        with files.replacing(journal) as temporary:
            temporary.write_bytes(content[: content.rfind(b"\n") + 1])


def _ended(study: Any) -> list[Any]:
    """Trials that came to an end of their own, in their order; those that a kill cut short are run again."""
    return [trial for trial in study.trials if trial.state.is_finished() and CUT not in trial.user_attrs]


def _done(study: Any) -> int:
    return len(_ended(study))


def _trial(optuna: Any, study: Any, knobs: SearchStage, folder: RunFolder, number: int, session: Session) -> str:
    """Run one trial and tell the study; returns what to say about it."""
    trial = study.ask()
    values = _values(knobs, {axis.key: _suggest(trial, axis) for axis in knobs.space})
    said = " ".join(f"{key}={_written(value)}" for key, value in values.items())
    started = time.monotonic()

    def watch(step: int, record: dict[str, float]) -> None:
        if SCORE in record:
            trial.report(record[SCORE], step)
            if trial.should_prune():
                raise Pruned(f"after {step} steps {record[SCORE]:.4f} is below the median of the trials before")

    place = folder.path / "trials" / f"{number + 1:03d}"
    if place.is_dir():
        files.remove(place)  # a kill cut the trial short; the pruner has to see it from its beginning
    place.mkdir(parents=True)
    try:
        with (
            (place / "stdout.txt").open("w", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
        ):
            result = nested.run(_config(values, session), session.below(Parent(place, folder.path.name, watch)))
        score = result.objective or 0.0
        study.tell(trial, score)
        told = f"macro-F1 {score:.4f} on validation"
    except Pruned as stopped:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        told = f"stopped: {stopped}"
    except FinsaError as error:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        told = f"failed: {error}"
    return f"{said}: {told}, {time.monotonic() - started:.0f} s"


def _suggest(trial: Any, axis: Axis) -> Any:
    if axis.values is not None:
        return trial.suggest_categorical(axis.key, list(axis.values))
    draw = trial.suggest_int if isinstance(axis.low, int) and isinstance(axis.high, int) else trial.suggest_float
    return draw(axis.key, axis.low, axis.high, log=axis.log)


def _values(knobs: SearchStage, drawn: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial, drawn numbers with four digits: what was run is what can be typed again."""
    return {axis.key: _rounded(axis, drawn[axis.key]) for axis in knobs.space}


def _rounded(axis: Axis, value: Any) -> Any:
    if axis.low is None or axis.high is None or not isinstance(value, float):
        return value
    return min(max(float(f"{value:.4g}"), axis.low), axis.high)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _config(values: dict[str, Any], session: Session) -> RunConfig:
    """The configuration of a trial: the command's own but for the stage, and the trial's values."""
    kept = [text for text in session.overrides if text.split("=")[0].split(".")[0] not in ("stage", "resume")]
    overrides = [*kept, "stage=train", "stage.compare_base=false"]
    overrides += [f"{key}={_written(value)}" for key, value in values.items()]
    return compose.build(*compose.compose_values(overrides, session.folders), overrides)


def _conclude(study: Any, knobs: SearchStage, folder: RunFolder) -> Result:
    """Write the trials and say which is best."""
    trials = [
        {"trial": number, "state": one.state.name.lower(), "macro_f1": one.value, **_values(knobs, one.params)}
        for number, one in enumerate(_ended(study), start=1)
    ]
    if not any(one["state"] == "complete" for one in trials):
        raise FinsaError("no trial came to its end; the last lines of trials/*/stdout.txt say why")
    best = study.best_trial
    number = [one.number for one in _ended(study)].index(best.number) + 1
    values = _values(knobs, best.params)
    found = {"best": {"trial": number, "macro_f1": best.value, **values}, "trials": trials}
    folder.write_json("search.json", found)
    with files.replacing(folder.path / "trials.csv") as temporary:
        pl.DataFrame(trials, infer_schema_length=None).write_csv(temporary)
    with files.replacing(folder.path / "search.png") as temporary:
        figures.search([one["macro_f1"] for one in trials], temporary)
    words = " ".join(f"{key}={_written(value)}" for key, value in values.items())
    print(f"best: trial {number} of {len(trials)}, macro-F1 {best.value:.4f} on the validation split")
    print(f"use it with: {words}")
    print(f"run folder: {folder.path}")
    return Result("search", folder.path, {"validation": {"macro_f1": best.value}}, best.value)
