"""Comparison of two runs of the same configuration, in the order in which a difference propagates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from finsa.evaluation.finished_runs import read_json, read_lines
from finsa.runs import provenance

# Log entries about speed, memory and time, which differ between otherwise identical runs.
TIMED = (
    *("time", "tokens_per_second", "samples_per_second", "trainable_token_share", "mfu", "peak_memory_gib"),
    *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
)
ENVIRONMENT = ("git_commit", "git_dirty", "python", "machine", "processes", "device", "versions")


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        what: what is compared.
        same: whether both are bit-for-bit equal.
        details: the amount compared, or the first difference.
    """

    what: str
    same: bool
    details: str


def compare(first: Path, second: Path) -> list[Check]:
    """Compare two run folders.

    Raises:
        RunError: for a file that cannot be read.
    """
    facts = [_json(folder / "run.json") for folder in (first, second)]
    logs = [
        [{key: value for key, value in record.items() if key not in TIMED} for record in _lines(folder / "log.jsonl")]
        for folder in (first, second)
    ]
    return [
        _check("data", *(known.get("data_fingerprint") for known in facts)),
        _check("prompt", *(known.get("template_fingerprint") for known in facts)),
        _check("losses", *logs),
        _check("metrics", *(_json(folder / "metrics.json") for folder in (first, second))),
        _check("predictions", *(_lines(folder / "predictions.jsonl") for folder in (first, second))),
        _weights(first, second),
    ]


def environment_changes(first: Path, second: Path) -> list[str]:
    """Differences in versions, machine and code; entries missing in a run of an older version are ignored."""
    one, other = (_json(folder / "run.json") for folder in (first, second))
    changes = []
    for key in ENVIRONMENT:
        if isinstance(one.get(key), dict):
            now = other.get(key, {})
            changes += [
                f"{name}: {was}, now {now[name]}" for name, was in one[key].items() if name in now and was != now[name]
            ]
        elif key in one and one[key] != other.get(key):
            changes.append(f"{key}: {one[key]}, now {other.get(key)}")
    return changes


def _check(what: str, first: Any, second: Any) -> Check:
    if first != second:
        return Check(what, False, _difference(first, second))
    if isinstance(first, list):
        return Check(what, True, f"{len(first):,} records")
    return Check(what, True, str(first) if isinstance(first, str) else "equal" if first else "none")


def _difference(first: Any, second: Any, path: str = "") -> str:
    """Describe the first difference between two values."""
    if isinstance(first, dict) and isinstance(second, dict):
        dot = "." if path and path[-1] != " " else ""
        for key in first | second:
            if first.get(key) != second.get(key):
                return _difference(first.get(key), second.get(key), f"{path}{dot}{key}")
    if isinstance(first, list) and isinstance(second, list):
        for number, (one, other) in enumerate(zip(first, second, strict=False), start=1):
            if one != other:
                name = one.get("step", one.get("id", number)) if isinstance(one, dict) else number
                return _difference(one, other, f"{path}record {name}, ")
        return f"{len(first)} records, now {len(second)}"
    was, now = (text if len(text) <= 60 else f"{text[:60]}…" for text in map(str, (first, second)))
    return f"{path}{': ' if path else ''}{was}, now {now}"


def _weights(first: Path, second: Path) -> Check:
    one, other = (provenance.weights(folder) for folder in (first, second))
    differing = (name for name in one | other if one.get(name) != other.get(name))
    wrong = next((name for name in differing if not _same_settings(first / name, second / name)), None)
    if wrong is None:
        return Check("weights", True, f"{len(one)} files")
    if wrong not in one or wrong not in other:
        return Check("weights", False, f"{wrong} is in only one of them")
    if wrong.endswith(".safetensors"):
        return Check("weights", False, f"{wrong}, {_compare_tensors(first / wrong, second / wrong)}")
    return Check("weights", False, f"{wrong} differs")


def _same_settings(first: Path, second: Path) -> bool:
    """Whether two adapter configurations differ only in order: PEFT writes sets of names in arbitrary order."""
    if first.name != "adapter_config.json" or not (first.is_file() and second.is_file()):
        return False
    one, other = (
        {key: sorted(map(str, value)) if isinstance(value, list) else value for key, value in _json(file).items()}
        for file in (first, second)
    )
    return one == other


def _compare_tensors(first: Path, second: Path) -> str:
    try:
        one, other = load_file(first), load_file(second)
    except (TypeError, ValueError, KeyError):  # numpy has no bfloat16
        return "its content differs"
    for name, tensor in one.items():
        if name not in other or tensor.shape != other[name].shape:
            return f"{name} is missing or has another shape"
        if not np.array_equal(tensor, other[name]):
            return f"{name} differs by up to {np.abs(tensor.astype(float) - other[name].astype(float)).max():.3g}"
    return "its header differs"


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _lines(file: Path) -> list[dict[str, Any]]:
    return read_lines(file) if file.is_file() else []
