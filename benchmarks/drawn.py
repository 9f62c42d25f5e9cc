"""Bases with random weights for benchmarks, drawn where they are used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finsa.config import Model
from finsa.models import base


def on_device(model: Model, dtype: torch.dtype) -> Any:
    """A frozen base with random weights, the same at every call.

    On a GPU they are drawn there, which takes a second where a CPU needs minutes for billions of them; so they are not
    those of a CPU.
    """
    section = model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    if not torch.cuda.is_available():
        return base.load_base(section, 0)
    torch.manual_seed(0)
    with base.device():
        built = AutoModelForCausalLM.from_config(
            base.architecture(section), attn_implementation=section.attention, dtype=dtype
        )
    return built.requires_grad_(False).eval()
