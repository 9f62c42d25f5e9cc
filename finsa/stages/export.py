"""Export the model of a run in another format, and verify the export against the run.

Both predict the validation rows of the run; an export outside of the tolerances is deleted.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from finsa.config import ExportStage, RunConfig
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError, ModelError, Problem, RunError
from finsa.evaluation import metrics, run_results, selective, tables, value_metrics
from finsa.inference import export_formats, predictor, receipts
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
PRECISION_TYPES = {"fp32": "float32", "int8": "int8", "f16": "float16", "q8_0": "q8_0"}  # of onnx and gguf
WEIGHTS = (".safetensors", ".onnx", ".data", ".bin", ".npz", ".gguf")  # endings of files with weights


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
        mean_difference: mean difference of a probability, or of a number.
        same_tokens: share of the prompts that llama.cpp tokenizes in the same way as text; None for other formats.
    """

    rows: int
    agreement: float
    largest_difference: float
    run: Side
    export: Side
    mean_difference: float | None = None
    same_tokens: float | None = None

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
    if form != "gguf":  # is written without llama.cpp
        predictor.require_packages(form, f"format={form}")
    quantization.require_library(record.cfg.method)
    _refuse(export_formats.refusal(record, form, stage.precision))
    place = _place(cfg, record, form, stage.precision)
    data = dataset.load(record.cfg.data, session or Session())
    data.require(SPLIT)
    labeled = tokenized.Labeled(data, **tokenized.labeled_settings(record.cfg, session))
    if labeled.dataset.labels.names != record.labels.names:
        raise RunError(
            f"run: {record.path} has different labels than its data now: {', '.join(labeled.dataset.labels.names)}"
        )
    predictor.announce(record.name)
    from finsa.inference import export, gguf_export  # torch takes seconds to import: after the checks
    from finsa.models import base, hardware

    renderer = predictor.renderer_of(record)
    _refuse(export.label_refusal(renderer, form))
    _refuse(gguf_export.refusal(base.architecture(record.cfg.model), renderer) if form == "gguf" else None)
    hardware.prepare(cfg.train)
    with locks.creating(place):
        partial = place.with_name(f".{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            export.write(record, form, stage.precision, partial, labeled.texts(SPLIT))
            receipt = _compare(cfg, record, labeled, partial) if form != "gguf" or find_spec("llama_cpp") else None
            if receipt is None:
                print(
                    "receipt: skipped, because llama.cpp is not installed; pip install 'finsa[gguf]', then export again"
                )
            else:
                (partial / receipts.FILE).write_text(json.dumps(receipt.as_dict(), indent=1) + "\n", encoding="utf-8")
                _show(receipt, f"{record.name} as {form}" + (f" {stage.precision}" if form in ("onnx", "gguf") else ""))
                faults = receipt.faults(stage)
                if faults and not stage.force:
                    listed = "; ".join(faults)
                    raise ModelError(f"format={form}: {listed}; nothing is kept. Keep it with stage.force=true")
            files.sync_tree(partial)
            partial.rename(place)
            files.sync(place.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"export: {place}")
    return Result("export", place, {"receipt": receipt and receipt.as_dict()})


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ConfigError([Problem("format", reason)])


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
    sides, made, same_tokens = list[Side](), list[Predictions](), None
    for name, source in (("run", record), ("export", predictor.read(str(folder)))):
        model = predictor.load(source, cfg.train.score_tokens, cfg.train.threads)
        predictions, milliseconds = _predict(model, texts, stage.timed, display, name)
        if name == "run" and model.model is not None:
            size = base.bytes_of(model.model)
        else:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in WEIGHTS)
        if model.renderer is not None and model.record.format == "gguf":
            scorer: Any = model.scorer
            same_tokens = scorer.same_tokens(model.renderer.encode(texts))
        model.close()
        dtype = str(base.dtype(source.cfg.model)).removeprefix("torch.")
        dtype = PRECISION_TYPES.get(source.manifest.get("precision", ""), dtype)
        sides.append(Side(_scores(labeled, predictions), size, round(milliseconds, 3), dtype))
        made.append(predictions)
    temperature = {**(record.facts.get("calibration") or {}), "temperature": record.temperature}
    rows = run_results.predictions(labeled, SPLIT, made[1].log_probs, temperature)
    kept = ({key: value for key, value in row.items() if key not in ("text", "target")} for row in rows)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)  # texts stay in the run folder
    (folder / selective.FILE).write_text("".join(lines), encoding="utf-8")
    equal, largest, mean = receipts.agreement(record.labels, made[0], made[1])
    return Receipt(
        rows=len(texts),
        agreement=equal,
        largest_difference=largest,
        mean_difference=mean,
        same_tokens=same_tokens,
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
        + ("" if receipt.mean_difference is None else f", mean {receipt.mean_difference:.2g}")
    )
    if receipt.same_tokens is not None:
        print(f"llama.cpp gives {receipt.same_tokens:.2%} of the prompts the same tokens when it reads them as text")
