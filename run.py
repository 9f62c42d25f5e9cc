"""finsa's one entry point: compose, check, run a stage, return its objective.

    python run.py                                    the main job
    python run.py -m method=zero_shot,lora_response  a sweep
    python run.py stage=check model=qwen05b          the plan, without loading weights

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


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    """Run one job and return its objective (the validation score a sweeper may maximise)."""
    return run_job(composition.from_hydra(config))


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv))
