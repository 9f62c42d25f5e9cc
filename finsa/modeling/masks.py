"""What a model makes of attention masks and of keys and values that it is given."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from finsa import processes
from finsa.modeling.classifier import causal


def body(model: Any) -> Any:
    """The causal language model within DDP, a classifier, a mixture or PEFT."""
    inner = getattr(model, "module", model)
    return causal(getattr(inner, "backbone", inner))


def is_remote(model: Any) -> bool:
    """Whether the model's code came with its weights, so that nothing is known of it."""
    return type(body(model)).__module__.startswith("transformers_modules")


def plain_layers(model: Any) -> Any:
    """The decoder's layers; None where they run again in backward, are compiled, divided (FSDP), or unknown."""
    layers = getattr(getattr(body(model), "base_model", None), "layers", None)
    if not layers or is_remote(model) or processes.divided(model):
        return None
    last = layers[-1]
    return None if getattr(last, "gradient_checkpointing", False) or last._compiled_call_impl is not None else layers


def keeps_everything(model: Any) -> bool:
    """Whether every layer keeps all keys and values and nothing else.

    There a mask keeps rows and labels apart and a head may be forwarded once. Linear attention and convolutions carry a
    state past every mask, and sliding windows have masks of their own.
    """
    kinds = {type(layer) for layer in DynamicCache(config=body(model).config).layers}
    return not is_remote(model) and kinds <= {DynamicLayer}


def maskless(model: Any) -> bool:
    """Whether attention keeps the rows of a pack apart by their positions, without a mask."""
    return "flash" in str(getattr(body(model).config, "_attn_implementation", None))
