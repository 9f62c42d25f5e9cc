"""The last layer's MLP where something is read, and nowhere else.

What the last MLP makes of a position goes into that position's own logits: no later layer attends to it. A prompt of a
hundred tokens with an answer of one reads one or two positions, so most of that product is never looked at. Of the
embedded base, with four layers, it is a sixth of the work; of 24 layers a fortieth. The others are left at zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from finsa.models import masks

MOST = 0.5  # of the positions: above, the whole product costs less than finding its rows


@contextmanager
def reading(model: Any, read: torch.Tensor, positions: int) -> Iterator[None]:
    """Within, the last MLP runs at the positions whose logits are asked for; those are what they would be.

    Args:
        model: a causal language model or a mixture, wrapped by PEFT or DDP or not.
        read: positions, (b, k), as ``logits_to_keep`` gets them; no position of a row twice.
        positions: of a row that is forwarded, s.
    """
    found = mlp(model) if read.shape[1] <= MOST * positions else None
    if found is None:
        yield
        return

    def places(states: torch.Tensor) -> torch.Tensor:
        """Of (b, ., d), or (E b, ., d): a mixture of outputs forwards all rows once per expert."""
        return read.repeat(len(states) // len(read), 1)[:, :, None].expand(-1, -1, states.shape[2])

    def gather(module: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (given[0].gather(1, places(given[0])),)

    def scatter(module: torch.nn.Module, given: tuple[torch.Tensor], made: Any) -> Any:
        first, *rest = made if isinstance(made, tuple) else (made,)  # experts in a layer also return their gates
        whole = first.new_zeros(first.shape[0], positions, first.shape[2]).scatter(1, places(first), first)
        return (whole, *rest) if isinstance(made, tuple) else whole

    hooks = [found.register_forward_pre_hook(gather), found.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mlp(model: Any) -> torch.nn.Module | None:
    """The MLP that may be narrowed; None where layers run again in backward, are compiled, divided, or others."""
    layers = masks.plain_layers(model)
    found = getattr(layers[-1], "mlp", None) if layers else None
    if not isinstance(found, torch.nn.Module) or len(inspect.signature(found.forward).parameters) != 1:
        return None
    return found
