from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import tracker_files
import wandb
import wandb_files
from matplotlib import pyplot

from finsa.config import RunConfig
from finsa.errors import ConfigError
from finsa.runs import trackers

Config = Callable[..., RunConfig]
LABELS = ("利空", "利好")
PREDICTIONS = [
    {"id": f"r{n}", "text": "利润|上升\n", "gold": gold, "label": label, "probs": {label: 0.75}, "log_probs": {}}
    for n, (gold, label) in enumerate([LABELS, LABELS[::-1], ("利好", "利好")])
]


def written(folder: Path, records: list[dict[str, Any]]) -> Path:
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def test_without_a_key_wandb_stays_offline(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trackers.wandb_mode(config().tracking) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert trackers.wandb_mode(config().tracking) == "online"
    assert trackers.wandb_mode(config("tracking.mode=offline").tracking) == "offline"


def test_the_null_tracker_accepts_everything_and_writes_nothing(config: Config, tmp_path: Path) -> None:
    with trackers.track(config("tracking=none"), tmp_path, None) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.summary({"a": 1})
        tracker.figure("x", tmp_path / "missing.png")
        tracker.predictions(tmp_path / "missing.jsonl", LABELS)
    assert list(tmp_path.iterdir()) == []


def test_one_process_tracks_two_jobs_separately(config: Config, tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"job{number}"
        folder.mkdir()
        with trackers.track(config("tracking.mode=offline"), folder, "a sweep") as tracker:
            tracker.log(1, {"loss": float(number)})
            tracker.summary({"test/macro_f1": 0.5})
    records = [list((tmp_path / f"job{n}").glob("wandb/offline-run-*/run-*.wandb")) for n in (1, 2)]
    assert [len(found) for found in records] == [1, 1]
    assert records[0][0].name != records[1][0].name


def test_a_resumed_run_continues_its_wandb_run(config: Config, tmp_path: Path) -> None:
    for step in (1, 2):
        with trackers.track(config("tracking.mode=offline"), tmp_path, None) as tracker:
            tracker.log(step, {f"loss{step}": 1.0})
        wandb.teardown()  # as a process that ends: everything is written
    sittings = [wandb_files.run(file) for file in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))]
    assert [run["logged"] & {"loss1", "loss2"} for run in sittings] == [{"loss1"}, {"loss2"}]
    assert len({run["id"] for run in sittings}) == 1


@pytest.mark.parametrize("name", ["mlflow", "swanlab", "trackio", "tensorboard"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' dependencies
def test_a_tracker_has_what_the_run_logs_and_a_resumed_run_continues_it(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("MLFLOW_TRACKING_URI", "SWANLAB_API_KEY", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(key, raising=False)
    run, figure, project = tmp_path / "run", tmp_path / "figure.png", f"finsa-{os.getpid()}-{tmp_path.name}"
    run.mkdir()
    pyplot.figure().savefig(figure)
    pyplot.close()
    cfg = config(f"tracking={name}", f"output_dir={tmp_path}", "method=lora_focal", f"tracking.project={project}")
    for steps in ((1, 2), (2, 3)):  # the second process repeats the steps after the last checkpoint
        with trackers.track(cfg, run, "a sweep") as tracker:
            for step in steps:
                tracker.log(step, {"loss": 1 / step, "validation/macro_f1": 0.5})
            if steps == (2, 3):
                tracker.summary({"test/macro_f1": 0.75})
                tracker.figure("a figure", figure)
                tracker.predictions(written(tmp_path, PREDICTIONS), LABELS)
    assert capfd.readouterr().out == ""
    read = getattr(tracker_files, name)
    found = read({"mlflow": tmp_path, "trackio": project}.get(name, run))
    assert found.scalars["loss"] == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert found.scalars["validation/macro_f1"] == {1: 0.5, 2: 0.5, 3: 0.5}
    assert list(found.scalars["test/macro_f1"].values()) == [0.75]
    assert (found.files, found.runs) == (2, 1)
    assert "lora_focal" in found.config


def test_several_trackers_receive_the_same(config: Config, tmp_path: Path) -> None:
    cfg = config("tracking.mode=offline", "tracking.also=[tensorboard,wandb]")
    assert cfg.tracking.names == ["wandb", "tensorboard"]
    with trackers.track(cfg, tmp_path, None) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.predictions(written(tmp_path, PREDICTIONS), LABELS)
    wandb.teardown()
    logged = wandb_files.run(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")))["logged"]
    assert {"loss", "predictions"} <= logged
    assert any(name.startswith("confusion matrix (interactive)") for name in logged)
    found = tracker_files.tensorboard(tmp_path)
    assert (found.scalars, found.files) == ({"loss": {1: 0.5}}, 1)
    assert config("tracking=none", "tracking.also=[tensorboard]").tracking.names == ["tensorboard"]


def test_a_table_of_predictions_is_capped_and_has_no_nested_values(tmp_path: Path) -> None:
    tables = []

    class Kept(trackers.RunTracker):
        def table(self, name, columns, rows):  # type: ignore[no-untyped-def]
            tables.append((columns, rows))

    Kept().predictions(written(tmp_path, PREDICTIONS * 1000), LABELS)
    sets = [{"id": "a", "text": "x", "gold": ["A", "B"], "label": [], "log_odds": {}}]
    Kept().predictions(written(tmp_path, sets), ("A", "B"))
    (columns, rows), (others, cells) = tables
    assert (columns, len(rows)) == (["id", "text", "gold", "label", "probability"], trackers.MAX_ROWS)
    assert rows[0] == ["r0", "利润|上升\n", "利空", "利好", 0.75]
    assert (others, cells) == (["id", "text", "gold", "label"], [["a", "x", '["A", "B"]', "[]"]])


def test_a_missing_library_is_reported_with_its_extra(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name in ("mlflow", "swanlab") else name)
    trackers.require_installed(config("tracking=trackio").tracking)
    with pytest.raises(ConfigError, match=r"mlflow, swanlab not installed: pip install 'finsa\[mlflow,swanlab\]'"):
        trackers.require_installed(config("tracking=mlflow", "tracking.also=[swanlab,tensorboard]").tracking)


def test_a_sweep_and_its_report_are_one_group_in_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    done = commands.run(
        "-m",
        "method=majority,lexicon_zh",
        "tracking=mlflow",
        "tracking.also=[tensorboard]",
        f"output_dir={tmp_path}",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("finsa").experiment_id])
    assert sorted(run.data.tags["finsa.job_type"] for run in runs) == ["report", "train", "train"]
    assert len({run.data.tags["finsa.group"] for run in runs}) == 1
    (report,) = (run for run in runs if run.data.tags["finsa.job_type"] == "report")
    assert {"report.html", "table.json"} <= {file.path for file in client.list_artifacts(report.info.run_id)}
    for run in runs:
        if run is not report:
            metrics = run.data.metrics
            assert metrics["test/macro_f1_low"] <= metrics["test/macro_f1"] <= metrics["test/macro_f1_high"]
    assert len(list(tmp_path.rglob("tensorboard/events.*"))) == 3
