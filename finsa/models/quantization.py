"""Frozen bases in 4 or 8 bit, through transformers and bitsandbytes. No torch is imported before a weight is loaded."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from finsa.config import Method
from finsa.errors import ConfigError, Problem

# Bytes per weight: nf4 has half a byte and one 8-bit scale per 64, these scaled once per 256; int8 a scale per row.
BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


def require_library(method: Method) -> None:
    """Check, before any weight is loaded, that bitsandbytes is installed if the method quantizes.

    Raises:
        ConfigError: if it is not.
    """
    if method.quantization != "none" and find_spec("bitsandbytes") is None:
        text = f"{method.quantization} needs bitsandbytes: pip install bitsandbytes, or set method.quantization=none"
        raise ConfigError([Problem("method.quantization", text)])


def bitsandbytes_config(quantization: str, dtype: Any) -> Any:
    """The configuration with which transformers loads a base model quantized.

    Args:
        quantization: ``nf4`` (Dettmers et al. 2023: normal-float 4 bit, its scales quantized again) or ``int8``
            (Dettmers et al. 2022: columns with outliers stay in 16 bit).
        dtype: the dtype that products are computed in.
    """
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of casts to float16 in every layer and call
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def disable_cpu_repacking(model: Any) -> None:
    """Keep the weights of 4-bit layers trainable after a forward pass without gradients.

    On a CPU with avx512_bf16, such a pass repacks a layer permanently. Training then fails or silently gets no gradient
    (seen with bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def logical_size(parameter: Any) -> int:
    """Number of weights in a parameter; 4-bit weights are stored two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel() if state is not None else parameter.numel())
