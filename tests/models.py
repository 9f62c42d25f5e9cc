"""Small models of real architectures, for tests that need gradients rather than knowledge."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

EXTRA: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "glm4": {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 1},
    "glm": {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 1},
}


def small(model_type: str = "qwen2", attention: str = "sdpa", vocabulary: int = 50) -> Any:
    """Two layers with random weights, the same ones at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **EXTRA[model_type],
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
