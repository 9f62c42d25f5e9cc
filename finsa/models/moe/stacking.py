"""Linear layers with a stack of LoRA experts beside them, put on a base and taken off again.

In every adapted linear y = W x + scale * B (g ∘ A x): the experts' A stand one below another in one matrix, their B
beside each other, and a row's gate g, repeated over each expert's r entries, says how much of each expert the row gets.
So two small products do the work whatever the number of experts, nothing is switched on or off in between (PEFT's
`set_adapter` takes the gradient of every expert but the last), and a one-hot gate is the single expert.

Letters: b rows of a batch, s tokens, E experts, r rank of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from finsa.errors import ModelError
from finsa.models import adapters
from finsa.models.moe import experts as folders
from finsa.models.moe.experts import Expert


@dataclass
class Route:
    """What the layers of a pass are told; it stays until the next one, as checkpointed layers run again in backward.

    Args:
        logits: of the router, (b, E).
        gates: shares of the experts, (b, E).
        factors: the gates over the experts' ranks, scale included, (b, 1, E*r); None: no expert has a say.
    """

    logits: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    factors: torch.Tensor | None = None


class StackedLinear(torch.nn.Module):
    """A frozen linear layer, full-precision or quantised, with all experts beside it.

    Args:
        base_layer: the layer.
        a: (E*r, in).
        b: (out, E*r).
        dropout: on the experts' input, while training; one mask for all experts.
        route: tells the gates.
    """

    def __init__(self, base_layer: Any, a: torch.Tensor, b: torch.Tensor, dropout: float, route: Route) -> None:
        super().__init__()
        self.base_layer, self.route = base_layer, route
        self.lora_A = torch.nn.Parameter(a.to(base_layer.weight.device))
        self.lora_B = torch.nn.Parameter(b.to(base_layer.weight.device))
        self.dropout = torch.nn.Dropout(dropout) if dropout > 0 else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, s, in) to (b, s, out)."""
        y: torch.Tensor = self.base_layer(x)
        if self.route.factors is None:
            return y
        low = functional.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A) * self.route.factors
        return (y + functional.linear(low, self.lora_B)).to(y.dtype)


def attach(backbone: Any, experts: Sequence[Expert], route: Route) -> list[str]:
    """Put the experts beside the linears that they adapt.

    Returns:
        The linears' paths.
    """
    stacked = folders.stacked(experts)
    modules = dict(backbone.named_modules())
    for path, (a, b) in stacked.items():
        layer = modules.get(path)
        shape = None if layer is None else (layer.out_features, layer.in_features)
        if shape != (b.shape[0], a.shape[1]):
            raise ModelError(
                f"expert {experts[0].name}: {experts[0].folder} adapts '{path}' of shape {(b.shape[0], a.shape[1])}, "
                f"which this base {'lacks' if shape is None else f'has as {shape}'}"
            )
    for path, (a, b) in stacked.items():
        parent, _, name = path.rpartition(".")
        layer = StackedLinear(modules[path], a, b, experts[0].config.lora_dropout, route)
        setattr(modules[parent], name, layer)
    return list(stacked)


def detach(base: Any, paths: Sequence[str]) -> Any:
    """Take the experts off again, leaving the base as it was."""
    for path in paths:
        layer = base.get_submodule(path)
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, layer.base_layer)
    adapters.stop_checkpointing(base)
    return base.requires_grad_(False).eval()


class _ReachedError(Exception):
    """Ends a pass at the layer whose input is wanted."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def early_states(body: Any, input_ids: torch.Tensor, layers: int) -> torch.Tensor:
    """States after a body's first layers, (b, s, d)."""
    if not 1 <= layers < len(body.layers):
        raise ModelError(f"stage.router.layer: {layers} of a base with {len(body.layers)} layers; choose 1 to one less")

    def stop(module: Any, given: Any, named: Any) -> None:
        raise _ReachedError(given[0] if given else named["hidden_states"])

    hook = body.layers[layers].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        body(input_ids=input_ids, use_cache=False)
    except _ReachedError as reached:
        return reached.states
    finally:
        hook.remove()
    raise AssertionError("a body runs through its layers")
