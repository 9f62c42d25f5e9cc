"""Dropout on a CPU that draws one random number per dropped element.

PyTorch draws one per element with a serial generator: at LoRA's usual rates, dropout on the input of an adapter takes
several times as long as the adapter. Here the distances between dropped elements are drawn, which are geometrically
distributed, so elements are dropped independently with the same probability.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

HIGHEST = 0.2  # above this rate, drawing a number per element is as fast


def make_sparse(model: nn.Module) -> None:
    """Replace the dropout of a model's LoRA layers by `SparseDropout`."""
    for module in list(model.modules()):
        layers = getattr(module, "lora_dropout", None)
        if isinstance(layers, nn.ModuleDict):
            for name, layer in layers.items():
                if type(layer) is nn.Dropout:
                    layers[name] = SparseDropout(layer.p)


class SparseDropout(nn.Dropout):
    """`torch.nn.Dropout`, faster on a CPU for low rates.

    On another device, and for higher rates, it is `torch.nn.Dropout`. Inputs have any shape.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Drop elements during training."""
        if not self.training or input.device.type != "cpu" or not 0 < self.p <= HIGHEST:
            return super().forward(input)
        dropped: torch.Tensor = _Drop.apply(input, self.p)  # type: ignore[no-untyped-call]
        return dropped


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, p: float) -> torch.Tensor:
        size = input.numel()
        # The draws reach beyond the end with a margin of eight standard deviations; the rest is discarded.
        draws = int(size * p + 8 * math.sqrt(size * p)) + 16
        positions = torch.empty(draws, dtype=torch.int64).geometric_(p).cumsum(0).sub_(1)
        positions = positions[: int(torch.searchsorted(positions, size))]
        ctx.save_for_backward(positions)
        ctx.scale = 1 / (1 - p)
        return _zeroed(input, positions, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (positions,) = ctx.saved_tensors
        return _zeroed(gradients[0], positions, ctx.scale), None


def _zeroed(values: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    scaled = (values * scale).contiguous()
    scaled.view(-1).index_fill_(0, positions, 0)
    return scaled
