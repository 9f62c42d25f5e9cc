"""What a model makes of attention masks and of keys and values that it is given."""

from __future__ import annotations

import sys
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from finsa.models.classifier import causal
from finsa.runs import processes


def body(model: Any) -> Any:
    """The causal language model within DDP, a classifier, a mixture or PEFT."""
    inner = getattr(model, "module", model)
    return causal(getattr(inner, "backbone", inner))


def is_remote(model: Any) -> bool:
    """Whether the model's code came with its weights, so that nothing is known of it."""
    return type(body(model)).__module__.startswith("transformers_modules")


def plain_layers(model: Any) -> Any:
    """The decoder's layers; None where they run again in backward, are sharded (FSDP), or unknown."""
    layers = getattr(getattr(body(model), "base_model", None), "layers", None)
    if not layers or is_remote(model) or processes.divided(model):
        return None
    return None if getattr(layers[-1], "gradient_checkpointing", False) else layers


def keeps_everything(model: Any, longest: int = sys.maxsize) -> bool:
    """Whether every layer keeps all keys and values and nothing else.

    There a mask keeps rows and labels apart and a prefix may be forwarded once. Linear attention and convolutions carry
    a state past every mask. Within its window, a layer with sliding-window attention is an ordinary one.

    Args:
        model: a causal language model or a mixture, wrapped or not.
        longest: tokens of the longest sequence, prefix included.
    """

    def keeps(layer: Any) -> bool:
        if type(layer) is DynamicSlidingWindowLayer:
            return longest <= layer.sliding_window
        return type(layer) is DynamicLayer

    return not is_remote(model) and all(map(keeps, DynamicCache(config=body(model).config).layers))


def maskless(model: Any) -> bool:
    """Whether attention keeps the rows of a pack apart by their positions, without a mask."""
    return "flash" in str(getattr(body(model).config, "_attn_implementation", None))
