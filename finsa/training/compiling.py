"""Compiled layers, an option: fewer kernels and passes over memory, for a first step that takes long.

Layers are compiled one by one, in place and for any shape: all layers of a model share one compiled form, nothing
around them has to be traced, and the base of a sweep is as it was once `undo` has run.
"""

from __future__ import annotations

from typing import Any

import torch

from finsa.models.classifier import Classifier, causal
from finsa.models.moe.mixture import Mixture


def layers(model: torch.nn.Module) -> list[Any]:
    """Compile the decoder's layers of what learns; the first forward and backward passes pay for it.

    Returns:
        The layers, for `undo`.
    """
    net = causal(model.backbone if isinstance(model, Classifier | Mixture) else model)
    found = list(net.base_model.layers)
    for layer in found:
        layer.compile(dynamic=True)
    return found


def told(first: float, steps: int, seconds: float) -> str:
    """What compilation has cost, for the terminal.

    Args:
        first: seconds of the first step's forward and backward passes, which compile.
        steps: made since the process began.
        seconds: that they took, the first one's included.
    """
    line = f"compiled layers: first step {first:.1f} s"
    return line if steps < 2 else f"{line}, later ones {max(0.0, seconds - first) / (steps - 1):.3f} s on average"


def undo(compiled: list[Any]) -> None:
    """Let layers run as they are written."""
    for layer in compiled:
        layer._compiled_call_impl = None
