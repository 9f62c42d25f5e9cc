"""Finished runs of the embedded default, short: one per method and test session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from few import FEW

from finsa.config import RunConfig

SHORT = (FEW, "train=smoke", "tracking=none", "stage.compare_base=false", "model.dtype=float32")  # on every machine
STEPS = {"lora_response": 60, "classifier": 30}  # enough for answers that are not all the same


@cache
def run_folder(config: Callable[..., RunConfig], base: Path, method: str, *words: str) -> Path:
    """Train a run and return its folder.

    Args:
        config: the fixture.
        base: a folder that outlives the session's modules.
        method: its name.
        words: further overrides.
    """
    from finsa.stages import train

    steps = f"train.max_steps={STEPS.get(method, 2)}"
    done = train.run(config(f"method={method}", *SHORT, steps, *words, f"output_dir={base / method}"))
    assert done.run_dir is not None
    return done.run_dir
