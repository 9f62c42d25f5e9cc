"""The main stage: source, ledger, splits, rows, model, trainer, scorer, report, run folder."""

from __future__ import annotations

import time

from finsa import baselines
from finsa.config import RunConfig
from finsa.data import dataset, tokenized
from finsa.evaluation import run_results
from finsa.runs import files, run_folder, trackers
from finsa.runs.progress import Display
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.training import results


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Fit on the training split, choose on validation, score the test split once, write the run folder."""
    session = session or Session()
    if cfg.method.baseline is not None:
        return _run_baseline(cfg, cfg.method.baseline.kind, session)
    from finsa.training import run_training  # trainers take seconds to import, which a baseline need not wait for

    return run_training.run(cfg, session)


def _run_baseline(cfg: RunConfig, kind: str, session: Session) -> Result:
    """The same for a classifier that uses no language model."""
    data = dataset.load(cfg.data, session)
    data.require("train", "validation", "test")
    rows = tokenized.Labelled(data)
    device = _prepared(cfg) if cfg.method.uses_torch else None
    model = baselines.build(cfg, data.labels.names)
    texts, gold, order = rows.texts("train"), rows.gold("train"), rows.training_order(cfg)
    held = rows.texts("validation")[: cfg.train.validation_rows]
    chosen = [texts[row] for row in order]
    model.start(chosen)
    baselines.require_room(model, rows, cfg.data)
    with (
        run_folder.start(cfg, data.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
    ):
        folder.note(device=device, scoring=f"baseline: {kind}")
        folder.log_file.unlink(missing_ok=True)  # a baseline that was killed learns from its beginning
        started = time.monotonic()
        fitted = model.fit(
            chosen,
            [gold[row] for row in order],
            held,
            judge=lambda scores: run_results.validation(rows, scores),
            record=results.recorder(folder, tracker, session),
        )
        folder.note(**fitted.facts(time.monotonic() - started))
        with files.staged(folder.path) as place:
            baselines.save(model, data.labels.names, place)
        rows.cut.update(baselines.cut(model, rows))
        display, texts = Display(cfg.train.progress_seconds), rows.texts("test")
        with display.work("scoring test", len(texts)) as work:
            scores = model.score(texts, work.moved)
        with display.work("scoring validation", len(held)) as work:
            known = model.score(held, work.moved)
        metrics = {"validation": run_results.validation(rows, known), "test": run_results.report(rows, "test", scores)}
        results.calibrate(cfg, rows, folder, metrics, {"validation": known, "test": scores})
        results.write(cfg, rows, folder, tracker, metrics, scores)
    return Result("train", folder.path, metrics, metrics["validation"]["macro_f1"])


def _prepared(cfg: RunConfig) -> str:
    """Set torch up and name the device; a baseline that does without torch does not wait for its import."""
    import torch

    from finsa.models import hardware

    hardware.prepare(cfg.train)
    return hardware.describe(torch.float32)
