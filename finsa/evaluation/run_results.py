"""Results of a run: from log-probabilities to the reports, predictions, figures and page of its folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.config import RunConfig
from finsa.config.base import COSTS
from finsa.data import times
from finsa.data.tokenized import Labeled
from finsa.data.values import TASKS
from finsa.evaluation import calibration as calibrating
from finsa.evaluation import metrics, moe, selective, tables, value_metrics
from finsa.evaluation.tables import Table
from finsa.runs import files
from finsa.runs.run_folder import RunFolder


def report(
    data: Labeled, split: str, log_probs: NDArray[np.float64], calibrated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Compute the metrics of a split.

    Args:
        data: contains the rows of the split.
        log_probs: scores of the labels, (n, c).
        calibrated: from `calibration`; temperature and thresholds decide which of several labels a row has, and the
            temperature which label has the least expected cost.
    """
    if data.task in TASKS:
        return value_metrics.report(data.dataset.labels, data.truth(split), _decided(data, log_probs, calibrated))
    result = metrics.report(data.gold(split), log_probs.argmax(axis=1).tolist(), data.dataset.labels.names)
    rows = data.dataset.splits[split]
    if "time" in rows.columns and rows["time"].null_count() < rows.height:
        of_rows = times.periods([None if time is None else datetime.fromisoformat(time) for time in rows["time"]])
        predicted = log_probs.argmax(axis=1).tolist()
        result["periods"] = metrics.by_period(data.gold(split), predicted, of_rows, data.dataset.labels.names)
    by_cost = {name: function for name, function in data.measures.items() if name in COSTS}
    others = {name: function for name, function in data.measures.items() if name not in COSTS}
    values, intervals = metrics.measures(others, data.gold(split), log_probs)
    # Decisions by expected cost depend on how certain the model is, so they are made with calibrated probabilities.
    scaled = log_probs / (calibrated or {}).get("temperature", 1.0)
    costs, cost_intervals = metrics.measures(by_cost, data.gold(split), scaled)
    values, intervals = {**values, **costs}, {**intervals, **cost_intervals}
    if values:  # null where a measure is not defined, because NaN is not JSON
        result["measures"] = {name: None if np.isnan(value) else value for name, value in values.items()}
        result["intervals"] |= {name: ends for name, ends in intervals.items() if not np.isnan(ends[0])}
    return result


def _decided(data: Labeled, scores: NDArray[np.float64], calibrated: Mapping[str, Any] | None) -> Any:
    """Predicted numbers or sets of labels, (n, k)."""
    given = calibrated or {}
    thresholds = list(given.get("thresholds", {}).values()) or None
    return value_metrics.decide(data.dataset.labels, scores, given.get("temperature", 1.0), thresholds)


