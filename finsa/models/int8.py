"""Linear layers in 8 bit on a CPU: int8 weights with a scale per output, inputs quantized token by token.

A token has its own scale, so its states do not depend on the other texts of a batch. Products are those of oneDNN,
which torch contains; attention, norms and the LM head stay in float32.

Letters: n tokens, i inputs, o outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from finsa.errors import ModelError
from finsa.models import attention

BATCH_TOKENS = 1024  # tensors of larger batches leave the cache and are allocated anew in every layer (measured)


class Int8Linear(torch.nn.Module):
    """A linear layer with int8 weights and dynamically quantized inputs, both symmetric.

    Args:
        linear: the layer, in float32 on the CPU.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = _scale(weight)[:, 0]  # (o,)
        self.weight = torch.ops.onednn.qlinear_prepack((weight / self.scale[:, None]).round().to(torch.int8), None)
        self.zeros = torch.zeros(len(self.scale), dtype=torch.int64)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map (..., i) to (..., o)."""
        flat = states.reshape(-1, states.shape[-1])
        scale = _scale(flat)  # (n, 1)
        # oneDNN takes unsigned inputs: flipping the first bit of an int8 adds 128, the zero point
        inputs = (flat * scale.reciprocal()).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        output: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            inputs, 1.0, 128, self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        output.mul_(scale)
        if self.bias is not None:
            output.add_(self.bias)
        return output.view(*states.shape[:-1], -1)


def _scale(rows: torch.Tensor) -> torch.Tensor:
    """What int8 numbers of each row are multiplied by, (rows, 1)."""
    largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))
    return largest.clamp_(min=1e-12) / 127


def require_cpu() -> None:
    """Check that products in int8 are possible, before weights are loaded.

    Raises:
        ModelError: if they are not.
    """
    if torch.cuda.is_available():
        raise ModelError("model.inference=int8 is for CPUs; on a GPU leave it out, or train with method=lora_8bit")
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        raise ModelError("model.inference=int8 needs a torch with oneDNN, which this one has not; leave it out")


def quantize(model: Any) -> None:
    """Replace the linear layers of a causal language model's or classifier's decoder, in place.

    Raises:
        ModelError: if there are none.
    """
    found = attention.causal_model(model).base_model
    layers = [
        (parent, name, child)
        for parent in found.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
    ]
    if not layers:
        raise ModelError("model.inference=int8: this architecture has no linear layers that torch could quantize")
    for parent, name, child in layers:
        setattr(parent, name, Int8Linear(child))
    # Only for speed: what is left of float32 products is attention, which is fused under this precision only.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(True)  # despite its name, for the CPU as well


def is_quantized(model: Any) -> bool:
    """Whether `quantize` has replaced layers of a model."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
