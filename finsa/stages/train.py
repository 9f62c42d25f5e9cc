"""The main stage: train a language model or a baseline, score the test split, write the run folder."""

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
from finsa.training import preflight, results


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Check the rows, fit on the training split, choose on validation, score the test split once."""
    session = session or Session()
    data = dataset.load(cfg.data, session)
    preflight.require_trainable(cfg, data, session)
    if cfg.method.baseline is not None:
        return _run_baseline(cfg, data, cfg.method.baseline.kind, session)
    from finsa.training import run as training_run  # torch and trl take seconds to import; a baseline does without

    return training_run.run(cfg, session)


def _run_baseline(cfg: RunConfig, data: dataset.Dataset, kind: str, session: Session) -> Result:
    """Do the same with a classifier that uses no language model."""
    rows, device = tokenized.Labelled(data), None
    if cfg.method.uses_torch:
        import torch  # other baselines do without it

        from finsa.models import hardware

        hardware.prepare(cfg.train)
        device = hardware.describe(torch.float32)
    model = baselines.build(cfg, data.labels.names)
    texts, gold, order = rows.texts("train"), rows.gold("train"), rows.training_order(cfg)
    held_out = rows.texts("validation")[: cfg.train.validation_rows]
    chosen = [texts[row] for row in order]
    model.start(chosen)
    baselines.require_room(model, rows, cfg.data)
    with (
        run_folder.start(cfg, data.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
    ):
        folder.note(device=device, scoring=f"baseline: {kind}")
        folder.log_file.unlink(missing_ok=True)  # a baseline that was killed is trained from the beginning
        started = time.monotonic()
        fitted = model.fit(
            chosen,
            [gold[row] for row in order],
            held_out,
            evaluate=lambda log_probs: run_results.validation(rows, log_probs),
            record=results.recorder(folder, tracker, session),
        )
        folder.note(**fitted.facts(time.monotonic() - started))
        with files.staged(folder.path) as staging:
            baselines.save(model, data.labels.names, staging)
        rows.cut.update(baselines.count_truncated(model, rows))
        display, texts = Display(cfg.train.progress_seconds), rows.texts("test")
        with display.work("scoring test", len(texts)) as work:
            log_probs = model.score(texts, work.moved)
        with display.work("scoring validation", len(held_out)) as work:
            validation = model.score(held_out, work.moved)
        metrics = {
            "validation": run_results.validation(rows, validation),
            "test": run_results.report(rows, "test", log_probs),
        }
        results.calibrate(cfg, rows, folder, metrics, {"validation": validation, "test": log_probs})
        results.write(cfg, rows, folder, tracker, metrics, log_probs)
    return Result("train", folder.path, metrics, metrics["validation"]["macro_f1"])
