"""Write a run's model in another format, with a receipt; what falls short of the tolerance is removed again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from rich.table import Table

from finsa.config import ExportStage, RunConfig
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError, ModelError, Problem, RunError
from finsa.evaluation import tables
from finsa.inference import export_check, export_manifest, predictor
from finsa.inference.export_check import Receipt
from finsa.inference.predictor import Record
from finsa.models import quantization
from finsa.runs import files, locks
from finsa.runs.progress import Display
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Export a run, and compare the export with it.

    Raises:
        ConfigError: where a run cannot be written in the format.
        RunError: where the folder is there already, or another process is at it.
        ModelError: where a package is missing, or the export falls short of the tolerance.
    """
    session = session or Session()
    assert isinstance(cfg.stage, ExportStage)
    form, precision = str(cfg.format), cfg.stage.precision
    record = predictor.read(str(cfg.run))
    export_manifest.require_packages(form, f"format={form}")
    quantization.require_library(record.cfg.method)
    _refuse(export_manifest.refusal(record, form, precision))
    place = _place(cfg, record, form, precision)
    data = dataset.load(record.cfg.data, session)
    data.require(export_check.SPLIT)
    job = tokenized.Labelled(data)
    if job.dataset.labels.names != record.labels.names:
        raise RunError(f"run: {record.path} has other labels than its data now: {', '.join(job.dataset.labels.names)}")
    predictor.announce(record.name)
    from finsa.inference import export  # torch takes seconds to import: after the checks
    from finsa.models import hardware

    _refuse(export.refusal_of_labels(predictor.renderer_of(record), form))
    hardware.prepare(cfg.train)
    with locks.making(place):
        return _export(cfg, record, job, place)


def _export(cfg: RunConfig, record: Record, job: tokenized.Labelled, place: Path) -> Result:
    """Write, compare and put in its place.

    Raises:
        ModelError: where the export falls short of the tolerance.
    """
    from finsa.inference import export

    assert isinstance(cfg.stage, ExportStage)
    form, precision = str(cfg.format), cfg.stage.precision
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        export.write(record, form, precision, partial)
        receipt = _receipt(cfg, record, job, partial)
        (partial / export_manifest.RECEIPT).write_text(json.dumps(receipt.as_dict(), indent=1) + "\n", encoding="utf-8")
        _show(receipt, f"{record.name} as {form}" + (f" {precision}" if form in ("onnx", "openvino") else ""))
        faults = receipt.faults(cfg.stage)
        if faults and not cfg.stage.force:
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


def _place(cfg: RunConfig, record: Record, form: str, precision: str) -> Path:
    """Where the export goes: ``output``, else below the run's folder."""
    name = form if precision == "fp32" else f"{form}_{precision}"
    place = Path(cfg.output).absolute() if cfg.output is not None else record.path / "exports" / name
    if place.exists() and (place.is_file() or any(place.iterdir())):
        raise RunError(f"output: {place} is there already; remove it, or name another folder with output=<folder>")
    if place.exists():
        place.rmdir()
    if any(parent.is_file() for parent in place.parents):
        raise RunError(f"output: {place} lies below a file; name another folder")
    return place


def _receipt(cfg: RunConfig, record: Record, job: tokenized.Labelled, folder: Path) -> Receipt:
    """Answer the validation rows with the run and with the export, one after the other."""
    from finsa.models import base

    assert isinstance(cfg.stage, ExportStage)
    sides, sizes, display = [], [], Display(cfg.train.progress_seconds)
    rows = len(job.texts(export_check.SPLIT)[: cfg.stage.rows])
    print(f"comparing the export with the run on {rows:,} {export_check.SPLIT} rows", file=sys.stderr, flush=True)
    for side, source in (("run", record), ("export", predictor.read(str(folder)))):
        answerer = predictor.load(source, cfg.train.score_tokens, cfg.train.threads)
        sides.append(export_check.answers_of(answerer, job, cfg.stage, display, side))
        sizes.append(
            export_check.size_of(folder)
            if source is not record or answerer.model is None
            else base.bytes_of(answerer.model)
        )
        answerer.close()
    return export_check.compare(job, sides[0], sides[1], (sizes[0], sizes[1]))


def _show(receipt: Receipt, title: str) -> None:
    shown = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "run", "export"):
        shown.add_column(name, justify="left" if not name else "right")
    one, other = receipt.run, receipt.export
    shown.add_row("macro-F1", f"{one.macro_f1:.4f}", f"{other.macro_f1:.4f}")
    shown.add_row("accuracy", f"{one.accuracy:.4f}", f"{other.accuracy:.4f}")
    shown.add_row("weights, MB", f"{one.bytes / 1e6:.1f}", f"{other.bytes / 1e6:.1f}")
    shown.add_row("ms per text, alone", f"{one.milliseconds:.1f}", f"{other.milliseconds:.1f}")
    tables.show(shown)
    print(
        f"same answer on {receipt.agreement:.2%} of {receipt.rows:,} validation rows; "
        f"largest difference of a probability {receipt.largest_difference:.2g}"
    )
