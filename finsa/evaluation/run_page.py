"""The page of one run, in the style of a report's, and the figures that a run folder has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finsa.config import RunConfig
from finsa.evaluation import calibration, moe_figures, moe_tables, report_figures, report_page
from finsa.evaluation.figures import Figure
from finsa.evaluation.report_tables import MISSING, Sheet
from finsa.runs import files
from finsa.runs.run_folder import RunFolder

FILE = "run.html"
SECTIONS = ("Scores", "Classes", "Mixture", "Training", "Rows")
SCORES = ("accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall")


@dataclass(frozen=True)
class Page:
    """What the head of the page says.

    Args:
        title: of the page.
        facts: how the run was made.
        remarks: one sentence each.
    """

    title: str
    facts: dict[str, str]
    remarks: list[str]


def write(cfg: RunConfig, folder: RunFolder, name: str, split: str | None) -> list[Path]:
    """Draw the figures that a run folder's files allow, and write its page.

    Args:
        cfg: of the run.
        folder: with ``metrics.json``, and ``log.jsonl``, ``ledger.json`` and ``confusion_matrix.png`` if there are any.
        name: of what was scored.
        split: that was scored; None: none was.

    Returns:
        The figures that were drawn.
    """
    metrics, ledger = _json(folder.path / "metrics.json"), _json(folder.path / "ledger.json")
    log = []
    if folder.log_file.is_file():
        log = [json.loads(line) for line in folder.log_file.read_text(encoding="utf-8").splitlines()]
    sheets: dict[str, list[Sheet]] = {"Scores": [], "Classes": [], "Rows": [_rows(ledger)] if ledger else []}
    sheets["Mixture"] = moe_tables.of(name, metrics)
    remarks = []
    if split is not None:
        sheets["Scores"], sheets["Classes"] = [_scores(metrics, name, split)], [_classes(metrics[split])]
        if metrics.get("calibration"):
            sheets["Scores"].append(_calibration(metrics["calibration"]))
        low, high = metrics[split]["intervals"]["macro_f1"]
        remarks.append(
            f"Macro-F1 {metrics[split]['macro_f1']:.4f} ({low:.4f} to {high:.4f}, 95 %) on the {metrics[split]['n']:,} "
            f"{split} rows. stage=report compares runs and tests their differences."
        )
    remarks += (metrics.get("router") or {}).get("warnings", [])
    page = Page(f"{name}, {cfg.data.title}: run", _facts(cfg, folder.facts), remarks)
    with files.staged(folder.path) as place:
        drawn = {
            "Training": [report_figures.run_curves(log, place), report_figures.run_penalties(log, place)],
            "Mixture": [
                moe_figures.router({name: metrics["router"]}, place / "router.png") if metrics.get("router") else None
            ],
        }
        new = [figure for figures in drawn.values() for figure in figures if figure]
        matrix = folder.path / "confusion_matrix.png"
        if split is not None and matrix.is_file():
            title = "Confusion matrix: rows, and shares of the true class"
            drawn["Classes"] = [Figure(matrix, title, "The numbers are those of the table By class.")]
        shown = {section: [figure for figure in drawn.get(section, []) if figure] for section in SECTIONS}
        sections = [(section, sheets.get(section, []), shown[section]) for section in SECTIONS]
        (place / FILE).write_text(report_page.fill(page, sections, ""), encoding="utf-8")
    return [folder.path / figure.file.name for figure in new]


def _json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return values


def _facts(cfg: RunConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    """How the run was made, as far as it is known."""
    found = {
        "stage": cfg.stage.name,
        "method": cfg.method.name,
        "model": None if cfg.method.baseline is not None else cfg.model.name,
        "data": cfg.data.title,
        "data fingerprint": facts.get("data_fingerprint"),
        "run evaluated": facts.get("run"),
        "seed": cfg.seed,
        "scoring": facts.get("scoring"),
        "device": facts.get("device"),
        "commit": str(facts.get("git_commit") or "")[:12],
        "parameters": _counts(facts),
        "training seconds": facts.get("training_seconds"),
        "samples per second": facts.get("rows_per_second"),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "", "None")}


def _counts(facts: Mapping[str, Any]) -> str:
    trainable, total = facts.get("trainable_parameters"), facts.get("total_parameters")
    return "" if trainable is None or total is None else f"{trainable:,} trainable of {total:,}"


def _scores(metrics: Mapping[str, Any], name: str, split: str) -> Sheet:
    reports = {"base model (zero-shot)": metrics["base"]} if metrics.get("base") else {}
    rows = [
        [arm, f"{report['n']:,}", *(_score(report, score) for score in SCORES)]
        for arm, report in {**reports, name: metrics[split]}.items()
    ]
    columns = ["", "rows", "accuracy", "macro-F1", "weighted-F1", "macro-P", "macro-R"]
    return Sheet(
        f"Scores on the {split} split", columns, rows, "95 % intervals: accuracy Wilson, F1 bootstrap over rows."
    )


def _score(report: Mapping[str, Any], name: str) -> str:
    interval = report["intervals"].get(name)
    return f"{report[name]:.4f}" + (f" ({interval[0]:.4f}-{interval[1]:.4f})" if interval else "")


def _classes(report: Mapping[str, Any]) -> Sheet:
    rows = [
        [label, *(f"{one[score]:.4f}" for score in ("precision", "recall", "f1")), f"{one['support']:,}"]
        for label, one in report["per_class"].items()
    ]
    return Sheet("By class", ["class", "precision", "recall", "F1", "rows"], rows)


def _calibration(values: Mapping[str, Any]) -> Sheet:
    """Per split, what the temperature does to the probabilities."""
    splits = {split: one for split, one in values.items() if isinstance(one, dict)}
    keys = [key for key in next(iter(splits.values()), {}) if key != "n"]
    rows = [[split, *(_number(one[key]) for key in keys)] for split, one in splits.items()]
    caption = f"Temperature {values['temperature']:.4f}, fitted on the validation rows; ECE of {calibration.BINS} bins."
    if calibration.at_bound(values["temperature"]):
        caption += " The temperature is at its bound: these rows do not determine it, and nothing is calibrated."
    return Sheet("Calibration", ["split", *(key.replace("_", " ") for key in keys)], rows, caption)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else MISSING if value is None else str(value)


def _rows(ledger: Mapping[str, Any]) -> Sheet:
    splits = {split: counts for split, counts in ledger.get("splits", {}).items() if counts}
    labels = list(next(iter(splits.values()), {}))
    rows = [
        [split, *(f"{counts[label]:,}" for label in labels), f"{sum(counts.values()):,}"]
        for split, counts in splits.items()
    ]
    buckets = ", ".join(f"{name} {count:,}" for name, count in ledger.get("buckets", {}).items())
    return Sheet("Rows by split", ["split", *labels, "total"], rows, f"What became of the rows read: {buckets}.")
