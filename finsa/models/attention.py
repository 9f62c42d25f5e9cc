"""What a causal language model's attention does with masks and prefixes, and two ways to compute less of it.

`packed_rows`: packed attention without cross-contamination. Nearly all work of a layer is done token by token, whatever
row a token belongs to; only attention mixes tokens. So the rows of a micro-batch are concatenated to one sequence,
without padding and without a mask, and attention is computed row by row, causally, as if the row stood alone. The
common prefix of all rows stands at the start once, and every row attends to it. On a GPU, flash attention's kernels for
variable lengths do this instead.

`last_mlp_at`: the last layer's MLP only at the positions whose logits are read. Its output at a position goes into the
logits of that position alone: no later layer attends to it. A prompt of a hundred tokens with an answer of one token
reads one or two positions. In the embedded base model with four layers the rest is a sixth of the work, in a model with
24 layers a fortieth.

Shapes: n tokens of a row, p of the prefix, s of a sequence, h attention heads, d their width, b rows, k positions read.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finsa.models.classifier import causal
from finsa.runs import processes

NAME = "finsa_packed"  # transformers builds no mask for an attention function without a registered mask function
PACKED = "_finsa_packed"  # attribute of the configuration that the attention layers share with their model
MOST = 0.5  # share of the positions above which the whole product costs less than gathering its rows


def causal_model(model: Any) -> Any:
    """The causal language model within DDP, a classifier, a mixture or PEFT."""
    inner = getattr(model, "module", model)
    return causal(getattr(inner, "backbone", inner))


def is_remote(model: Any) -> bool:
    """Whether the model's code was downloaded with its weights, so that nothing is known about it."""
    return type(causal_model(model)).__module__.startswith("transformers_modules")


def decoder_layers(model: Any) -> Any:
    """The decoder layers; None if they are recomputed in backward, sharded (FSDP), or unknown."""
    layers = getattr(getattr(causal_model(model), "base_model", None), "layers", None)
    if not layers or is_remote(model) or processes.is_sharded(model):
        return None
    return None if getattr(layers[-1], "gradient_checkpointing", False) else layers


def full_attention(model: Any, longest: int = sys.maxsize) -> bool:
    """Whether every layer caches all keys and values and nothing else.

    Then a mask separates rows and labels, and a common prefix can be computed once. Linear attention and convolutions
    carry a state past every mask. Within its window, sliding-window attention is full attention.

    Args:
        model: a causal language model or a mixture, wrapped or not.
        longest: tokens of the longest sequence, prefix included.
    """

    def keeps(layer: Any) -> bool:
        if type(layer) is DynamicSlidingWindowLayer:
            return longest <= layer.sliding_window
        return type(layer) is DynamicLayer

    return not is_remote(model) and all(map(keeps, DynamicCache(config=causal_model(model).config).layers))


def uses_flash_attention(model: Any) -> bool:
    """Whether attention separates packed rows by their position ids, without a mask."""
    return "flash" in str(getattr(causal_model(model).config, "_attn_implementation", None))


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


def can_pack(model: Any) -> bool:
    """Whether a model's attention can be computed row by row on this device, with the same gradients."""
    found = decoder_layers(model)
    if not found or not full_attention(model):
        return False
    net = causal_model(model)
    offered = getattr(net, "_supports_attention_backend", False) and net.config._attn_implementation == "sdpa"
    return bool(offered) and next(net.parameters()).device.type == "cpu"


@contextmanager
def packed_rows(model: Any, rows: torch.Tensor, width: int) -> Iterator[None]:
    """Compute attention row by row within this context.

    Args:
        model: for which this is `can_pack`.
        rows: number of tokens of each row, (b,), in the order of the packed sequence.
        width: tokens of the packed sequence, s; those before the first row are the common prefix.

    Raises:
        RuntimeError: if a layer has not used the layout, so that its rows would have attended to each other.
    """
    sizes = rows.tolist()
    prefix, config = width - sum(sizes), causal_model(model).config
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


@contextmanager
def last_mlp_at(model: Any, read: torch.Tensor, positions: int) -> Iterator[None]:
    """Compute the last MLP only at the positions whose logits are read; these logits do not change.

    Args:
        model: a causal language model or a mixture, wrapped by PEFT or DDP or not.
        read: positions, (b, k), as in ``logits_to_keep``; none of them twice in a row.
        positions: number of positions of a row, s.
    """
    found = last_mlp(model) if read.shape[1] <= MOST * positions else None
    if found is None:
        yield
        return

    def index(states: torch.Tensor) -> torch.Tensor:
        """Index of (b, ., d), or of (E b, ., d): a mixture of outputs forwards all rows once per expert."""
        return read.repeat(len(states) // len(read), 1)[:, :, None].expand(-1, -1, states.shape[2])

    def gather(module: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (given[0].gather(1, index(given[0])),)

    def scatter(module: torch.nn.Module, given: tuple[torch.Tensor], made: Any) -> Any:
        first, *rest = made if isinstance(made, tuple) else (made,)  # experts in a layer also return their gates
        full = first.new_zeros(first.shape[0], positions, first.shape[2]).scatter(1, index(first), first)
        return (full, *rest) if isinstance(made, tuple) else full

    hooks = [found.register_forward_pre_hook(gather), found.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_mlp(model: Any) -> torch.nn.Module | None:
    """The MLP of the last layer, if it can be computed at single positions; None if not."""
    layers = decoder_layers(model)
    found = getattr(layers[-1], "mlp", None) if layers else None
    if not isinstance(found, torch.nn.Module) or len(inspect.signature(found.forward).parameters) != 1:
        return None
    return found
