"""Run a stage from within another one, such as the trials of a search."""

from __future__ import annotations

from importlib import import_module

from finsa.config import RunConfig
from finsa.runs import Result


def run(cfg: RunConfig) -> Result:
    """Run the stage that a configuration names; stages find each other by name and never import each other."""
    result: Result = import_module(f"finsa.stages.{cfg.stage.name}").run(cfg)
    return result
