"""Arms of a comparison: runs that differ in nothing but the seed, and whether they can be compared at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.errors import RunError
from finsa.evaluation.finished_runs import Run

# Where a run was written and how it was started does not make it another arm.
APART = {
    *("seed", "experiment", "sweep", "published", "stage", "tracking", "output_dir", "output", "models"),
    *("resume", "fresh", "reuse_outdated"),
    *("run", "runs", "port", "input", "text", "format"),
}
BESIDE = ("name", "experts", "missing", "compare")  # of a mixture's stage: where its experts come from, what is shown
PLACES = ("data.files", "data.cache", "data.origin")  # the rows themselves are compared instead


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed.

    Args:
        name: what tells it from the other arms.
        runs: at least one, by seed.
    """

    name: str
    runs: list[Run]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.runs[0].config["method"]["name"])

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.runs[0].config["model"]["name"])

    @property
    def seeds(self) -> list[int]:
        """Of its runs."""
        return [run.config["seed"] for run in self.runs]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Predicted classes, (runs, n)."""
        return np.array([run.predicted for run in self.runs])


# ------------------------------------------------------------------------------------------------ what can be compared


def comparable(
    runs: Sequence[Run], training_rows: str, named: Collection[Path] = ()
) -> tuple[list[Run], dict[str, str]]:
    """The runs that can stand in one report: of the same labels and rows, without which scores cannot be compared.

    A folder may hold others, such as the experts of a mixture, which are scored on the rows of their domains. The
    largest group of runs that agree is taken.

    Args:
        training_rows: ``same``: those must be the same as well; ``any``: the test rows alone.
        named: run folders that the user has named one by one; none of these may be left out.

    Returns:
        The runs, and why the others are left out, by folder.

    Raises:
        RunError: naming two runs that differ and in what, where several groups are the largest or a named run is left
            out.
    """
    groups: list[list[Run]] = []
    for run in runs:
        fitting = (group for group in groups if not list(_differences(group[0], run, training_rows)))
        group = next(fitting, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    groups.sort(key=len, reverse=True)
    kept, *others = groups
    out = [run for group in others for run in group]
    if others and (len(others[0]) == len(kept) or any(run.path in named for run in out)):
        first, other = kept[0], others[0][0]
        sets = " or ".join(f"runs=[{','.join(str(run.path) for run in group)}]" for group in groups if len(group) > 1)
        raise RunError(
            f"runs: {first.path} and {other.path} cannot stand in one report: "
            f"{'; '.join(_differences(first, other, training_rows))}. "
            + (f"Report {sets}" if sets else "Report them separately")
            + ", or score them on the same rows with stage=evaluate"
        )
    reasons = {str(run.path): f"other {'; '.join(_differences(kept[0], run, training_rows))}" for run in out}
    return [run for run in runs if str(run.path) not in reasons], reasons


def _differences(first: Run, other: Run, training_rows: str) -> Iterator[str]:
    if first.labels != other.labels:
        yield f"labels: {', '.join(first.labels)} against {', '.join(other.labels)}"
    one, its = _data(first, other), _data(other, first)
    if first.rows != other.rows:
        same = len(set(first.rows) & set(other.rows))
        yield (
            f"test rows: {one} ({len(first.rows):,} rows) against {its} ({len(other.rows):,} rows, {same:,} of them "
            "the same)"
        )
    elif training_rows == "same" and first.facts["data_fingerprint"] != other.facts["data_fingerprint"]:
        counts = [sum(run.ledger.get("splits", {}).get("train", {}).values()) for run in (first, other)]
        yield (
            f"training or validation rows: {one} ({counts[0]:,} training rows) against {its} ({counts[1]:,} training "
            "rows); the test rows are the same, so stage.training_rows=any compares them"
        )


def _data(run: Run, other: Run) -> str:
    """A run's data, by name and place and whatever else differs from another run's."""
    data, its = (dict(_flat(one.config["data"])) for one in (run, other))
    if (data["name"], data.get("files")) == (its["name"], its.get("files")):
        keys = [key for key in {**data, **its} if key != "cache" and data.get(key) != its.get(key)]
        if not keys:  # the files themselves have changed
            return f"data={data['name']} with fingerprint {run.facts['data_fingerprint']}"
        return " ".join([f"data={data['name']}", *(f"data.{key}={_written(data.get(key))}" for key in keys[:4])])
    return f"data={data['name']} data.files={_written(data.get('files'))}"


def _written(value: Any) -> str:
    return "null" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ grouping


def group(runs: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    """Group runs that differ in nothing but the seed.

    Returns:
        The arms, in the order of their first runs, and what a reader should know about them.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    notes = []
    for members in groups.values():
        kept = {(run.config["seed"], run.predicted.tobytes()): run for run in reversed(members)}
        if len(kept) < len(members):
            notes.append(f"{len(members) - len(kept)} copies of {members[0].path} (same seed and answers) count once.")
        members[:] = sorted(kept.values(), key=lambda run: run.config["seed"])
    settings = [_settings(members[0]) for members in groups.values()]
    names, unnamed = _names(settings)
    if unnamed:
        shown = ", ".join(f"{key} ({', '.join(values)})" for key, values in unnamed.items())
        notes.append(f"Beyond what their names say, the arms differ in {shown}.")
    return [Arm(name, members) for name, members in zip(names, groups.values(), strict=True)], notes


def _settings(run: Run) -> dict[str, str]:
    """What decides a run, flat; unset values are left out, so that versions with and without a key agree."""
    apart = set(APART)
    config = dict(run.config)
    method = config["method"]
    if method["learn"] == "nothing" and not method.get("baseline"):  # then how it would have learnt decides nothing
        apart.add("train")
        config["method"] = {key: config["method"].get(key) for key in ("name", "learn", "quantization")}
    stage = config["stage"]
    if stage["name"] == "moe_joint":  # a mixture is another arm than an adapter, and each way of making it one more
        config["method"] = {**config["method"], "name": f"{method['name']} mixture"}
        config["mixture"] = {key: value for key, value in stage.items() if key not in BESIDE}
    flat = dict(_flat(config))
    decide = [key for key in flat if key.split(".")[0] not in apart and not key.startswith(PLACES)]
    return {key: str(flat[key]) for key in decide if flat[key] is not None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _names(settings: Sequence[dict[str, str]]) -> tuple[list[str], dict[str, list[str]]]:
    """Name arms by method, by model where there are several, and by whatever else tells two of one name apart.

    Returns:
        The names, and the settings beside method and model in which arms differ without their names saying so.
    """
    several = len({one["model.name"] for one in settings}) > 1
    short = [f"{one['method.name']} {one['model.name']}" if several else one["method.name"] for one in settings]
    names, said = list(short), set()
    for name, count in Counter(short).items():
        if count > 1:
            same = [one for one, other in zip(settings, short, strict=True) if other == name]
            keys = _differing(same)
            said |= set(keys)
            for place, one in enumerate(settings):
                if short[place] == name:
                    names[place] = " ".join([name, *(f"{key}={one.get(key)}" for key in keys)])
    learnt = [one for one in settings if one["method.learn"] != "nothing"]
    # That a mixture has settings which an adapter has not is said by its name.
    alike = [key for key in _differing(learnt) if not key.startswith("mixture.") or all(key in one for one in learnt)]
    hidden = [key for key in alike if not key.startswith(("method.", "model.")) and key not in said]
    return names, {key: sorted({one.get(key, "-") for one in learnt}) for key in hidden}


def _differing(settings: Sequence[dict[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({one.get(key) for one in settings}) > 1]
