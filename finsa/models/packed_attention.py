"""Packed attention without cross-contamination: rows are concatenated, and attention is computed for each row alone.

Nearly all work of a layer is done token by token, whatever row a token belongs to; only attention mixes tokens. So the
rows of a micro-batch are concatenated to one sequence, without padding and without a mask, and attention is computed
row by row, causally, as if the row stood alone. The common prefix of all rows stands at the start of the sequence once,
and every row attends to it. On a GPU, flash attention's kernels for variable lengths do this instead.

Shapes: n tokens of a row, p of the prefix, s of the packed sequence, h attention heads, d their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finsa.models import masks

NAME = "finsa_packed"  # transformers builds no mask for an attention function without a registered mask function
PACKED = "_finsa_packed"  # attribute of the configuration that the attention layers share with their model


@dataclass
class PackedRows:
    """Layout of a packed sequence.

    Args:
        rows: number of tokens of each row.
        prefix: number of tokens before the first row, to which all rows attend.
        masks: of each row, (n, p + n), true where a token attends; None: causal attention without a prefix.
        calls: number of layers that have used it.
    """

    rows: list[int]
    prefix: int
    masks: list[torch.Tensor | None]
    calls: int = 0


def possible(model: Any) -> bool:
    """Whether a model's attention can be computed row by row on this device, with the same gradients."""
    found = masks.plain_layers(model)
    if not found or not masks.keeps_everything(model):
        return False
    net = masks.body(model)
    offered = getattr(net, "_supports_attention_backend", False) and net.config._attn_implementation == "sdpa"
    return bool(offered) and next(net.parameters()).device.type == "cpu"


@contextmanager
def apart(model: Any, rows: torch.Tensor, width: int) -> Iterator[None]:
    """Compute attention row by row within this context.

    Args:
        model: for which this is `possible`.
        rows: number of tokens of each row, (b,), in the order of the packed sequence.
        width: tokens of the packed sequence, s; those before the first row are the common prefix.

    Raises:
        RuntimeError: if a layer has not used the layout, so that its rows would have attended to each other.
    """
    sizes = rows.tolist()
    prefix, config = width - sum(sizes), masks.body(model).config
    seen = [torch.ones(n, prefix + n, dtype=torch.bool).tril(prefix) if prefix else None for n in sizes]
    packed, before = PackedRows(sizes, prefix, seen), config._attn_implementation
    config._attn_implementation = NAME
    setattr(config, PACKED, packed)
    try:
        yield
    finally:
        config._attn_implementation = before
        delattr(config, PACKED)
    if packed.calls != config.num_hidden_layers:
        raise RuntimeError(f"{packed.calls} of {config.num_hidden_layers} layers keep packed rows apart")


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer over a packed sequence; the signature is that of transformers' attention functions.

    Args:
        module: the attention layer.
        query: (1, h, s, d); key and value: the same with their numbers of heads.
        attention_mask: None.
        given: scaling, dropout and the like, the same for every row.

    Returns:
        The output, (1, s, h, d), and no attention weights.
    """
    packed: PackedRows = getattr(module.config, PACKED)
    packed.calls += 1
    sizes = [packed.prefix, *packed.rows] if packed.prefix else packed.rows
    states = [torch.split(tensor, sizes, dim=2) for tensor in (query, key, value)]
    rows = list(zip(*states, strict=True))
    outputs = []
    if packed.prefix:
        first, *rows = rows
        outputs.append(sdpa_attention_forward(module, *first, None, **given)[0])
        rows = [(q, torch.cat([first[1], k], dim=2), torch.cat([first[2], v], dim=2)) for q, k, v in rows]
    for (q, k, v), mask in zip(rows, packed.masks, strict=True):
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **given)[0])
    return torch.cat(outputs, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
