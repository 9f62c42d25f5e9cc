"""The runs below ``output_dir`` as the board shows them, read from their folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from finsa.board import commands, processes
from finsa.board.processes import Command
from finsa.config import command_line
from finsa.config.base import LOWER_IS_BETTER, headline

APART = ("stage=report", "stage=predict")  # commands whose results the board shows elsewhere
ENDED = {0: "done", 130: "stopped", 143: "stopped", None: "killed"}  # by exit code
SHOWN = 200  # runs in the list


@dataclass(frozen=True)
class Entry:
    """A run, or a command that has opened no run folder (yet).

    Args:
        name: path of its folder relative to ``output_dir``.
        folder: its run folder; that of the command, if there is none.
        status: ``starting``, ``running``, ``complete``, ``failed``, ``stopped``, ``killed``, ``pruned`` or ``done`` for
            a command without a run folder.
        title: method, model and data.
        stage: its name.
        started: local time; empty if unknown.
        score: of the test split: name, value and interval; None if there is none.
        facts: contents of ``run.json``.
        command: the command that wrote it last; None if it was started in a shell.
        pid: of the process that writes it; None if there is none on this machine.
    """

    name: str
    folder: Path
    status: str
    title: str
    stage: str
    started: str
    score: tuple[str, float, float | None, float | None] | None
    facts: dict[str, Any]
    command: Command | None
    pid: int | None

    @property
    def words(self) -> list[str]:
        """The words that started it, without ``resume=true``; none for a run of an older version."""
        given = self.facts.get("command") if self.facts else list(self.command.words) if self.command else None
        return [word for word in given or [] if not word.startswith("resume=")]

    @property
    def resumable(self) -> bool:
        """Whether it is unfinished, and the same command resumes it."""
        ended = self.status in ("stopped", "killed", "failed") and bool(self.facts)
        return ended and bool(self.words) and commands.resuming(self.words) is not None


@dataclass(frozen=True)
class Progress:
    """How far the training of a run has come.

    Args:
        step: last logged step.
        total: number of steps; None: unknown.
        left: seconds; None: unknown.
        curves: of ``loss`` and of the validation score: steps and values.
        score: name of the validation score.
    """

    step: int
    total: int | None
    left: float | None
    curves: dict[str, list[tuple[float, float]]]
    score: str


def listed(output_dir: Path) -> list[Entry]:
    """The runs below ``output_dir``, and commands without one, the newest first."""
    started = processes.started(output_dir)
    entries, used = list[Entry](), set[Path]()
    for file in output_dir.rglob("run.json"):
        facts = _json(file, file.stat().st_mtime_ns)
        if not facts:
            continue
        command = processes.match(facts, started)
        if command is not None:
            used.add(command.folder)
        entries.append(_of_run(file.parent, output_dir, facts, command))
    latest: dict[tuple[str, ...], str] = {}
    for entry in entries:
        latest[tuple(entry.words)] = max(entry.started, latest.get(tuple(entry.words), ""))
    for command in started:
        if command.folder in used or set(APART) & set(command.words):
            continue
        entry = _of_command(command, output_dir)
        resumed = latest.get(tuple(map(command_line.quote, entry.words)), "")
        if entry.pid is not None or resumed < entry.started:  # otherwise an earlier sitting of a run that was resumed
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry.started, reverse=True)[:SHOWN]


def names(entry: Entry, output_dir: Path) -> list[str]:
    """The names of an entry: that of its run folder, and that of the command that wrote it last."""
    return [entry.name, *([entry.command.folder.relative_to(output_dir).as_posix()] if entry.command else [])]


def find(output_dir: Path, name: str) -> Entry | None:
    """The entry of a name; None if there is none, whatever else the name may lead to."""
    return next((entry for entry in listed(output_dir) if name in names(entry, output_dir)), None)


def _of_run(folder: Path, output_dir: Path, facts: dict[str, Any], command: Command | None) -> Entry:
    status, pid = str(facts.get("status")), None
    if status == "running":
        pid = processes.writer(folder)
        status = "running" if pid is not None else "killed"
    config = folder / "config.yaml"
    title, task = _title(config, config.stat().st_mtime_ns) if config.is_file() else ("", "")
    score = None
    with suppress(OSError, LookupError, TypeError, ValueError):
        report = _json(folder / "metrics.json", (folder / "metrics.json").stat().st_mtime_ns)["test"]
        name = headline(task)
        low, high = report.get("intervals", {}).get(name, (None, None))
        score = (name, float(report[name]), low, high)
    return Entry(
        name=folder.relative_to(output_dir).as_posix(),
        folder=folder,
        status=status,
        title=title,
        stage=str(facts.get("stage")),
        started=_local(facts.get("started")),
        score=score,
        facts=facts,
        command=command,
        pid=pid,
    )


def _of_command(command: Command, output_dir: Path) -> Entry:
    running = command.running
    stage = next((word.partition("=")[2] for word in command.words if word.startswith("stage=")), "train")
    return Entry(
        name=command.folder.relative_to(output_dir).as_posix(),
        folder=command.folder,
        status="starting" if running else ENDED.get(command.exit_code, "failed"),
        title=" ".join(word for word in command.words if not word.startswith(("--config-dir", "output_dir="))) or stage,
        stage=stage,
        started=datetime.fromtimestamp(command.born).strftime("%Y-%m-%d %H:%M:%S"),
        score=None,
        facts={},
        command=command,
        pid=command.pid if running else None,
    )


def progress(entry: Entry) -> Progress | None:
    """Read the progress of a run from ``log.jsonl``; None if nothing has been logged.

    The number of steps follows from the epoch of a record, and the remaining time from the records of this sitting.
    """
    records = []
    with suppress(OSError), (entry.folder / "log.jsonl").open(encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):  # the last line may be written right now
                records.append(json.loads(line))
    if not records:
        return None
    config = entry.folder / "config.yaml"
    train, score = {}, "macro_f1"
    with suppress(OSError, LookupError, yaml.YAMLError):
        train = _yaml(config, config.stat().st_mtime_ns)["train"]
        score = train.get("select_by") or score
    last = records[-1]
    step, epoch = int(last.get("step", 0)), last.get("epoch")
    total = train.get("max_steps")
    if epoch and step and train.get("epochs"):
        by_epoch = math.ceil(round(step / epoch * float(train["epochs"]), 3))
        total = min(total, by_epoch) if total else by_epoch
    left = None
    begun = 0.0
    with suppress(ValueError):
        begun = datetime.fromisoformat(str(entry.facts.get("started"))).timestamp()
    sitting = [record for record in records if record.get("time", 0) >= begun]
    if entry.status == "running" and total and len(sitting) > 1 and sitting[-1]["step"] > sitting[0]["step"]:
        seconds = sitting[-1]["time"] - sitting[0]["time"]
        left = seconds / (sitting[-1]["step"] - sitting[0]["step"]) * max(0, total - step)
    keys = {"loss": "loss", score: f"eval_{score}"}
    curves = {name: [(r["step"], r[key]) for r in records if r.get(key) is not None] for name, key in keys.items()}
    return Progress(step, total, left, curves, score)


def chart(points: Sequence[tuple[float, float]], width: float, height: float) -> dict[str, Any] | None:
    """The coordinates of a curve in a picture of this size, and what its axes show; None for fewer than two points."""
    if len(points) < 2:
        return None
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    across = (steps[-1] - steps[0]) or 1.0

    def place(step: float, value: float) -> str:
        return f"{(step - steps[0]) / across * width:.1f},{height - (value - low) / room * height:.1f}"

    return {
        "line": " ".join(place(*point) for point in points),
        "end": place(*points[-1]).split(","),
        "low": low,
        "high": high,
        "first": int(steps[0]),
        "last": int(steps[-1]),
    }


def best(progress: Progress) -> float | None:
    """The best validation score so far; None without one."""
    values = [value for _, value in progress.curves.get(progress.score, [])]
    return (min if progress.score in LOWER_IS_BETTER else max)(values, default=None)


def _local(written: Any) -> str:
    with suppress(ValueError):
        return datetime.fromisoformat(str(written)).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return ""


@lru_cache(maxsize=2048)
def _json(file: Path, changed: int) -> dict[str, Any]:
    """A JSON object, read again when the file has changed; empty if it is missing or damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


@lru_cache(maxsize=512)
def _yaml(file: Path, changed: int) -> dict[str, Any]:
    return dict(yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader) or {})


def _title(file: Path, changed: int) -> tuple[str, str]:
    """Method, model and data of a run, and its task."""
    try:
        config: Mapping[str, Any] = _yaml(file, changed)
        method, data = config["method"], config["data"]
        model = [] if method.get("baseline") else [config["model"]["name"]]
        return " · ".join([method["name"], *model, data["name"]]), str(data.get("task") or "")
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError):
        return file.parent.name, ""
