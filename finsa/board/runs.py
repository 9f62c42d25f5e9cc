"""The runs below ``output_dir`` as the board shows them, read from their folders."""

from __future__ import annotations

import json
import math
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
from finsa.config.base import headline

APART = {"stage=report", "stage=predict", "stage=check"}  # commands whose results the board shows elsewhere
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
        started: local time; empty if unknown.
        words: of the command, without ``resume=true``; none for a run of an older version.
        score: of the test split: name, value and interval; None if there is none.
        facts: contents of ``run.json``.
        command: the one that wrote it last; None if it was started in a shell.
        pid: of the process that writes it; None if there is none on this machine.
    """

    name: str
    folder: Path
    status: str
    title: str
    started: str
    words: list[str]
    score: tuple[str, float, float | None, float | None] | None
    facts: dict[str, Any]
    command: Command | None
    pid: int | None

    @property
    def names(self) -> set[str]:
        """Its name, and that of the folder of the command that wrote it last."""
        return {self.name, *([f"{processes.FOLDER}/{self.command.folder.name}"] if self.command else [])}

    @property
    def resumable(self) -> bool:
        """Whether it is unfinished, and the same command resumes it."""
        ended = self.status in ("stopped", "killed", "failed") and not (self.command and self.command.running)
        return ended and bool(self.facts) and bool(self.words) and commands.resuming(self.words) is not None


@dataclass(frozen=True)
class Progress:
    """How far the training of a run has come.

    Args:
        step: last logged step.
        total: number of steps; None: unknown.
        left: seconds; None: unknown.
        score: name of the validation score.
        curves: of ``loss`` and of the validation score: steps and values.
    """

    step: int
    total: int | None
    left: float | None
    score: str
    curves: dict[str, list[tuple[int, float]]]


def listed(output_dir: Path) -> list[Entry]:
    """The runs below ``output_dir``, and commands without one, the newest first."""
    started = processes.started(output_dir)
    entries, used, latest = list[Entry](), set[Path](), dict[tuple[str, ...], str]()
    for file in output_dir.rglob("run.json"):
        if facts := _read(file):
            entry = _of_run(file.parent, output_dir, facts, processes.of_run(facts, started))
            entries.append(entry)
            used |= {entry.command.folder} if entry.command else set()
            latest[tuple(entry.words)] = max(entry.started, latest.get(tuple(entry.words), ""))
    for command in started:
        if command.folder not in used and not APART & set(command.words):
            entry = _of_command(command, output_dir)
            resumed = latest.get(tuple(map(command_line.quote, entry.words)), "")
            if entry.pid is not None or resumed < entry.started:  # otherwise an earlier sitting of a resumed run
                entries.append(entry)
    return sorted(entries, key=lambda entry: entry.started, reverse=True)[:SHOWN]


def find(output_dir: Path, name: str) -> Entry | None:
    """The entry of a name; None if there is none, whatever else the name may lead to."""
    return next((entry for entry in listed(output_dir) if name in entry.names), None)


def _of_run(folder: Path, output_dir: Path, facts: dict[str, Any], command: Command | None) -> Entry:
    status, pid = str(facts.get("status")), None
    if status == "running":
        pid = processes.writer(folder)
        status = "running" if pid is not None else "killed"
    config, score, title = _read(folder / "config.yaml"), None, folder.name
    with suppress(LookupError, TypeError):
        model = [] if config["method"].get("baseline") else [config["model"]["name"]]
        title = " · ".join([config["method"]["name"], *model, config["data"]["name"]])
        report, name = _read(folder / "metrics.json")["test"], headline(config["data"].get("task"))
        score = (name, float(report[name]), *report.get("intervals", {}).get(name, (None, None)))
    stage = f" ({facts['stage']})" if facts.get("stage", "train") != "train" else ""
    started = ""
    with suppress(ValueError):
        started = datetime.fromisoformat(str(facts.get("started"))).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    words = [word for word in facts.get("command") or [] if not word.startswith("resume=")]
    name = folder.relative_to(output_dir).as_posix()
    return Entry(name, folder, status, title + stage, started, words, score, facts, command, pid)


def _of_command(command: Command, output_dir: Path) -> Entry:
    running = command.running
    words = [word for word in command.words if not word.startswith("resume=")]
    title = " ".join(word for word in words if not word.startswith(("--config-dir", "output_dir="))) or "train"
    status = "starting" if running else ENDED.get(command.exit_code, "failed")
    name, started = f"{processes.FOLDER}/{command.folder.name}", datetime.fromtimestamp(command.born)
    pid = command.pid if running else None
    return Entry(name, command.folder, status, title, f"{started:%Y-%m-%d %H:%M:%S}", words, None, {}, command, pid)


def progress(entry: Entry) -> Progress | None:
    """Read the progress of a run from ``log.jsonl``; None if nothing has been logged.

    The number of steps follows from the epoch of a record, and the remaining time from the records of this sitting.
    """
    records, begun = [], 0.0
    with suppress(OSError), (entry.folder / "log.jsonl").open(encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):  # the last line may be written right now
                records.append(json.loads(line))
    if not records:
        return None
    train = _read(entry.folder / "config.yaml").get("train") or {}
    step, epoch, total = records[-1]["step"], records[-1].get("epoch"), train.get("max_steps")
    if epoch and step and train.get("epochs"):
        total = min(total or math.inf, math.ceil(round(step / epoch * train["epochs"], 3)))
    with suppress(ValueError):
        begun = datetime.fromisoformat(str(entry.facts.get("started"))).timestamp()
    first, left = next((one for one in records if one["time"] >= begun), records[-1]), None
    if entry.status == "running" and total and step > first["step"]:
        left = (records[-1]["time"] - first["time"]) / (step - first["step"]) * max(0, total - step)
    score = train.get("select_by") or "macro_f1"
    keys = {"loss": "loss", score: f"eval_{score}"}
    curves = {name: [(r["step"], r[key]) for r in records if r.get(key) is not None] for name, key in keys.items()}
    return Progress(step, total, left, score, curves)


def _read(file: Path) -> dict[str, Any]:
    """A file of a run folder; empty if it is missing or damaged."""
    try:
        return _parsed(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, yaml.YAMLError):
        return {}


@lru_cache(maxsize=2048)
def _parsed(file: Path, changed: int) -> dict[str, Any]:
    """The contents of a JSON or YAML file, parsed again when it has changed."""
    text = file.read_text(encoding="utf-8")
    return dict((json.loads(text) if file.suffix == ".json" else yaml.load(text, yaml.CSafeLoader)) or {})
