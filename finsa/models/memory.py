"""What training and scoring need of memory: a step is run on shapes, no weight is loaded and nothing is computed.

On torch's meta device a model makes the tensors that a real step makes, without their contents. Counting which of them
exist at the same time gives the peak of what torch allocates, whatever the architecture, the adapter and the loss.

On a CPU the interpreter and its libraries count too, and what the allocator cannot reuse; on a GPU the estimate is of
what torch allocates there, to which the CUDA context adds about half a GiB.
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
from finsa.models import base, quantization

# Resident with interpreter, torch, transformers, trl and peft, before a weight is there (benchmarks/memory_plan.py).
LIBRARIES = int(0.65 * 2**30)
# A CPU's peak is what is resident. glibc gives blocks from LARGE on back at once. Smaller ones it keeps, and hands them
# mostly to tensors of the same size; per byte of these, so much is resident (measured by that script too).
LARGE, RESIDENT = 32 * 2**20, 1.5


@dataclass(frozen=True)
class Need:
    """Bytes at the peak.

    Args:
        libraries: interpreter and libraries; 0 on a GPU.
        weights: of the model, what learns included.
        optimiser: two moments, and the gradients of earlier micro-batches.
        activations: what forward keeps for the backward pass.
        passing: what is there for a moment: logits, gradients, a layer's own results.
    """

    libraries: int
    weights: int
    optimiser: int
    activations: int
    passing: int

    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def training(cfg: RunConfig, model: Any, loss: Callable[[], torch.Tensor], accumulated: bool) -> Need:
    """Estimate a training step's peak.

    Args:
        cfg: its method and the type of its weights.
        model: on the meta device, as `learner.on_meta` builds it.
        loss: runs a micro-batch forward.
        accumulated: whether gradients of earlier micro-batches are there already.
    """
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.grad = torch.empty_like(parameter) if accumulated else None
    model.train()
    with _Allocated(model) as seen, _fused():
        found = loss()
        kept = seen.now
        found.backward()  # type: ignore[no-untyped-call]
    for parameter in learnt:
        parameter.grad = None
    moments = sum(parameter.nbytes for parameter in learnt)
    weights, largest = _weights(cfg, model)
    return _need(weights, (3 if accumulated else 2) * moments, kept, seen.resident() + largest)


def scoring(cfg: RunConfig, model: Any, score: Callable[[], object], optimiser: bool) -> Need:
    """Estimate the peak of scoring labels.

    Args:
        cfg: as above.
        model: as above.
        score: scores a batch.
        optimiser: whether a training run's moments are there.
    """
    model.eval()
    with torch.no_grad(), _Allocated(model) as seen, _fused():
        score()
    moments = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    weights, largest = _weights(cfg, model)
    return _need(weights, 2 * moments if optimiser else 0, 0, seen.resident() + largest)


def _need(weights: int, optimiser: int, kept: int, peak: int) -> Need:
    return Need(0 if torch.cuda.is_available() else LIBRARIES, weights, optimiser, kept, peak - kept)


def _weights(cfg: RunConfig, model: Any) -> tuple[int, int]:
    """Bytes of all weights, and of the largest matrix as it is computed with; 0 where nothing is quantised."""
    kind = cfg.method.quantization
    if kind == "none":
        return base.bytes_of(model), 0
    inner = getattr(model, "backbone", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    whole = {id(part.weight) for part in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    stored = {id(p): p for p in model.parameters() if p.ndim == 2 and not p.requires_grad and id(p) not in whole}
    packed = int(sum(p.numel() for p in stored.values()) * quantization.BYTES[kind])
    others = sum(p.nbytes for p in model.parameters() if id(p) not in stored)
    return packed + others, max((p.nbytes for p in stored.values()), default=0)


class _Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are made while it is active, as many as exist at the same time.

    Args:
        model: whose weights and gradients are not counted.

    Attributes:
        now: bytes of those that exist.
        peak: the most that have existed at once.
        sizes: of blocks smaller than `LARGE`, by size, the bytes that exist and the most that have.
        large: the same of the others.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.sizes, self.large = dict[int, list[int]](), [0, 0]
        held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.known = {tensor.untyped_storage()._cdata for tensor in held}
        self.seen: dict[int, Any] = {}

    def resident(self) -> int:
        """Bytes that the peak takes of the machine."""
        if torch.cuda.is_available():
            return self.peak
        return int(RESIDENT * sum(most for _, most in self.sizes.values())) + self.large[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # a question about contents, such as whether a mask hides nothing: nothing special is there
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

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
def _fused() -> Iterator[None]:
    """Attention by the fused kernel where a real step would take it; shapes alone always take the one of many parts.

    In the function's own place: what a checkpointed layer runs again in backward, torch's function modes do not see.
    """
    plain = functional.scaled_dot_product_attention
    if torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
        functional.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What the kernel makes, on a CPU and a GPU alike: an output, and a number per query and head."""
    made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return made[0]  # type: ignore[no-any-return]
