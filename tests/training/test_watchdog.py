"""The heartbeat has step and memory; a stalled step is reported with its current line."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finsa.config import RunConfig, Train
from finsa.errors import Stopped
from finsa.runs import signals
from finsa.training.watchdog import BEATS, HEARTBEAT, STACKS, Watch


class State:
    global_step = 7


def section(config: Callable[..., RunConfig], *words: str) -> Train:
    return config("train.heartbeat_seconds=0.05", "train.stall_seconds=0.3", *words).train


def stand_still(seconds: float) -> None:
    time.sleep(seconds)


def test_heartbeat_and_stall(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(section(config), tmp_path)
    with watch.watching(), watch.stepping():
        watch.on_step_end(None, State, None)
        with watch.pause():
            stand_still(0.6)
        assert not (tmp_path / STACKS).exists(), "a validation takes the time it takes"
        stand_still(1.0)
        beat = json.loads((tmp_path / HEARTBEAT).read_text())
        beats = [json.loads(line) for line in (tmp_path / BEATS).read_text().splitlines()]
    assert (beat["step"], beat["stepping"]) == (7, True)
    assert len(beats) > 2
    assert beats[-1].keys() == beat.keys()
    assert {each["step"] for each in beats} <= {0, 7}
    assert {each["stepping"] for each in beats} == {True, False}
    assert beat["memory_bytes"] > 1e7
    assert beat["seconds_since_step"] > 0.1
    assert "in stand_still" in (tmp_path / STACKS).read_text()
    told = capsys.readouterr().err
    assert told.count("step 8 has not ended for") == 1
    assert "still waiting" in told


def test_a_stall_ends_training_if_configured(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    watch = Watch(section(config, "train.stall_ends=true"), tmp_path)
    began = time.monotonic()
    with pytest.raises(Stopped) as told, signals.deferred(), watch.watching(), watch.stepping():
        stand_still(20)
    assert time.monotonic() - began < 10
    assert told.value.number == signal.SIGTERM


def test_without_either_there_is_no_thread(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    watch = Watch(config("train.heartbeat_seconds=null", "train.stall_seconds=null").train, tmp_path)
    with watch.watching():
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []
