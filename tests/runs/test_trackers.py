from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import wandb
import wandb_files

from finsa.config import RunConfig
from finsa.runs import trackers

Config = Callable[..., RunConfig]


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
