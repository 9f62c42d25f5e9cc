"""Finished runs: read from their folders, checked for comparability, and grouped if they differ only by the seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from finsa.config import locate
from finsa.data.prompts import with_target
from finsa.errors import RunError
from finsa.runs import files, run_folder

# Keys that do not distinguish configurations: where a run was written and how it was started.
IGNORED = {
    *("seed", "experiment", "sweep", "published", "stage", "tracking", "output_dir", "output", "models"),
    *("resume", "fresh", "reuse_outdated"),
    *("run", "runs", "behavior", "port", "input", "text", "format"),
}
IGNORED_OF_MIXTURES = ("name", "experts", "missing", "compare")  # the origin of the experts, and what is reported
THOUGHT = "model.thought."
IGNORED_PATHS = ("data.files", "data.cache", "data.origin")  # the rows themselves are compared instead


@dataclass(frozen=True)
class Run:
    """A finished run with test scores.

    Args:
        path: its folder.
        config: configuration of the run; for an evaluation, of the evaluated run.
        facts: contents of ``run.json``.
        report: the ``test`` part of ``metrics.json``.
        rows: id, text (with its target) and true label of every test row.
        predicted: predicted classes, (n,); predicted numbers, (n, 1), or sets of labels, (n, c).
        confidence: calibrated probability of the predicted class, (n,); zeros for numbers and sets.
        mixed: whether the row's text has several targets with different true labels, (n,).
    """

    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    report: dict[str, Any]
    rows: list[tuple[str, str, str]]
    predicted: NDArray[Any]
    confidence: NDArray[np.float64]
    mixed: NDArray[np.bool_]

    @property
    def data(self) -> str:
        """Name of the data set of the test rows; an evaluation may score other rows than the run was trained on."""
        return str(self.facts.get("data") or self.config["data"]["name"])

    @property
    def task(self) -> str:
        """``regression`` or ``multi_label``; ``classification`` for one class per row, whether ordered or not."""
        return str(self.report.get("task", "classification"))

    @property
    def labels(self) -> list[str]:
        """The classes in their order; none for numbers."""
        return list(self.report.get("per_class", ()))

    @property
    def truth(self) -> NDArray[np.float64]:
        """True numbers, (n, 1), or sets of labels, (n, c)."""
        return _values([json.loads(gold) for _, _, gold in self.rows], self.labels)

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
        """The records of ``log.jsonl``; empty for a run without training."""
        return read_lines(self.path / "log.jsonl") if (self.path / "log.jsonl").is_file() else []

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """All of ``metrics.json``."""
        return read_json(self.path / "metrics.json")

    @cached_property
    def ledger(self) -> dict[str, Any]:
        """``ledger.json``; empty if there is none."""
        return read_json(self.path / "ledger.json") if (self.path / "ledger.json").is_file() else {}


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration that differ only by the seed.

    Args:
        name: the method, and whatever else distinguishes the group from others in the report.
        runs: at least one, sorted by seed.
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
        """The seeds of the runs."""
        return [run.config["seed"] for run in self.runs]

    @property
    def predicted(self) -> NDArray[Any]:
        """Predictions of all runs, (runs, n) or (runs, n, k)."""
        return np.array([run.predicted for run in self.runs])


# ------------------------------------------------------------------------------------------------ reading


def find_folders(names: str | Sequence[str]) -> list[Path]:
    """Find the run folders at or below each path; in sweeps, also earlier runs that jobs reused.

    Raises:
        RunError: for a path without any run folder.
    """
    folders: list[Path] = []
    for name in [names] if isinstance(names, str) else names:
        path = locate(name)
        if (path / "run.json").is_file():
            folders.append(path)
            continue
        runs = {file.parent: file.parent for file in path.rglob("run.json")}
        for file in path.rglob(run_folder.JOB):
            reused = read_json(file).get("run")
            if reused is not None and Path(reused) not in runs:
                if not (Path(reused) / "run.json").is_file():
                    raise RunError(f"{file.parent} reused {reused}, which no longer exists; repeat the sweep's command")
                runs[file.parent] = Path(reused)
        if not runs:
            raise RunError(f"runs: there is no run folder at or below {path}; name one, or the folder of a sweep")
        # Natural order: job 2 before job 10.
        numbered = {job: [int(s) if s.isdecimal() else s for s in re.split(r"([0-9]+)", str(job))] for job in runs}
        folders += [runs[job] for job in sorted(runs, key=lambda job: numbered[job])]
    return list(dict.fromkeys(folders))


def load(paths: Sequence[Path]) -> tuple[list[Run], dict[str, str]]:
    """Read run folders.

    Returns:
        The runs with test scores, and the reasons why the others were skipped, by folder.

    Raises:
        RunError: if no run has test scores, or a file is damaged.
    """
    runs, skipped = [], {}
    for path in paths:
        facts = read_json(path / "run.json")
        if facts.get("status") != "complete":
            skipped[str(path)] = f"{facts.get('status')}: {facts.get('error') or 'it may still be running'}"
        elif not (path / "predictions.jsonl").is_file() or "test" not in (metrics := read_json(path / "metrics.json")):
            skipped[str(path)] = f"has no test scores (stage={facts.get('stage')})"
        else:
            runs.append(_load_run(path, facts, metrics["test"]))
    if not runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped.items())
        raise RunError(f"runs: no finished run with test scores. {reasons}")
    return runs, skipped


def _load_run(path: Path, facts: dict[str, Any], report: dict[str, Any]) -> Run:
    records = read_lines(path / "predictions.jsonl")
    if "task" in report:
        return _load_values(path, facts, report, records)
    number = {name: place for place, name in enumerate(report["per_class"])}
    try:
        predicted = np.array([number[record["label"]] for record in records], dtype=np.int64)
        confidence = np.array([_probs(record, facts)[record["label"]] for record in records])
        rows = [(record["id"], _text(record), record["gold"]) for record in records]
        labels = dict[str, set[str]]()
        for record in records:
            labels.setdefault(record["text"], set()).add(record["gold"])
        mixed = np.array(["target" in record and len(labels[record["text"]]) > 1 for record in records], dtype=bool)
    except KeyError as error:
        raise RunError(f"{path}/predictions.jsonl does not fit metrics.json: {error} is missing") from None
    return Run(path, _config(path, facts), facts, report, rows, predicted, confidence, mixed)


def _load_values(path: Path, facts: dict[str, Any], report: dict[str, Any], records: list[dict[str, Any]]) -> Run:
    key, names = "number" if report["task"] == "regression" else "label", list(report.get("per_class", ()))
    try:
        rows = [(record["id"], _text(record), json.dumps(record["gold"], ensure_ascii=False)) for record in records]
        predicted = _values([record[key] for record in records], names)
    except (KeyError, ValueError) as error:
        raise RunError(f"{path}/predictions.jsonl does not fit metrics.json: {error} is missing") from None
    zeros = np.zeros(len(rows))
    return Run(path, _config(path, facts), facts, report, rows, predicted, zeros, zeros > 0)


def _values(cells: Sequence[Any], labels: Sequence[str]) -> NDArray[np.float64]:
    """Numbers as (n, 1), or lists of labels as (n, c) with a 1 for each label."""
    rows = [[float(name in cell) for name in labels] if labels else [float(cell)] for cell in cells]
    return np.array(rows, dtype=np.float64)


def _text(record: dict[str, Any]) -> str:
    return with_target(record["target"], record["text"]) if "target" in record else str(record["text"])


def _probs(record: dict[str, Any], facts: dict[str, Any]) -> dict[str, float]:
    """The calibrated probabilities of a prediction; older versions stored uncalibrated ones as ``scores``."""
    if "probs" in record or "scores" not in record:
        return dict(record["probs"])
    power = 1 / (facts.get("calibration") or {}).get("temperature", 1.0)
    raised = {name: share**power for name, share in record["scores"].items()}
    return {name: share / sum(raised.values()) for name, share in raised.items()}


def _config(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration as written by any version; for an evaluation, that of the evaluated run."""
    config: dict[str, Any] = yaml.load((path / "config.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    if config["stage"]["name"] == "cascade":  # runs of several seeds are one configuration, if their names are
        names = read_json(path / "run.json")["cascade"]["names"]
        config["cascade"] = {**config["stage"], "runs": " > ".join(names)}
    if facts.get("stage") != "evaluate":
        return config
    if facts.get("run") in (None, "None"):  # the base model, whichever method the command names by default
        method = {"name": "zero_shot", "learn": "nothing", "quantization": config["method"].get("quantization")}
        return {**config, "method": method}
    source = Path(facts["run"])
    if not (source / "config.yaml").is_file():
        raise RunError(f"{path} evaluates {source}, which no longer exists; name a run that still exists")
    return _config(source, {})


def read_json(file: Path) -> dict[str, Any]:
    """Read an object from a JSON file of a run folder.

    Raises:
        RunError: if the file is missing or damaged.
    """
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{file} is damaged; repeat its run, or leave it out") from None
    except FileNotFoundError:
        raise RunError(f"{file} is missing; repeat its run, or leave it out") from None
    return values


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file of a run folder.

    Raises:
        RunError: if the file is damaged.
    """
    try:
        return files.json_lines(file)
    except ValueError:
        raise RunError(f"{file} is damaged; repeat its run, or leave it out") from None


# ------------------------------------------------------------------------------------------------ comparability


def comparable(
    runs: Sequence[Run], training_rows: str, named: Collection[Path] = ()
) -> tuple[list[Run], dict[str, str]]:
    """Select runs with the same labels and test rows, so that scores can be compared.

    A folder may contain others, such as the experts of a mixture, which are scored on the rows of their domains. The
    largest set of comparable runs is selected.

    Args:
        training_rows: ``same``: training and validation rows must agree too; ``any``: only the test rows.
        named: run folders that the user named individually; none of these may be skipped.

    Returns:
        The runs, and the reasons why the others were skipped, by folder.

    Raises:
        RunError: if several sets are the largest or a named run would be skipped; names two runs and their differences.
    """
    sets: list[list[Run]] = []
    for run in runs:
        fitting = (one for one in sets if not list(_differences(one[0], run, training_rows)))
        if (same := next(fitting, None)) is None:
            sets.append([run])
        else:
            same.append(run)
    sets.sort(key=len, reverse=True)
    kept, *others = sets
    skipped = [run for one in others for run in one]
    if others and (len(others[0]) == len(kept) or any(run.path in named for run in skipped)):
        first, other = kept[0], others[0][0]
        several = " or ".join(f"runs=[{','.join(str(run.path) for run in one)}]" for one in sets if len(one) > 1)
        raise RunError(
            f"runs: {first.path} and {other.path} cannot be compared in one report: "
            f"{'; '.join(_differences(first, other, training_rows))}. "
            + (f"Report {several}" if several else "Report them separately")
            + ", or score them on the same rows with stage=evaluate"
        )
    reasons = {str(run.path): f"other {'; '.join(_differences(kept[0], run, training_rows))}" for run in skipped}
    return [run for run in runs if str(run.path) not in reasons], reasons


def _differences(first: Run, other: Run, training_rows: str) -> Iterator[str]:
    if first.task != other.task:
        yield f"tasks: {first.task} against {other.task}"
    elif first.labels != other.labels:
        yield f"labels: {', '.join(first.labels)} against {', '.join(other.labels)}"
    one, its = _describe_data(first, other), _describe_data(other, first)
    if first.rows != other.rows:
        same = len(set(first.rows) & set(other.rows))
        yield (
            f"test rows: {one} ({len(first.rows):,} rows) against {its} ({len(other.rows):,} rows, {same:,} of them "
            "the same)"
        )
    elif training_rows == "same" and first.facts["data_fingerprint"] != other.facts["data_fingerprint"]:
        counts = [
            run.ledger.get("rows", {}).get("train", sum(run.ledger.get("splits", {}).get("train", {}).values()))
            for run in (first, other)
        ]
        yield (
            f"training or validation rows: {one} ({counts[0]:,} training rows) against {its} ({counts[1]:,} training "
            "rows); the test rows are the same, so stage.training_rows=any compares them"
        )


def _describe_data(run: Run, other: Run) -> str:
    """A run's data: name, files, and the keys in which they differ from another run's."""
    data, its = (dict(_flatten(one.config["data"])) for one in (run, other))
    keys = ["files"]
    if (data["name"], data.get("files")) == (its["name"], its.get("files")):
        keys = [key for key in {**data, **its} if key != "cache" and data.get(key) != its.get(key)][:4]
    if not keys:  # the contents of the files have changed
        return f"data={data['name']} with fingerprint {run.facts['data_fingerprint']}"
    values = {key: "null" if data.get(key) is None else str(data[key]) for key in keys}
    return " ".join([f"data={data['name']}", *(f"data.{key}={value}" for key, value in values.items())])


# ------------------------------------------------------------------------------------------------ grouping


def group(runs: Sequence[Run]) -> tuple[list[RunGroup], list[str]]:
    """Group runs that differ only by the seed.

    Returns:
        The groups, in the order of their first runs, and notes about them.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    notes = []
    for members in groups.values():
        kept = {(run.config["seed"], run.predicted.tobytes()): run for run in reversed(members)}
        if len(kept) < len(members):
            notes.append(
                f"{len(members) - len(kept)} copies of {members[0].path} (same seed and predictions) count once."
            )
        members[:] = sorted(kept.values(), key=lambda run: run.config["seed"])
    settings = [_settings(members[0]) for members in groups.values()]
    names, unnamed = _names(settings)
    if unnamed:
        differing = ", ".join(f"{key} ({', '.join(values)})" for key, values in unnamed.items())
        notes.append(f"Besides what their names show, the configurations differ in {differing}.")
    return [RunGroup(name, members) for name, members in zip(names, groups.values(), strict=True)], notes


def _settings(run: Run) -> dict[str, str]:
    """The settings that affect a run, flattened; null values are dropped, so that versions without a key match."""
    ignored = set(IGNORED)
    config = dict(run.config)
    method = config["method"]
    if (method.get("reward") or {}).get("kind") != "costs":  # costs are only a measure
        ignored.add("evaluation")
    if "start" in run.facts:  # the starting runs of several seeds are one configuration, if their methods are
        method = {**method, "init": run.facts["start"]["method"], "adapter": {**method["adapter"], "init": None}}
        config["method"] = method
    if method["learn"] == "nothing" and not method.get("baseline"):  # training settings then have no effect
        ignored.add("train")
        config["method"] = {key: config["method"].get(key) for key in ("name", "learn", "quantization", "examples")}
    if config["model"].get("think") != "open":  # the settings of thoughts then have no effect
        config["model"] = {key: value for key, value in config["model"].items() if key != "thought"}
    stage = config["stage"]
    if stage["name"] == "moe_joint":  # a mixture is not the same method as an adapter, whatever its experts are
        config["method"] = {**config["method"], "name": f"{method['name']} mixture"}
        config["mixture"] = {key: value for key, value in stage.items() if key not in IGNORED_OF_MIXTURES}
    return {
        key: str(value)
        for key, value in _flatten(config)
        if value is not None and key.split(".")[0] not in ignored and not key.startswith(IGNORED_PATHS)
    }


def without_split(run: Run) -> str:
    """The settings of a run except how its rows were split, as a key."""
    settings = {key: value for key, value in _settings(run).items() if not key.startswith("data.split.")}
    return json.dumps(settings, sort_keys=True)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _names(settings: Sequence[dict[str, str]]) -> tuple[list[str], dict[str, list[str]]]:
    """Name groups by method, by model if there are several, and by the settings that distinguish equal names.

    Returns:
        The names, and the differing settings, other than method and model, that the names do not show.
    """
    # A baseline does not use the model, so its model is named only if the same baseline ran with several.
    models: dict[str | None, set[str]] = {}
    kinds = [one["method.name"] if "method.baseline.kind" in one else None for one in settings]
    for one, kind in zip(settings, kinds, strict=True):
        models.setdefault(kind, set()).add(one["model.name"])
    short = [
        f"{one['method.name']} {one['model.name']}" if len(models[kind]) > 1 else one["method.name"]
        for one, kind in zip(settings, kinds, strict=True)
    ]
    names, in_names = list(short), set()
    for name, count in Counter(short).items():
        if count > 1:
            keys = _differing([one for one, other in zip(settings, short, strict=True) if other == name])
            in_names |= set(keys)
            for place, one in enumerate(settings):
                if short[place] == name:
                    names[place] = " ".join(
                        [name, *(f"{key}={one.get(key)}" for key in keys if key in one or not key.startswith(THOUGHT))]
                    )
    trained = [one for one in settings if one["method.learn"] != "nothing"]
    # Only mixtures and cascades have their settings; their names show that already.
    differing = [
        key
        for key in _differing(trained)
        if not key.startswith(("method.", "model.")) and key not in in_names
        if not key.startswith(("mixture.", "cascade.")) or all(key in one for one in trained)
    ]
    return names, {key: sorted({one.get(key, "-") for one in trained}) for key in differing}


def _differing(settings: Sequence[dict[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    # Thoughts have settings only where the model thinks, which model.think shows already.
    having = {key: [one for one in settings if key in one or not key.startswith(THOUGHT)] for key in keys}
    found = [key for key in keys if len({one.get(key) for one in having[key]}) > 1]
    if "data.name" in found:  # a data set's name stands for its prompt and other settings
        found = [key for key in found if key == "data.name" or not key.startswith("data.")]
    # A cost matrix is long, and method.reward.kind=costs mostly says enough.
    short = [key for key in found if key != "evaluation.costs"]
    distinct = [len({tuple(one.get(key) for key in keys) for one in settings}) for keys in (short, found)]
    return short if distinct[0] == distinct[1] else found