def predictions(
    data: Labeled,
    split: str,
    log_probs: NDArray[np.float64],
    calibrated: Mapping[str, Any],
    gates: NDArray[np.float64] | None = None,
    experts: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield one prediction record per row.

    Args:
        data: contains the rows of the split.
        log_probs: scores of the labels of the first n rows, (n, c).
        calibrated: from `calibration`.
        gates: of a mixture, (n, E).
        experts: names of its experts, (E,).

    Yields:
        ``id``, ``text``, ``target`` if there is one, ``gold`` and ``label``; ``probs``, the calibrated probability of
        each label, as returned by prediction, service and exports; ``log_probs``, the uncalibrated log-probability of
        each whole label; for ordered labels ``level``, the expected level; for a mixture also ``domain`` and ``gates``.
        For regression, ``gold`` and ``number`` are numbers and there is no ``label``; with several labels, ``gold`` and
        ``label`` are lists, and ``log_odds`` replaces ``log_probs``.
    """
    names, temperature = data.dataset.labels.names, calibrated["temperature"]
    if data.task in TASKS:
        yield from _value_predictions(data, split, log_probs, calibrated)
        return
    probs = metrics.probabilities(log_probs, temperature)
    rows = data.dataset.splits[split].head(len(log_probs))
    for place, (identity, text, target, gold) in enumerate(rows.select("id", "text", "target", "label").iter_rows()):
        record = {
            "id": identity,
            "text": text,
            **({} if target is None else {"target": target}),
            "gold": names[gold],
            "label": names[int(log_probs[place].argmax())],
            "probs": {name: round(float(value), 6) for name, value in zip(names, probs[place], strict=True)},
            "log_probs": {name: round(float(value), 6) for name, value in zip(names, log_probs[place], strict=True)},
        }
        if "time" in rows.columns and rows["time"][place] is not None:
            record["time"] = rows["time"][place]
        if data.task == "ordinal":
            record["level"] = round(float(metrics.expected_level(probs[place])), 6)
        if gates is not None:
            record["domain"] = rows["domain"][place]
            record["gates"] = {name: round(float(value), 6) for name, value in zip(experts, gates[place], strict=True)}
        yield record


def with_thoughts(
    records: Iterator[dict[str, Any]], thoughts: Sequence[Sequence[str]] | None
) -> Iterator[dict[str, Any]]:
    """Add to each prediction its ``thought``, or a list of several; thoughts are (n, k), None: there are none."""
    if thoughts is None:
        yield from records
        return
    for record, texts in zip(records, thoughts, strict=True):
        yield {**record, "thought": texts[0] if len(texts) == 1 else list(texts)}


def _value_predictions(
    data: Labeled, split: str, scores: NDArray[np.float64], calibrated: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    labels, truth = data.dataset.labels, data.truth(split)
    rows = data.dataset.splits[split].head(len(scores))
    predicted = _decided(data, scores, calibrated)
    probs = value_metrics.probabilities(labels, scores, calibrated["temperature"])
    for place, (identity, text, target) in enumerate(rows.select("id", "text", "target").iter_rows()):
        record = {"id": identity, "text": text, **({} if target is None else {"target": target})}
        if data.task == "regression":
            record |= {"gold": float(truth[place, 0]), "number": float(f"{predicted[place, 0]:.7g}")}
        else:
            sides = ("gold", truth[place]), ("label", predicted[place])
            record |= {key: [name for name, has in zip(labels.names, row, strict=True) if has] for key, row in sides}
        if probs.shape[1]:
            kinds = {"probs": probs, "log_odds" if data.task == "multi_label" else "log_probs": scores}
            for key, of in kinds.items():
                record[key] = {name: round(float(one), 6) for name, one in zip(labels.names, of[place], strict=True)}
        yield record


def answers(data: Labeled, split: str, texts: Sequence[str], parsed: Sequence[int | None]) -> Iterator[dict[str, Any]]:
    """Yield one record per generated answer: id, text, gold, answer, and the parsed label (null if none)."""
    names, rows = data.dataset.labels.names, data.dataset.splits[split]
    for (identity, text, gold), answer, label in zip(
        rows.select("id", "text", "label").iter_rows(), texts, parsed, strict=True
    ):
        known = None if label is None else names[label]
        yield {"id": identity, "text": text, "gold": names[gold], "answer": answer, "label": known}


def calibration(
    data: Labeled, log_probs: dict[str, NDArray[np.float64]], known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Compute the calibration error and the log loss, with and without the temperature.

    Args:
        data: contains the true classes.
        log_probs: scores of the first n rows of each split, (n, c).
        known: ``temperature``, and for several labels ``thresholds``; None: they are fitted on the ``validation`` rows.
    """
    if data.task in TASKS:
        truth = {split: data.truth(split)[: len(values)] for split, values in log_probs.items()}
        return {**value_metrics.calibrate(data.dataset.labels, log_probs, truth, known is None), **(known or {})}
    temperature = None if known is None else known["temperature"]
    gold = {split: data.gold(split)[: len(values)] for split, values in log_probs.items()}
    if temperature is None:
        temperature = calibrating.fit_temperature(log_probs["validation"], gold["validation"])
    reports = {split: calibrating.report(values, gold[split], temperature) for split, values in log_probs.items()}
    return {"temperature": temperature, "bins": calibrating.BINS, **reports}


def validation(data: Labeled, log_probs: NDArray[np.float64]) -> dict[str, float]:
    """The metrics for checkpoint selection, from the log-probabilities (n, c) of the validation split.

    The loss is the mean negative log-probability of the true label for every method, so that methods with different
    training losses can be compared; for numbers it is the mean squared error. Thresholds of several labels are those
    that suit these rows.
    """
    if data.task in TASKS:
        labels, truth = data.dataset.labels, data.truth("validation")[: len(log_probs)]
        thresholds = None
        if data.task == "multi_label":
            thresholds = value_metrics.fit_thresholds(value_metrics.probabilities(labels, log_probs), truth)
        predicted = value_metrics.decide(labels, log_probs, thresholds=thresholds)
        found = value_metrics.values(data.task, truth, predicted)
        return {"loss": value_metrics.loss(labels, log_probs, truth), **found}
    gold = np.array(data.gold("validation")[: len(log_probs)])
    result = metrics.report(gold.tolist(), log_probs.argmax(axis=1).tolist(), data.dataset.labels.names)
    loss = -float(log_probs[np.arange(len(gold)), gold].mean())
    values = metrics.values(data.measures, gold, log_probs)
    return {"loss": loss, **{name: result[name] for name in ("macro_f1", "weighted_f1", "accuracy")}, **values}


def write_ledger(data: Labeled, folder: RunFolder, splits: Collection[str]) -> dict[str, int]:
    """Write ``ledger.json``, and ``dropped.jsonl`` with the unused rows and the reasons.

    Args:
        data: of the run; another run in this process may have read more of its splits.
        folder: of the run.
        splits: the splits that this run has read.

    Returns:
        Number of rows of these splits whose text was truncated.
    """
    truncated = {split: number for split, number in data.truncated().items() if split in splits}
    folder.write_json("ledger.json", data.dataset.ledger.as_dict(truncated))
    folder.write_lines("dropped.jsonl", data.dataset.dropped.iter_rows(named=True))
    return truncated


def draw_predictions(result: dict[str, Any], title: str, folder: Path) -> Path | None:
    """Draw the confusion matrix of a report into a run folder, or its predicted and true numbers; None for sets."""
    from finsa.evaluation import figures  # imported here because matplotlib takes a second to import

    if result.get("task") == "multi_label":
        return None
    file = folder / ("numbers.png" if result.get("task") == "regression" else "confusion_matrix.png")
    with files.replacing(file) as temporary:
        if result.get("task") == "regression":
            rows = files.json_lines(folder / "predictions.jsonl")
            figures.numbers([(row["gold"], row["number"]) for row in rows], title, temporary)
        else:
            figures.confusion_matrix(result, title, temporary)
    return file


def write_page(cfg: RunConfig, folder: RunFolder, name: str, split: str | None) -> list[Path]:
    """Write a run's page, ``index.html``, and all figures but the confusion matrix, as far as the run's files allow.

    Args:
        cfg: of the run.
        folder: with ``metrics.json``, and ``log.jsonl``, ``ledger.json`` and predictions if they exist.
        name: of the scored model.
        split: the scored split; None if none was scored.

    Returns:
        The figures that were drawn.
    """
    from finsa.evaluation import figures, run_page  # imported here for the same reason, as is jinja2

    values = _read(folder.path / "metrics.json")
    log = []
    if folder.log_file.is_file():
        log = files.json_lines(folder.log_file)
    scores = list[Table]()
    if split is not None:
        if split in (values.get("calibration") or {}):
            scores.append(_calibration_table(values["calibration"]))
        if values.get("selection"):
            scores.append(selective.table({name: values["selection"]}, "Abstaining and label sets"))
    router = values.get("router") or {}
    with files.staged(folder.path) as place:
        training = []
        line = ("", figures.LINES[0], [log])
        if figures.has_steps(log):
            training.append(figures.training_curves([line], "Training", place / "training_curves.png"))
        if figures.has_penalties(log):
            training.append(figures.penalty_grid([line], place / "penalties.png"))
        routers = [figures.router({name: router}, place / "router.png")] if router else []
        periods = values[split].get("periods") if split is not None else None
        by_time = [figures.periods(periods, place / "periods.png")] if periods else []
        more = {
            "Scores": (scores, []),
            "Time": ([tables.by_period({name: periods})] if periods else [], by_time),
            "Mixture": (moe.tables(name, values), routers),
        }
        html = run_page.render(cfg, folder, name, split, _facts(cfg, folder.facts), values, log, more)
        (place / run_page.FILE).write_text(html, encoding="utf-8")
    return [folder.path / figure.file.name for figure in (*training, *routers, *by_time)]


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return values


def _facts(cfg: RunConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts about a run that its page shows."""
    trainable, total = facts.get("trainable_parameters"), facts.get("total_parameters")
    start, pairs, best = facts.get("start") or {}, facts.get("pairs") or {}, facts.get("best_validation")
    mistakes = f", {pairs['mistakes']:,} of them mistakes" if "mistakes" in pairs else ""
    values = {
        "stage": cfg.stage.name,
        "method": cfg.method.name,
        "model": None if cfg.method.baseline is not None else cfg.model.name,
        "starts from": f"{Path(start['run']).name} ({start['method']})" if start else None,
        "pairs": f"{pairs['rows']:,}{mistakes}; wrong labels from {pairs['source']}" if pairs else None,
        "data": cfg.data.title,
        "data fingerprint": facts.get("data_fingerprint"),
        "run evaluated": facts.get("run"),
        "seed": cfg.seed,
        "scoring": facts.get("scoring"),
        "device": facts.get("device"),
        "commit": str(facts.get("git_commit") or "")[:12],
        "parameters": None if trainable is None or total is None else f"{trainable:,} trainable of {total:,}",
        "best validation score": None if best is None else f"{best:.4f}",
        "training seconds": facts.get("training_seconds"),
        "samples per second": facts.get("rows_per_second"),
    }
    return {name: str(value) for name, value in values.items() if value not in (None, "", "None")}


def _calibration_table(values: Mapping[str, Any]) -> Table:
    """Calibration error and log loss by split, with and without the temperature."""
    splits = {split: one for split, one in values.items() if isinstance(one, dict) and split != "thresholds"}
    keys = [key for key in next(iter(splits.values()), {}) if key != "n"]
    rows = []
    for split, one in splits.items():
        cells = [
            f"{one[key]:.4f}" if isinstance(one[key], float) else "-" if one[key] is None else str(one[key])
            for key in keys
        ]
        rows.append([split, *cells])
    caption = f"Temperature {values['temperature']:.4f}, fitted on the validation rows; ECE of {calibrating.BINS} bins."
    if calibrating.at_bound(values["temperature"]):
        caption += (
            " The temperature is at its bound: the rows do not determine it, and probabilities are not calibrated."
        )
    titles = [key.replace("_", " ").replace("ece", "ECE") for key in keys]
    return Table("Calibration", ["split", *titles], rows, caption)


def flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested numbers to keys such as ``test/macro_f1``; lists are omitted, except the ends of intervals
    (``test/macro_f1_low`` and ``test/macro_f1_high``)."""
    values: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "intervals":
            for measure, ends in value.items():
                if ends is not None:  # of macro-F1, in a period without rows of some class
                    values |= {f"{prefix}{measure}_low": ends[0], f"{prefix}{measure}_high": ends[1]}
        elif isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            values[prefix + name] = value
    return values
