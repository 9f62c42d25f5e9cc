"""What two runs of one configuration have in common, in the order in which a difference would spread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from finsa.errors import RunError
from finsa.runs import provenance

# What a log says of speed and memory, of the time since the record before; a run that goes on begins to count anew.
TIMED = (
    *("time", "tokens_per_second", "samples_per_second", "trainable_token_share", "mfu", "peak_memory_gib"),
    *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
)
SURROUNDINGS = ("git_commit", "git_dirty", "python", "machine", "processes", "device", "versions")


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        what: is compared.
        same: whether it is equal to the last bit.
        told: how much was compared, or the first difference.
    """

    what: str
    same: bool
    told: str


def compare(first: Path, second: Path) -> list[Check]:
    """Compare two run folders.

    Raises:
        RunError: for a record that cannot be read.
    """
    facts = [_json(folder / "run.json") for folder in (first, second)]
    logs = [_log(folder / "log.jsonl") for folder in (first, second)]
    return [
        _check("data", *(known.get("data_fingerprint") for known in facts)),
        _check("prompt", *(known.get("template_fingerprint") for known in facts)),
        _check("losses", *logs),
        _check("metrics", *(_json(folder / "metrics.json") for folder in (first, second))),
        _check("predictions", *(_lines(folder / "predictions.jsonl") for folder in (first, second))),
        _weights(first, second),
    ]


def surroundings(first: Path, second: Path) -> list[str]:
    """In what the two were made differently: versions, machine, code; what an older version did not note is unknown."""
    one, other = (_json(folder / "run.json") for folder in (first, second))
    found = []
    for key in SURROUNDINGS:
        if isinstance(one.get(key), dict):
            now = other.get(key, {})
            found += [
                f"{name}: {was}, now {now[name]}" for name, was in one[key].items() if name in now and was != now[name]
            ]
        elif key in one and one[key] != other.get(key):
            found.append(f"{key}: {one[key]}, now {other.get(key)}")
    return found


def _check(what: str, first: Any, second: Any) -> Check:
    if first != second:
        return Check(what, False, _difference(first, second))
    if isinstance(first, list):
        return Check(what, True, f"{len(first):,} records")
    return Check(what, True, str(first) if isinstance(first, str) else "equal" if first else "none")


def _difference(first: Any, second: Any, path: str = "") -> str:
    """The first place in which two values differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in first | second:
            if first.get(key) != second.get(key):
                return _difference(
                    first.get(key), second.get(key), f"{path}{'.' if path and path[-1] != ' ' else ''}{key}"
                )
    if isinstance(first, list) and isinstance(second, list):
        for number, (one, other) in enumerate(zip(first, second, strict=False), start=1):
            if one != other:
                name = one.get("step", one.get("id", number)) if isinstance(one, dict) else number
                return _difference(one, other, f"{path}record {name}, ")
        return f"{len(first)} records, now {len(second)}"
    return f"{path}{': ' if path else ''}{_short(first)}, now {_short(second)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _weights(first: Path, second: Path) -> Check:
    one, other = (provenance.weights(folder) for folder in (first, second))
    differing = (name for name in one | other if one.get(name) != other.get(name))
    wrong = next((name for name in differing if not _say_the_same(first / name, second / name)), None)
    if wrong is None:
        return Check("weights", True, f"{len(one)} files")
    if wrong in one and wrong in other and wrong.endswith(".safetensors"):
        return Check("weights", False, f"{wrong}, {_tensors(first / wrong, second / wrong)}")
    return Check(
        "weights", False, f"{wrong} is {'other' if wrong in one and wrong in other else 'in one of them only'}"
    )


def _say_the_same(first: Path, second: Path) -> bool:
    """Whether two adapters' settings differ in order alone: PEFT writes sets of names, in each process as they come."""
    if first.name != "adapter_config.json" or not (first.is_file() and second.is_file()):
        return False
    one, other = (
        {key: sorted(map(str, value)) if isinstance(value, list) else value for key, value in _json(file).items()}
        for file in (first, second)
    )
    return one == other


def _tensors(first: Path, second: Path) -> str:
    try:
        one, other = load_file(first), load_file(second)
    except (TypeError, ValueError, KeyError):  # numpy knows no bfloat16
        return "its content is other"
    for name, tensor in one.items():
        if name not in other or tensor.shape != other[name].shape:
            return f"{name} is missing or of another shape"
        if not np.array_equal(tensor, other[name]):
            return f"{name} differs by up to {np.abs(tensor.astype(float) - other[name].astype(float)).max():.3g}"
    return "its header is other"


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{file} is damaged") from None
    return values


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise RunError(f"{file} is damaged") from None


def _log(file: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMED} for record in _lines(file)]
