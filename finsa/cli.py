"""The command: compose, check, run a stage, return its objective. ``python run.py``, ``python -m finsa`` and ``finsa``.

Exit code 2: something the user can mend, told in one message. 1: a job of a sweep failed. 130: interrupted.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach `guard` instead of being printed by Hydra

import hydra
from omegaconf import DictConfig

from finsa import composition
from finsa.launch import guard, run_job


@hydra.main(version_base="1.3", config_path=str(composition.CONF), config_name="config")
def main(config: DictConfig) -> float | None:
    """Run one job and return its objective (the validation score a sweeper may maximise)."""
    return run_job(composition.from_hydra(config))


def run() -> int:
    """Run the command line of this process and return its exit code."""
    return guard(main, sys.argv)
