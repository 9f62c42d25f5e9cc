"""Linear layers in 8 bit on a CPU: int8 weights with a scale per output, inputs quantized token by token.

A token has its own scale, so its states do not depend on the other texts of a batch. Products are those of oneDNN,
which torch contains; attention, norms and the LM head stay in float32.

A few states of a language model are far larger than the others and would take up the range of a token. Rotating all
states spreads them (QuaRot, Ashkboos et al. 2024): norms without weights do not change under rotations, and linear
layers absorb them, so that the float32 model is the same up to rounding.

Letters: n tokens, i inputs, o outputs, d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from finsa.errors import ModelError
from finsa.models import attention

ROTATED = ("llama", "mistral", "qwen2", "qwen3")  # architectures whose states are rotated: pre-norm, without exceptions
BATCH_TOKENS = 512  # larger batches leave the cache, and their tensors are allocated anew in every layer (measured)


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
    available: Any = torch.backends.mkldnn.is_available
    if not available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise ModelError("model.inference=int8 needs a torch with oneDNN, which this one has not; leave it out")


def quantize(model: Any) -> None:
    """Replace the linear layers of a causal language model's or classifier's decoder, in place.

    Raises:
        ModelError: if there are none.
    """
    found = attention.causal_model(model).base_model
    if found.config.model_type in ROTATED:
        rotate(found)
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
    prefer_fused_attention()


def prefer_fused_attention() -> None:
    """What is left of float32 products is attention, which is fused at this precision only (`hardware.prepare`)."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(True)  # despite its name, for the CPU as well


@torch.no_grad()
def rotate(net: Any) -> None:
    """Rotate the states between the layers of a decoder, in place; its output is the same up to rounding.

    Args:
        net: the decoder, without LM head.
    """
    size = net.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]  # (d, d)

    def turned(rows: torch.Tensor, by: torch.Tensor = rotation) -> torch.Tensor:
        """Rotate (..., d)."""
        return rows @ by

    for layer in net.layers:
        attends, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attends.q_proj, attends.k_proj, attends.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for linear in readers:
                linear.weight.copy_(turned(linear.weight * norm.weight))
            norm.weight.fill_(1)
        for linear in (attends.o_proj, mlp.down_proj):
            linear.weight.copy_(turned(linear.weight.T).T)
            if linear.bias is not None:
                linear.bias.copy_(turned(linear.bias))
    weight = net.norm.weight.clone()
    net.norm.weight.fill_(1)
    net.embed_tokens.register_forward_hook(lambda module, inputs, states: turned(states))
    net.norm.register_forward_hook(lambda module, inputs, states: turned(states, rotation.T) * weight)


def is_quantized(model: Any) -> bool:
    """Whether `quantize` has replaced layers of a model."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
