"""Peak memory of training and scoring, estimated from a step on torch's meta device.

On the meta device a step creates the same tensors as a real step, without their contents, so no weights are loaded and
nothing is computed. Counting the tensors that exist at the same time gives the peak of torch's allocations, whatever
the architecture, the adapter and the loss.

On a CPU the estimate includes the interpreter, the libraries and what the allocator cannot reuse. On a GPU it covers
torch's allocations; the CUDA context adds about half a GiB.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finsa.config import RunConfig
from finsa.models import attention, base, quantization

# Resident memory of interpreter, torch, transformers, trl and peft (measured by benchmarks/memory_plan.py).
LIBRARIES = int(0.65 * 2**30)
# On a CPU the peak of resident memory counts. glibc returns blocks of at least LARGE bytes to the system at once. It
# keeps smaller ones and reuses them mostly for tensors of the same size; RESIDENT bytes stay resident per byte of these
# (measured by the same script).
LARGE, RESIDENT = 32 * 2**20, 1.5


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak; ``run.json`` and the plan name the parts as the fields are named.

    Args:
        libraries: interpreter and libraries; 0 on a GPU.
        weights: weights of the model, adapters and heads included.
        optimizer: the two moments, and the gradients of earlier micro-batches.
        activations: what the forward pass keeps for the backward pass.
        passing: temporary tensors: logits, gradients, intermediate results of a layer.
    """

    libraries: int
    weights: int
    optimizer: int
    activations: int
    passing: int

    def total(self) -> int:
        """Sum of all parts."""
        return sum(vars(self).values())


def estimate_training(cfg: RunConfig, model: Any, loss: Callable[[], torch.Tensor], accumulated: bool) -> PeakMemory:
    """Estimate the peak of a training step.

    Args:
        cfg: the configuration; its method says how the weights are stored.
        model: the model on the meta device, from `factory.on_meta`.
        loss: runs the forward pass of a micro-batch.
        accumulated: whether gradients of earlier micro-batches exist already.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter) if accumulated else None
    model.train()
    with _AllocationCounter(model) as counter, _fused_attention():
        value = loss()
        kept = counter.now
        value.backward()  # type: ignore[no-untyped-call]
    for parameter in trainable:
        parameter.grad = None
    moments = sum(parameter.nbytes for parameter in trainable)
    weights, largest = _weights(cfg, model)
    return _peak(weights, (3 if accumulated else 2) * moments, kept, counter.resident() + largest)


def estimate_scoring(cfg: RunConfig, model: Any, score: Callable[[], object], optimizer: bool) -> PeakMemory:
    """Estimate the peak of scoring labels.

    Args:
        cfg: the configuration; its method says how the weights are stored.
        model: the model on the meta device.
        score: scores a batch.
        optimizer: whether the moments of a training run are in memory.
    """
    model.eval()
    with torch.no_grad(), _AllocationCounter(model) as counter, _fused_attention():
        score()
    moments = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    weights, largest = _weights(cfg, model)
    return _peak(weights, 2 * moments if optimizer else 0, 0, counter.resident() + largest)


def _peak(weights: int, optimizer: int, kept: int, peak: int) -> PeakMemory:
    return PeakMemory(0 if torch.cuda.is_available() else LIBRARIES, weights, optimizer, kept, peak - kept)


def _weights(cfg: RunConfig, model: Any) -> tuple[int, int]:
    """Bytes of all weights, and of the largest matrix when it is dequantized; 0 without quantization."""
    kind = cfg.method.quantization
    if kind == "none":
        return base.bytes_of(model), 0
    inner = attention.causal_model(model)
    whole = {id(part.weight) for part in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    stored = {id(p): p for p in model.parameters() if p.ndim == 2 and not p.requires_grad and id(p) not in whole}
    packed = int(sum(p.numel() for p in stored.values()) * quantization.BYTES[kind])
    others = sum(p.nbytes for p in model.parameters() if id(p) not in stored)
    return packed + others, max((p.nbytes for p in stored.values()), default=0)


class _AllocationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are created while it is active.

    Args:
        model: the model, whose weights and gradients are not counted.

    Attributes:
        now: current bytes.
        peak: maximum of `now`.
        sizes: current and maximal bytes of blocks smaller than `LARGE`, by the size of the block.
        large: current and maximal bytes of all other blocks.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.sizes, self.large = dict[int, list[int]](), [0, 0]
        held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.known = {tensor.untyped_storage()._cdata for tensor in held}
        self.seen: dict[int, Any] = {}

    def resident(self) -> int:
        """Estimated bytes of device memory at the peak."""
        if torch.cuda.is_available():
            return self.peak
        return int(RESIDENT * sum(most for _, most in self.sizes.values())) + self.large[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # a test of contents, which the meta device lacks, such as whether a mask is all true
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.seen:
            return
        counts = self.sizes.setdefault(size, [0, 0]) if size < LARGE else self.large

        def freed(_: object) -> None:
            del self.seen[key]
            self.now -= size
            counts[0] -= size

        self.seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
        counts[0] += size
        counts[1] = max(counts)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Use the fused attention kernel if a real step would; the meta device always takes the unfused one.

    This replaces torch's function, because function modes do not see what checkpointed layers recompute in backward.
    """
    plain = functional.scaled_dot_product_attention
    if torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
        functional.scaled_dot_product_attention = _flash_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The output of the fused kernel, which also allocates a number per query and head, on a CPU as on a GPU."""
    outputs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return outputs[0]  # type: ignore[no-any-return]
