"""Linear layers that compute a stack of LoRA experts, added to a base model and removed again.

Every adapted linear computes y = W x + scale * B (g ∘ A x). The experts' A are stacked vertically in one matrix, their
B horizontally, and the gates g of a row, repeated over the r entries of each expert, weight the experts. This takes two
small products for any number of experts, with no switching between them (PEFT's `set_adapter` disables the gradients of
all experts but the last), and one-hot gates give a single expert.

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
from finsa.models.dropout import SparseDropout
from finsa.models.moe.experts import Expert, stack


@dataclass
class Route:
    """Routing of a forward pass, which all layers share; kept for the backward pass, which may recompute layers.

    Args:
        logits: logits of the router, (b, E).
        gates: weights of the experts, (b, E).
        factors: the gates times the scale, repeated over the ranks, (b, 1, E*r); None switches the experts off.
    """

    logits: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    factors: torch.Tensor | None = None


class StackedLinear(torch.nn.Module):
    """A frozen linear layer, full-precision or quantized, together with all experts.

    Args:
        base_layer: the linear layer.
        a: the experts' A, (E*r, in).
        b: the experts' B, (out, E*r).
        dropout: dropout on the input of the experts during training, with one mask for all.
        route: provides the gates.
    """

    def __init__(self, base_layer: Any, a: torch.Tensor, b: torch.Tensor, dropout: float, route: Route) -> None:
        super().__init__()
        self.base_layer, self.route = base_layer, route
        self.lora_A = torch.nn.Parameter(a.to(base_layer.weight.device))
        self.lora_B = torch.nn.Parameter(b.to(base_layer.weight.device))
        self.dropout = SparseDropout(dropout) if dropout > 0 else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (b, s, out) from (b, s, in)."""
        y: torch.Tensor = self.base_layer(x)
        if self.route.factors is None:
            return y
        low = functional.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A) * self.route.factors
        return (y + functional.linear(low, self.lora_B)).to(y.dtype)


def attach(backbone: Any, experts: Sequence[Expert], route: Route) -> list[str]:
    """Replace the linears that the experts adapt by `StackedLinear`.

    Returns:
        Paths of the replaced linears.

    Raises:
        ModelError: if the experts do not match each other or the base model.
    """
    stacked = stack(experts)
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
    """Remove the experts and return the base model as it was."""
    for path in paths:
        layer = base.get_submodule(path)
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, layer.base_layer)
    adapters.stop_checkpointing(base)
    return base.requires_grad_(False).eval()


class _ReachedError(Exception):
    """Ends a forward pass at the layer whose input is wanted."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def early_states(body: Any, input_ids: torch.Tensor, layers: int) -> torch.Tensor:
    """Compute the states after the first layers of a model without LM head, (b, s, d)."""
    if not 1 <= layers < len(body.layers):
        raise ModelError(f"stage.router.layer: {layers} of a base with {len(body.layers)} layers; choose 1 to one less")

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _ReachedError(args[0] if args else kwargs["hidden_states"])

    hook = body.layers[layers].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        body(input_ids=input_ids, use_cache=False)
    except _ReachedError as reached:
        return reached.states
    finally:
        hook.remove()
    raise AssertionError("the forward pass has not reached the layer")
