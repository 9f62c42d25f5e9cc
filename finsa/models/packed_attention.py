"""Attention within each row of a line: rows behind one another, neither padded nor kept apart by a mask.

Nearly all work of a layer is done token by token and does not ask whose token it is; attention alone does. So the rows
of a micro-batch make one line, and attention is computed row by row, causally, as it would be if the row stood alone.
What all rows begin with stands at the head of the line once, and every row sees it. On a GPU flash-attention's kernels
for sequences of any length do this; there, nothing here is used.

Letters: n tokens of a row, p of the head, s of the line, h heads of attention, d their width.
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

NAME = "finsa_lines"  # transformers makes no mask for an attention that has registered none


@dataclass
class Line:
    """What attention has to know of a line.

    Args:
        rows: tokens of each row.
        head: tokens before the first row that all of them see.
        seen: of each row, which tokens of the head and itself each of its tokens sees, (n, p + n); None: all before.
        calls: layers that have asked.
    """

    rows: list[int]
    head: int
    seen: list[torch.Tensor | None]
    calls: int = 0


def possible(model: Any) -> bool:
    """Whether a model's attention can be computed row by row here, with the same gradients."""
    found = masks.plain_layers(model)
    if not found or not masks.keeps_everything(model):
        return False
    net = masks.body(model)
    offered = getattr(net, "_supports_attention_backend", False) and net.config._attn_implementation == "sdpa"
    return bool(offered) and next(net.parameters()).device.type == "cpu"


@contextmanager
def apart(model: Any, rows: torch.Tensor, width: int) -> Iterator[None]:
    """Within, attention keeps the rows of a line apart.

    Args:
        model: one for which this is `possible`.
        rows: tokens of each row, (b,), in the order of the line.
        width: tokens of the line, s; those before the first row are its head.

    Raises:
        RuntimeError: where a layer has not asked, so that its rows would have seen each other.
    """
    global _line
    sizes = rows.tolist()
    head, config = width - sum(sizes), masks.body(model).config
    seen = [torch.ones(n, head + n, dtype=torch.bool).tril(head) if head else None for n in sizes]
    line = Line(sizes, head, seen)
    before, config._attn_implementation, _line = config._attn_implementation, NAME, line
    try:
        yield
    finally:
        config._attn_implementation, _line = before, None
    if line.calls != config.num_hidden_layers:
        raise RuntimeError(f"{line.calls} of {config.num_hidden_layers} layers keep the rows of a line apart")


_line: Line | None = None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer over the line that is forwarded; shapes and arguments as transformers hands them over.

    Args:
        module: the layer's attention.
        query: (1, h, s, d); key and value: the same of their own heads.
        attention_mask: none.
        given: scaling, dropout and the like, the same for every row.

    Returns:
        (1, s, h, d), and no weights.
    """
    line = _line
    assert line is not None
    line.calls += 1
    sizes = [line.head, *line.rows] if line.head else line.rows
    parts = [torch.split(states, sizes, dim=2) for states in (query, key, value)]
    parts = list(zip(*parts, strict=True))
    found = []
    if line.head:
        first, *parts = parts
        found.append(sdpa_attention_forward(module, *first, None, **given)[0])
        parts = [(q, torch.cat([first[1], k], dim=2), torch.cat([first[2], v], dim=2)) for q, k, v in parts]
    for (q, k, v), seen in zip(parts, line.seen, strict=True):
        found.append(sdpa_attention_forward(module, q, k, v, seen, **given)[0])
    return torch.cat(found, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
