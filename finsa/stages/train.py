"""The main stage: train a language model or a baseline, score the test split, write the run folder."""

from __future__ import annotations

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.runs import starts
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.training import preflight


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Check the rows, then train, score and write the run folder."""
    session = session or Session()
    cfg = starts.resolved(cfg, session)
    data = dataset.load(cfg.data, session)
    preflight.require_trainable(cfg, data, session)
    # torch, trl and scipy take seconds to import: after the checks
    if cfg.method.baseline is not None:
        from finsa.training import run_baseline

        return run_baseline.run(cfg, data, cfg.method.baseline.kind, session)
    from finsa.training import run as training_run

    return training_run.run(cfg, data, session)
