"""The run of a baseline, top to bottom: load data, fit, score, evaluate, write; some baselines do not import torch."""

from __future__ import annotations

import time

from finsa import baselines
from finsa.config import RunConfig
from finsa.config.base import headline
from finsa.data import dataset, tokenized
from finsa.data.values import TASKS
from finsa.evaluation import run_results
from finsa.runs import files, run_folder, trackers
from finsa.runs.progress import Display
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.training import results


def run(cfg: RunConfig, data: dataset.Dataset, kind: str, session: Session) -> Result:
    """Fit on the training split, score the test split once, write the run folder.

    Args:
        cfg: of a baseline; `preflight.require_trainable` has checked it.
        data: its rows.
        kind: of the baseline.
        session: of the command.
    """
    rows, device = tokenized.Labeled(data, **tokenized.labeled_settings(cfg, session)), None
    if cfg.method.uses_torch:
        import torch  # not needed by the other baselines

        from finsa.models import hardware

        hardware.prepare(cfg.train)
        device = hardware.describe(torch.float32)
    model = baselines.build(cfg, data.labels.names)
    texts, order = rows.texts("train"), rows.training_order(cfg)
    targets = rows.truth("train")[order] if rows.task in TASKS else [rows.gold("train")[row] for row in order]
    held_out = rows.texts("validation")[: cfg.train.validation_rows]
    chosen = [texts[row] for row in order]
    model.start(chosen)
    baselines.require_room(model, rows, cfg.data)
    with (
        run_folder.start(cfg, data.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
    ):
        folder.note(device=device, scoring=f"baseline: {kind}")
        folder.log_file.unlink(missing_ok=True)  # a killed baseline is trained from the beginning
        started = time.monotonic()
        fitted = model.fit(
            chosen,
            targets,
            held_out,
            evaluate=lambda log_probs: run_results.validation(rows, log_probs),
            record=results.recorder(folder, tracker, session),
        )
        folder.note(**fitted.facts(time.monotonic() - started))
        with files.staged(folder.path) as staging:
            baselines.save(model, data.labels.names, staging)
        rows.cut.update(baselines.count_truncated(model, rows))
        started = time.monotonic()
        display, texts = Display(cfg.train.progress_seconds), rows.texts("test")
        with display.work("scoring test", len(texts)) as work:
            log_probs = model.score(texts, work.moved)
        folder.note(scoring_seconds=round(time.monotonic() - started, 6))
        with display.work("scoring validation", len(held_out)) as work:
            validation = model.score(held_out, work.moved)
        metrics = {"validation": run_results.validation(rows, validation)}
        results.calibrate(cfg, rows, folder, metrics, {"validation": validation, "test": log_probs})
        results.write(cfg, rows, folder, tracker, metrics, log_probs)
    return Result("train", folder.path, metrics, metrics["validation"].get(headline(data.labels.task)))
