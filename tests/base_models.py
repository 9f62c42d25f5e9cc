"""Small models of real architectures, for tests that need gradients rather than knowledge."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finsa.config import ROOT

EXTRA: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "glm4": {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 1},
    "glm": {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 1},
}
GEMMA3 = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}  # needs a sliding_window


def small(model_type: str = "qwen2", attention: str = "sdpa", vocabulary: int = 50, **further: Any) -> Any:
    """Two layers with random weights, the same ones at every call; `further` configures the architecture."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **EXTRA.get(model_type, GEMMA3),
        **further,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def write_shallow(folder: Path, layers: int = 2) -> tuple[str, ...]:
    """Write the embedded base with its first layers alone; overrides that choose it."""
    shutil.copytree(ROOT / "data" / "tiny", folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"num_hidden_layers": layers, "layer_types": settings["layer_types"][:layers]}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    deep = tuple(f"model.layers.{number}." for number in range(layers, 4))
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(deep)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return f"model.path={folder}", f"model.architecture.num_hidden_layers={layers}"


EXPERTS = ("news", "forum", "reports")


def write_experts(folder: Path, model: Any = None, number: int = 3, **changed: Any) -> dict[str, Path]:
    """PEFT folders of experts with random A and B."""
    places = {}
    targets = ["q_proj", "v_proj", "down_proj"]
    for seed, name in enumerate(EXPERTS[:number]):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "lora_dropout": 0.0, **changed}
        wrapped = get_peft_model(copy.deepcopy(model) if model is not None else small(), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        places[name] = folder / name
        wrapped.save_pretrained(places[name])
    return places
