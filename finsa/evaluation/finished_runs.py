"""Finished runs, read from their folders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from finsa.config import locate
from finsa.errors import RunError
from finsa.runs import run_folder


@dataclass(frozen=True)
class Run:
    """A finished run with test scores.

    Args:
        path: its folder.
        config: of the run; for an evaluation, of the run that was evaluated.
        facts: of ``run.json``.
        report: the test part of ``metrics.json``.
        rows: id, text and true label of every test row.
        predicted: predicted classes, (n,).
        confidence: calibrated probability of the predicted class, (n,).
    """

    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    report: dict[str, Any]
    rows: list[tuple[str, str, str]]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @property
    def labels(self) -> list[str]:
        """The classes in their order."""
        return list(self.report["per_class"])

    @property
    def gold(self) -> NDArray[np.int64]:
        """True classes, (n,)."""
        number = {name: place for place, name in enumerate(self.labels)}
        return np.array([number[gold] for _, _, gold in self.rows], dtype=np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the predicted class is the true one, (n,)."""
        return self.predicted == self.gold

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The records of ``log.jsonl``; none for a run that trained nothing."""
        return _lines(self.path / "log.jsonl") if (self.path / "log.jsonl").is_file() else []

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """All of ``metrics.json``."""
        return _json(self.path / "metrics.json")

    @cached_property
    def ledger(self) -> dict[str, Any]:
        """``ledger.json``; empty where there is none."""
        return _json(self.path / "ledger.json") if (self.path / "ledger.json").is_file() else {}


def folders(names: str | Sequence[str]) -> list[Path]:
    """Run folders that were named, or that lie below a folder that was named.

    Raises:
        RunError: for a path without any.
    """
    found: list[Path] = []
    for name in [names] if isinstance(names, str) else names:
        path = locate(name)
        here = [path] if (path / "run.json").is_file() else _below(path)
        if not here:
            raise RunError(f"runs: there is no run folder at or below {path}; name one, or the folder of a sweep")
        found += here
    return list(dict.fromkeys(found))


def _below(path: Path) -> list[Path]:
    """Run folders below a folder, and those that a sweep's jobs there took over from earlier ones."""
    places = {file.parent: file.parent for file in path.rglob("run.json")}
    for file in path.rglob(run_folder.JOB):
        run = _json(file).get("run")
        if run is not None and Path(run) not in places:
            if not (Path(run) / "run.json").is_file():
                raise RunError(f"{file.parent} took over {run}, which is gone; repeat the sweep's command")
            places[file.parent] = Path(run)
    return [places[place] for place in sorted(places, key=_natural)]


def _natural(path: Path) -> list[str | int]:
    """Sorts job 2 before job 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", str(path))]


def read(paths: Sequence[Path]) -> tuple[list[Run], dict[str, str]]:
    """Read run folders.

    Returns:
        Those with test scores, and why the others are left out, by folder.

    Raises:
        RunError: where none has any, or a file is damaged.
    """
    found, left_out = [], {}
    for path in paths:
        facts = _json(path / "run.json")
        if facts.get("status") != "complete":
            left_out[str(path)] = f"{facts.get('status')}: {facts.get('error') or 'it may still be running'}"
        elif not (path / "predictions.jsonl").is_file() or "test" not in (metrics := _json(path / "metrics.json")):
            left_out[str(path)] = f"has no test scores (stage={facts.get('stage')})"
        else:
            found.append(_run(path, facts, metrics["test"]))
    if not found:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in left_out.items())
        raise RunError(f"runs: no finished run with test scores. {reasons}")
    return found, left_out


def _run(path: Path, facts: dict[str, Any], report: dict[str, Any]) -> Run:
    records = _lines(path / "predictions.jsonl")
    number = {name: place for place, name in enumerate(report["per_class"])}
    try:
        predicted = np.array([number[record["label"]] for record in records], dtype=np.int64)
        confidence = np.array([_probs(record, facts)[record["label"]] for record in records])
        rows = [(record["id"], record["text"], record["gold"]) for record in records]
    except KeyError as error:
        raise RunError(f"{path}/predictions.jsonl does not fit metrics.json: {error} is missing") from None
    return Run(path, _config(path, facts), facts, report, rows, predicted, confidence)


def _probs(record: dict[str, Any], facts: dict[str, Any]) -> dict[str, float]:
    """The calibrated probabilities of a prediction; a run of an older version kept them uncalibrated, as ``scores``."""
    if "probs" in record or "scores" not in record:
        return dict(record["probs"])
    power = 1 / (facts.get("calibration") or {}).get("temperature", 1.0)
    raised = {name: share**power for name, share in record["scores"].items()}
    return {name: share / sum(raised.values()) for name, share in raised.items()}


def _config(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration as written, whatever version wrote it; an evaluation's is that of the run it scored."""
    config: dict[str, Any] = yaml.load((path / "config.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    if facts.get("stage") != "evaluate":
        return config
    if facts.get("run") in (None, "None"):  # the bare model, whatever method the command's defaults name
        kept = {"name": "zero_shot", "learn": "nothing", "quantization": config["method"].get("quantization")}
        return {**config, "method": kept}
    source = Path(facts["run"])
    if not (source / "config.yaml").is_file():
        raise RunError(f"{path} evaluates {source}, which is gone; name a run that is still there")
    return _config(source, {})


def _json(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{file} is damaged; leave its run out, or repeat it") from None
    except FileNotFoundError:
        raise RunError(f"{file} is missing; leave its run out, or repeat it") from None
    return values


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except ValueError:
        raise RunError(f"{file} is damaged; leave its run out, or repeat it") from None
