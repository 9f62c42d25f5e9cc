"""Train a mixture of experts and compare it with its experts and with one adapter trained on all domains."""

from __future__ import annotations

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.training import preflight


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Check the rows, then train, score and write the run folder."""
    session = session or Session()
    preflight.require_trainable(cfg, dataset.load(cfg.data, session), session)
    from finsa.training import joint_training  # torch and trl take seconds to import: after the checks

    return joint_training.run(cfg, session)
