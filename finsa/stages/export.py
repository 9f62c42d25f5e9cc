"""Export the model of a run in another format, and verify the export against the run.

Both predict the validation rows of the run; an export outside of the tolerances is deleted.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from finsa.config import ExportStage, MoeJointStage, RunConfig
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError, ModelError, Problem, RunError
from finsa.evaluation import metrics, run_results, selective, tables, value_metrics
from finsa.inference import predictor, receipts
from finsa.inference.predictor import Predictions, Predictor, Record
from finsa.models import quantization
from finsa.runs import files, locks
from finsa.runs.progress import Display
from finsa.runs.run_folder import Result
from finsa.session import Session

SPLIT = "validation"
# Largest differences of a probability with stage.difference=auto. Measured on the embedded default's 596 rows: 2e-6 for
# ONNX in float32, 0.047 for ONNX in 8 bit.
FLOAT32, ROUNDED = 1e-3, 0.1
WEIGHTS = (".safetensors", ".onnx", ".data", ".bin", ".npz")  # endings of files with weights


@dataclass(frozen=True)
class Side:
    """Measurements of the run or of its export.

    Args:
        scores: of the compared rows: macro_f1 and accuracy; for numbers rmse, for several labels also subset_accuracy.
        bytes: size of the weights.
        milliseconds: median latency of a single text.
        type: number type of matrix products: ``float32``, ``bfloat16``, ``float16`` or ``int8``.
    """

    scores: dict[str, float | None]
    bytes: int
    milliseconds: float
    type: str


@dataclass(frozen=True)
class Receipt:
    """Comparison of a run and its export on the same rows.

    Args:
        rows: number of compared validation rows.
        agreement: share of equal predictions; of several labels, each counts; numbers may differ by `receipts.CLOSE`.
        largest_difference: largest difference of a probability, or of a number.
        run, export: measurements of both.
    """

    rows: int
    agreement: float
    largest_difference: float
    run: Side
    export: Side

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``receipt.json``, the scores beside the other measurements."""
        values = asdict(self)
        for side in ("run", "export"):
            values[side] = {**values[side].pop("scores"), **values[side]}
        return values

    def faults(self, stage: ExportStage) -> list[str]:
        """Describe what is outside of the tolerances of the stage."""
        faults, most, types = [], stage.difference, (self.run.type, self.export.type)
        if self.agreement < stage.agreement:
            faults.append(f"agreement {self.agreement:.4f} is below stage.agreement={stage.agreement}")
        reason = ""
        if most == "auto":
            most = FLOAT32 if types == ("float32", "float32") else ROUNDED
            reason = f" ({most:g}: {types[1]} beside {types[0]})"
        if most is not None and self.largest_difference > most:
            limit = f"stage.difference={stage.difference}{reason}"
            faults.append(f"the largest difference {self.largest_difference:.3g} is above {limit}")
        return faults


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Export a run, and compare the export with it.

    Raises:
        ConfigError: if the run cannot be exported in this format.
        RunError: if the folder already exists, or another process writes it.
        ModelError: if a package is missing, or the export is outside of the tolerances.
    """
    stage, form = cfg.stage, str(cfg.format)
    assert isinstance(stage, ExportStage)
    record = predictor.read(str(cfg.run))
    predictor.require_packages(form, f"format={form}")
    quantization.require_library(record.cfg.method)
    _refuse(refusal(record, form, stage.precision))
    place = _place(cfg, record, form, stage.precision)
    data = dataset.load(record.cfg.data, session or Session())
    data.require(SPLIT)
    labeled = tokenized.Labeled(data, **tokenized.labeled_settings(record.cfg, session))
    if labeled.dataset.labels.names != record.labels.names:
        raise RunError(
            f"run: {record.path} has different labels than its data now: {', '.join(labeled.dataset.labels.names)}"
        )
    predictor.announce(record.name)
    from finsa.inference import export  # torch takes seconds to import: after the checks
    from finsa.models import hardware

    _refuse(export.label_refusal(predictor.renderer_of(record), form))
    hardware.prepare(cfg.train)
    with locks.creating(place):
        partial = place.with_name(f".{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            export.write(record, form, stage.precision, partial)
            receipt = _compare(cfg, record, labeled, partial)
            (partial / receipts.FILE).write_text(json.dumps(receipt.as_dict(), indent=1) + "\n", encoding="utf-8")
            _show(receipt, f"{record.name} as {form}" + (f" {stage.precision}" if form == "onnx" else ""))
            faults = receipt.faults(stage)
            if faults and not stage.force:
                raise ModelError(f"format={form}: {'; '.join(faults)}; nothing is kept. Keep it with stage.force=true")
            files.sync_tree(partial)
            partial.rename(place)
            files.sync(place.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"export: {place}")
    return Result("export", place, {"receipt": receipt.as_dict()})


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ConfigError([Problem("format", reason)])


def refusal(record: Record, form: str, precision: str) -> str | None:
    """Why the configuration of a run cannot be exported in a format; None if it can."""
    method, stage = record.cfg.method, record.cfg.stage
    if record.manifest:
        return f"{record.path} is itself an export; name the run that it was exported from"
    if record.members:
        return "a cascade consists of several runs; predict and serve read its run folder"
    if method.baseline is not None:
        return f"method={method.name} is not a language model; predict and serve read its run folder"
    if method.examples is not None and method.examples.choice == "nearest":
        return "its examples are chosen for each text; predict and serve read the run folder"
    if method.examples is not None and method.examples.calibrate:
        return "an export has no contextual calibration; predict and serve read the run folder"
    if record.cfg.model.think == "open" and form not in ("adapter", "merged"):
        return f"{form} computes scores and writes no thoughts (model.think=open); choose format=merged"
    if isinstance(stage, MoeJointStage) and form not in ("adapter", "merged"):
        return (
            f"{form} contains one set of weights, and a mixture selects among several for every text; format=adapter "
            "writes all experts with their router and a manifest, format=merged a model per expert, with hard routing"
        )
    if isinstance(stage, MoeJointStage) and form == "merged" and stage.router.read == "layer":
        return "its router reads an early layer of the base model, which merged experts change; choose format=adapter"
    if form == "adapter" and method.adapter is None and method.head == "lm":
        return f"method={method.name} trains no adapter; choose format=merged"
    if form == "adapter" and method.learn == "all":
        return f"method={method.name} trains all weights; choose format=merged"
    if form == "classifier" and method.head == "classifier":
        return (
            "its head reads the mean over the text, a sequence-classification model the last token; choose format=onnx"
        )
    if precision != "fp32" and form != "onnx":
        return f"stage.precision={precision} is used by format=onnx only; leave it out"
    return None


def _place(cfg: RunConfig, record: Record, form: str, precision: str) -> Path:
    """The folder of the export: ``output``, or by default one in the run folder."""
    name = form if precision == "fp32" else f"{form}_{precision}"
    place = Path(cfg.output).absolute() if cfg.output is not None else record.path / "exports" / name
    files.require_new(place)
    if place.exists():
        place.rmdir()
    return place


# ------------------------------------------------------------------------------------------------ comparison


def _compare(cfg: RunConfig, record: Record, labeled: tokenized.Labeled, folder: Path) -> Receipt:
    """Predict the validation rows with the run and with the export, and measure both."""
    from finsa.models import base

    stage, display = cfg.stage, Display(cfg.train.progress_seconds)
    assert isinstance(stage, ExportStage)
    texts = labeled.texts(SPLIT)[: stage.rows]
    print(f"comparing the export with the run on {len(texts):,} {SPLIT} rows", file=sys.stderr, flush=True)
    sides, made = list[Side](), list[Predictions]()
    for name, source in (("run", record), ("export", predictor.read(str(folder)))):
        model = predictor.load(source, cfg.train.score_tokens, cfg.train.threads)
        predictions, milliseconds = _predict(model, texts, stage.timed, display, name)
        if name == "run" and model.model is not None:
            size = base.bytes_of(model.model)
        else:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in WEIGHTS)
        model.close()
        dtype = str(base.dtype(source.cfg.model)).removeprefix("torch.")
        dtype = {"fp32": "float32", "int8": "int8"}.get(source.manifest.get("precision", ""), dtype)  # of an ONNX graph
        sides.append(Side(_scores(labeled, predictions), size, round(milliseconds, 3), dtype))
        made.append(predictions)
    temperature = {**(record.facts.get("calibration") or {}), "temperature": record.temperature}
    rows = run_results.predictions(labeled, SPLIT, made[1].log_probs, temperature)
    kept = ({key: value for key, value in row.items() if key not in ("text", "target")} for row in rows)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)  # texts stay in the run folder
    (folder / selective.FILE).write_text("".join(lines), encoding="utf-8")
    equal, largest = receipts.agreement(record.labels, made[0], made[1])
    return Receipt(
        rows=len(texts),
        agreement=equal,
        largest_difference=largest,
        run=sides[0],
        export=sides[1],
    )


def _scores(labeled: tokenized.Labeled, predictions: Predictions) -> dict[str, float | None]:
    n, labels = len(predictions.truncated), labeled.dataset.labels
    if predictions.values is not None:
        report = value_metrics.values(labels.task, labeled.truth(SPLIT)[:n], predictions.values)
        names: tuple[str, ...] = ("rmse", "mae") if labels.task == "regression" else ("macro_f1", "subset_accuracy")
    else:
        report = metrics.report(labeled.gold(SPLIT)[:n], predictions.probs.argmax(axis=1).tolist(), labels.names)
        names = ("macro_f1", "accuracy")
    return {name: report[name] for name in names}


def _predict(model: Predictor, texts: list[str], timed: int, display: Display, name: str) -> tuple[Predictions, float]:
    """Predict texts, and measure the median milliseconds of single texts."""
    with display.work(f"{name}: {SPLIT} rows", len(texts)) as work:
        predictions = model(texts, work.moved)
    seconds = []
    model(texts[:1])  # the first call of a runtime allocates its buffers
    with display.work(f"{name}: single texts", len(texts[:timed])) as work:
        for text in texts[:timed]:
            started = time.perf_counter()
            model([text])
            seconds.append(time.perf_counter() - started)
            work.moved(1)
    return predictions, 1000 * float(np.median(seconds))


def _show(receipt: Receipt, title: str) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "run", "export"):
        table.add_column(name, justify="left" if not name else "right")
    one, other = receipt.run, receipt.export
    for name, value in one.scores.items():
        table.add_row(tables.TITLES[name], f"{value:.4f}", f"{other.scores[name]:.4f}")
    table.add_row("weights, MB", f"{one.bytes / 1e6:.1f}", f"{other.bytes / 1e6:.1f}")
    table.add_row("ms per single text", f"{one.milliseconds:.1f}", f"{other.milliseconds:.1f}")
    tables.show(table)
    print(
        f"equal predictions on {receipt.agreement:.2%} of {receipt.rows:,} validation rows; "
        f"largest difference of a probability {receipt.largest_difference:.2g}"
    )
