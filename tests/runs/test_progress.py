"""Progress of long work: bars on a terminal, lines elsewhere, and a heartbeat as long as a run lasts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.runs import progress
from finsa.runs.progress import Display
from finsa.training.watchdog import BEATS

CLOCK = r"\d:\d\d:\d\d"


def plain(text: str) -> list[str]:
    """The output without terminal control codes."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)) if line.strip()]


def test_without_a_terminal_progress_is_printed_at_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(every=0.2)
    with display.work("scoring test", 1200) as work:
        work.moved(300)
        time.sleep(0.5)
        with display.work("loading", None):  # the inner work is the one that is shown
            time.sleep(0.3)
    lines = plain(capsys.readouterr().err)
    assert len(lines) == 3
    for line in lines[:2]:
        assert re.fullmatch(rf"  scoring test: 300 of 1,200, {CLOCK} elapsed, about {CLOCK} left", line)
    assert re.fullmatch(rf"  loading: {CLOCK} elapsed", lines[2])


def test_progress_lines_can_be_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(every=None).work("scoring test", 10):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("short", [10.0, 0.1])
def test_a_terminal_shows_a_progress_bar_for_long_work(
    short: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "SHORT", short)
    display = Display(every=0.05)
    with display.work("scoring test", 10) as work:
        work.moved(4)
        time.sleep(0.5)
    lines = plain(capsys.readouterr().err)
    if short > 1:
        assert lines == []
    else:
        assert re.match(r"scoring test \S+ +4/10 ", lines[-1])
        assert not any("elapsed" in line for line in lines)


def test_a_run_shows_progress_and_updates_its_heartbeat_to_the_end(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finsa.stages import train

    words = (FEW, "train=smoke", "train.max_steps=2", "tracking=none", "train.score_tokens=64", "data.max_length=61")
    often = ("train.progress_seconds=0.02", "train.heartbeat_seconds=0.02")
    done = train.run(config("method=lora_response", *words, *often, f"output_dir={tmp_path}"))
    shown = {line.strip().split(":")[0] for line in plain(capsys.readouterr().err) if " elapsed" in line}
    assert shown >= {"training", "scoring validation", "scoring test", "scoring test with the base model"}
    assert done.run_dir is not None
    beats = [json.loads(line) for line in (done.run_dir / BEATS).read_text(encoding="utf-8").splitlines()]
    stepping = [beat["stepping"] for beat in beats]
    last = max(number for number, step in enumerate(stepping) if step)
    assert beats[-1]["step"] == 2
    assert len(beats) - last > 3, "beats while the test rows are scored"
    assert {beat["step"] for beat in beats[last + 1 :]} == {2}
