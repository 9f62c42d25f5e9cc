"""A search over settings: trials are ordinary runs, the validation score selects, a stopped search resumes."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.errors import ConfigError, Pruned
from finsa.runs import run_folder, trackers
from finsa.session import Job, Parent, Session
from finsa.stages import search
from finsa.training import results

SPACE = (
    "stage.space=[{key: train.learning_rate, low: 0.0005, high: 0.01, log: true}, "
    "{key: method.adapter.rank, low: 2, high: 4}]"
)
QUICK = [FEW, "train=smoke", "train.max_steps=2", "train.batch_size=4", "tracking=none", "stage.startup=1"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return commands.run("stage=search", *words)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("search")
    done = run(
        "stage.trials=2",
        "stage.space=[{key: method.adapter.rank, values: [2, 4]}, {key: train.learning_rate, low: 1e-3, high: 1e-2}]",
        *QUICK,
        f"output_dir={folder}",
    )
    assert done.returncode == 0, done.stderr
    (found,) = (file.parent for file in folder.glob("*/run.json"))
    return done, found


def test_trials_are_runs_and_the_best_validation_score_is_reported(
    searched: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = searched
    found = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    scores = []
    for trial in found["trials"]:
        path, cfg, _ = run_folder.read(str(folder / "trials" / f"{trial['trial']:03d}"))
        assert cfg.method.adapter is not None
        assert cfg.method.adapter.rank == trial["method.adapter.rank"]
        assert cfg.train.learning_rate == trial["train.learning_rate"] == float(f"{trial['train.learning_rate']:.4g}")
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        assert trial["macro_f1"] == metrics["validation"]["macro_f1"]
        scores.append(trial["macro_f1"])
    assert found["best"]["macro_f1"] == max(scores)
    assert [trial["trial"] for trial in found["trials"]] == [1, 2]
    best = found["trials"][found["best"]["trial"] - 1]
    told = f"best: trial {best['trial']} of 2, macro-F1 {max(scores):.4f} on the validation split\nuse it with: "
    words = " ".join(f"{key}={best[key]}" for key in ("method.adapter.rank", "train.learning_rate"))
    assert f"{told}{words}\n" in done.stdout
    rows = list(csv.DictReader((folder / "trials.csv").open(encoding="utf-8")))
    assert [float(row["macro_f1"]) for row in rows] == scores
    assert (folder / "search.png").stat().st_size > 5_000
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "complete"


class Study:
    """Trials that all get the same values; the test above uses a real Optuna study."""

    def __init__(self, stop: bool) -> None:
        self.stop, self.told, self.number, self.reports = stop, [], 0, []

    def ask(self) -> Any:
        return self

    def report(self, score: float, step: int) -> None:
        self.reports.append((step, score))

    def should_prune(self) -> bool:
        return self.stop

    def suggest_categorical(self, key: str, values: list[Any]) -> Any:
        return values[0]

    def tell(self, trial: Any, *score: float, **state: Any) -> None:
        self.told.append((score, state))


def test_a_poor_trial_is_stopped_and_marked(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    import optuna

    cfg = config("stage=search", "stage.space=[{key: train.max_steps, values: [3]}]", f"output_dir={tmp_path}")
    assert isinstance(cfg.stage, search.SearchStage)
    study = Study(stop=True)
    folder = run_folder.RunFolder(tmp_path, {})
    words = [FEW, "train=smoke", "train.batch_size=4", "train.validate_every=1", "tracking=none"]
    job = Job(("stage=search", *words), {}, (), tmp_path, None, 0)
    line = search._trial(optuna, study, cfg.stage, folder, 0, Session(job), "macro_f1")
    assert "pruned: after 1 steps" in line
    assert study.told == [((), {"state": optuna.trial.TrialState.PRUNED})]
    facts = json.loads((tmp_path / "trials" / "001" / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "pruned"
    assert [step for step, _ in study.reports] == [1]
    assert not (tmp_path / "trials" / "001" / "metrics.json").exists()


def search_words(place: Path) -> tuple[str, ...]:
    return "stage=search", "stage.trials=4", "stage.startup=1", SPACE, *QUICK, f"output_dir={place}"


class Trials:
    """Stands for the runs of the trials; the score of each is its learning rate."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rates, self.stop_at = list[float](), stop_at

    def __call__(self, cfg: RunConfig, session: Session) -> run_folder.Result:
        if len(self.rates) == self.stop_at:
            raise KeyboardInterrupt
        self.rates.append(cfg.train.learning_rate)
        return run_folder.Result("train", None, {}, cfg.train.learning_rate)


@pytest.fixture(scope="module")
def interrupted(
    config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[float]]:
    """A whole search, the output folder of the same search that was interrupted in the third trial, and all rates."""
    base = tmp_path_factory.mktemp("searches")
    undisturbed, first = Trials(), Trials(stop_at=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search.nested, "run", undisturbed)
        whole = search.run(config(*search_words(base / "whole"))).run_dir
        patched.setattr(search.nested, "run", first)
        with pytest.raises(KeyboardInterrupt):
            search.run(config(*search_words(base / "cut")))
    assert whole is not None
    assert first.rates == undisturbed.rates[:2]
    return whole, base / "cut", undisturbed.rates


@pytest.mark.parametrize("damage", ["none", "half a line", "a lock of the process that is gone"])
def test_an_interrupted_search_resumes_with_the_same_trials(
    damage: str,
    interrupted: tuple[Path, Path, list[float]],
    config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, cut, rates = interrupted
    place, resumed = shutil.copytree(cut, tmp_path / "cut"), Trials()
    (journal,) = place.rglob("journal.log")
    if damage == "half a line":
        journal.write_text(journal.read_text() + '{"op_code": 5, "wor')
    if damage.startswith("a lock"):
        journal.with_name("journal.log.lock").symlink_to(journal)
    monkeypatch.setattr(search.nested, "run", resumed)
    result = search.run(config(*search_words(place), "resume=true"))
    assert resumed.rates == rates[2:]
    assert len(set(rates)) == 4
    assert result.run_dir is not None
    assert result.run_dir.parent == place
    for name in ("search.json", "trials.csv"):
        assert (result.run_dir / name).read_text() == (whole / name).read_text()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "{key: train.learning_rat, values: [1e-3, 1e-2]}",
            "train.learning_rat: unknown key. Did you mean 'train.learning_rate'",
        ),
        ("{key: data.name, values: [a, b]}", "changes what a score means"),
        ("{key: train.batch_size, values: [17, 16]}", "cannot be divided into micro-batches"),
        ("{key: train.learning_rate, low: 1.0, high: 0.1}", "must be below high"),
        ("{key: train.learning_rate, low: 1.0}", "needs values, or low and high"),
        ("{key: method, values: [lara]}", "lara"),
    ],
)
def test_an_invalid_search_space_is_refused(config: Callable[..., RunConfig], space: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search.run(config("stage=search", f"stage.space=[{space}]"))


def test_logged_values_reach_the_parent(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    seen = []
    session = Session().below(Parent(tmp_path, "whole", lambda step, values: seen.append((step, values))))
    assert (Session().group, session.group) == (None, "whole")
    for given in (Session(), session):
        with (
            run_folder.start(config("tracking=none", f"output_dir={tmp_path}"), None, given) as folder,
            trackers.track(config("tracking=none"), folder.path, given.group) as tracker,
        ):
            results.recorder(folder, tracker, given)(3, {"loss": 1.0})
        assert (folder.path == tmp_path) == (given is session)
    assert seen == [(3, {"loss": 1.0})]


def test_a_pruned_trial_is_not_a_user_error() -> None:
    assert not issubclass(Pruned, ConfigError)
