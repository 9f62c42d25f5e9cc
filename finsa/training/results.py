"""Calibration, files and tables of any training run; without torch, which some baselines do not need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finsa.config import RunConfig
from finsa.data import tokenized
from finsa.evaluation import calibration, run_results, selective, tables
from finsa.runs import processes, trackers
from finsa.runs.run_folder import RunFolder
from finsa.session import Session


def calibrate(
    cfg: RunConfig, data: tokenized.Labeled, folder: RunFolder, metrics: dict[str, Any], log_probs: dict[str, Any]
) -> None:
    """Report the scores of the test rows, after fitting the temperature of the run's probabilities.

    The predictions of the validation rows are written too; limits of stage=predict and others are met on them.

    Args:
        metrics: receives ``test`` and ``calibration``.
        log_probs: (n, c), of the test rows and of the validation rows, on which the temperature and the thresholds of
            several labels are fitted; without validation rows, or with ``train.calibrate=false``, they are 1 and 0.5.
    """
    fitted = cfg.train.calibrate and "validation" in log_probs
    calibrated = run_results.calibration(data, log_probs, None if fitted else {"temperature": 1.0})
    metrics["test"] = run_results.report(data, "test", log_probs["test"], calibrated)
    metrics["calibration"] = calibrated
    if "validation" in log_probs:
        rows = run_results.predictions(data, "validation", log_probs["validation"], calibrated)
        folder.write_lines(selective.FILE, rows)
    if not fitted:
        return
    temperature = calibrated["temperature"]
    folder.note(calibration={name: calibrated[name] for name in ("temperature", "thresholds") if name in calibrated})
    if calibration.at_bound(temperature) and processes.is_main():
        rows = metrics["calibration"]["validation"]["n"]
        print(
            f"warning: the temperature reached its bound {temperature:g}: the {rows} validation rows do not determine "
            "it, so the probabilities are not calibrated. Use more validation rows (train.validation_rows, "
            "data.split.validation), or set train.calibrate=false"
        )


def recorder(folder: RunFolder, tracker: trackers.Tracker, session: Session) -> Callable[[int, dict[str, float]], None]:
    """A function that writes log records to a run folder and its tracker."""

    def record(step: int, values: dict[str, float]) -> None:
        folder.log(step, values)
        tracker.log(step, values)
        if session.parent is not None:
            session.parent.watch(step, values)

    return record


def write(
    cfg: RunConfig,
    data: tokenized.Labeled,
    folder: RunFolder,
    tracker: trackers.Tracker,
    metrics: dict[str, Any],
    log_probs: Any,
    gates: Any = None,
    experts: Sequence[str] = (),
    thoughts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write the results of a run, and print them.

    Args:
        metrics: with ``test`` and ``calibration``; ``base``, that of the base model, is printed next to ``test``.
        log_probs: of the test split, (n, c).
        gates: of a mixture, (n, E).
        experts: of a mixture.
        thoughts: on the test rows, (n, k); None if the model does not think.
    """
    if not processes.is_main():
        return
    folder.note(
        **data.fingerprints(), labels=dict(zip(data.dataset.labels.names, data.dataset.labels.words, strict=True))
    )
    reads_all = cfg.method.learn != "nothing" or cfg.method.baseline is not None
    truncated = run_results.write_ledger(data, folder, tuple(data.dataset.splits) if reads_all else ("test",))
    folder.write_json("metrics.json", metrics)
    rows = run_results.predictions(data, "test", log_probs, metrics["calibration"], gates, experts)
    folder.write_lines("predictions.jsonl", run_results.with_thoughts(rows, thoughts))
    if isinstance(data, tokenized.TokenizedDataset):
        _write_cards(cfg, data, folder)
    model = [] if cfg.method.baseline is not None else [cfg.model.name]
    title = ", ".join([cfg.method.name, *model, cfg.data.title])
    figure = run_results.draw_predictions(metrics["test"], title, folder.path)
    tracker.summary(run_results.flat(metrics))
    tracker.predictions(folder.path / "predictions.jsonl", data.dataset.labels.names)
    if figure is not None:
        tracker.figure(figure.stem.replace("_", " "), figure)
    name = f"{cfg.method.name} mixture" if "router" in metrics else cfg.method.name
    for drawn in run_results.write_page(cfg, folder, name, "test"):
        tracker.figure(drawn.stem.replace("_", " "), drawn)
    before = {f"{cfg.model.name} (zero-shot)": metrics["base"]} if "base" in metrics else {}
    tables.show_ledger(data.dataset.ledger, truncated)
    tables.show_report(metrics["test"], f"{cfg.method.name} on the test split, by class", cfg.method)
    if "periods" in metrics["test"]:
        tables.by_period({cfg.method.name: metrics["test"]["periods"]}).show()
    tables.scores({**before, cfg.method.name: metrics["test"]}, f"{cfg.data.title}, test split").show()
    print(f"run folder: {folder.path}")


def _write_cards(cfg: RunConfig, data: tokenized.TokenizedDataset, folder: RunFolder) -> None:
    """Write a model card next to the weights of the run, replacing the empty one of PEFT."""
    from finsa.inference import model_cards  # imports torch, and baselines write no card

    for place in sorted((folder.path / "adapters").glob("*/")):
        model_cards.write(place, "adapter", cfg, folder.path, folder.facts, data.renderer)
    if (folder.path / "model").is_dir():
        model_cards.write(folder.path / "model", "merged", cfg, folder.path, folder.facts, data.renderer)
