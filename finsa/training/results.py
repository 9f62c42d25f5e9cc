"""What a training run of any kind writes down and shows; no trainer here, for which baselines need not wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finsa import processes, runs, tracking
from finsa.config import RunConfig
from finsa.data import task
from finsa.evaluation import outcome, tables
from finsa.runs import RunFolder


def calibrate(
    cfg: RunConfig, job: task.Labelled, folder: RunFolder, metrics: dict[str, Any], scores: dict[str, Any]
) -> None:
    """Fit the temperature that predicted probabilities are given at; scores and answers stay what they are.

    Args:
        metrics: gets what the temperature does to ECE and log loss.
        scores: of the validation rows, which it is fitted on, and of the test rows, (n, c).
    """
    if cfg.train.calibrate:
        metrics["calibration"] = outcome.calibration(job, scores)
        folder.note(calibration={"temperature": metrics["calibration"]["temperature"]})


def recorder(folder: RunFolder, tracker: tracking.Tracker) -> Callable[[int, dict[str, float]], None]:
    """Takes log records for a run folder and its tracker."""

    def record(step: int, values: dict[str, float]) -> None:
        folder.log(step, values)
        tracker.log(step, values)
        runs.tell(step, values)

    return record


def write(
    cfg: RunConfig,
    job: task.Labelled,
    folder: RunFolder,
    tracker: tracking.Tracker,
    metrics: dict[str, Any],
    scores: Any,
    gates: Any = None,
    experts: Sequence[str] = (),
) -> None:
    """Write what a run has found, and show it.

    Args:
        metrics: with the test split's report; ``base`` is shown beside it where it is there.
        scores: of the test split, (n, c).
        gates: of a mixture, (n, E).
        experts: of a mixture.
    """
    if not processes.first():
        return
    folder.note(**job.fingerprints(), labels=dict(zip(job.table.labels.names, job.table.labels.words, strict=True)))
    reads_all = cfg.method.learn != "nothing" or cfg.method.baseline is not None
    cut = outcome.write_ledger(job, folder, tuple(job.table.splits) if reads_all else ("test",))
    folder.write_json("metrics.json", metrics)
    folder.write_lines("predictions.jsonl", outcome.predictions(job, "test", scores, gates, experts))
    model = [] if cfg.method.baseline is not None else [cfg.model.name]
    figure = outcome.draw(metrics["test"], ", ".join([cfg.method.name, *model, cfg.data.name]), folder.path)
    tracker.summary(outcome.flat(metrics))
    tracker.figure("confusion matrix", figure)
    rows = {f"{cfg.model.name} as it is": metrics["base"]} if "base" in metrics else {}
    tables.show_ledger(job.table.ledger, cut)
    tables.show_report(metrics["test"], f"{cfg.method.name} on the test split, by class", cfg.method)
    tables.show_comparison({**rows, cfg.method.name: metrics["test"]}, f"{cfg.data.name}, test split")
    print(f"run folder: {folder.path}")
