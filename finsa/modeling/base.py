"""Base models: from a folder, from the hub, with random weights, or as shapes without memory."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from finsa import provenance
from finsa.config import Model
from finsa.errors import ConfigError, Problem, suggest
from finsa.modeling import quantization as quantized
from finsa.modeling.tokenizers import source_of, unavailable


def architecture(model: Model) -> PretrainedConfig:
    """Build the architecture's configuration from its YAML block.

    Raises:
        ConfigError: for keys the architecture does not know; transformers itself would keep them silently.
    """
    block = {key: value for key, value in copy.deepcopy(model.architecture).items() if key != "lora_targets"}
    try:
        known = set(AutoConfig.for_model(block["model_type"]).to_dict())
    except ValueError:
        raise ConfigError(
            [Problem("model.architecture.model_type", f"transformers knows no '{block['model_type']}'")]
        ) from None
    unknown = set(block) - known
    if unknown:
        problems = (Problem(f"model.architecture.{key}", f"unknown key. {suggest(key, known)}") for key in unknown)
        raise ConfigError(problems)
    return AutoConfig.for_model(**block)


def on_meta(model: Model) -> PreTrainedModel:
    """Build a model without memory, for counting its parameters."""
    with torch.device("meta"):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(architecture(model), attn_implementation="sdpa")
    return built


_bases: dict[str, PreTrainedModel] = {}


def load_base(model: Model, seed: int, keep: bool = True, quantization: str = "none") -> PreTrainedModel:
    """Load a base model, frozen and in evaluation mode; a sweep's jobs share it.

    Args:
        model: the model's section.
        seed: of random weights.
        keep: whether later calls get the same object (not for methods that change the base's own weights).
        quantization: ``none``, ``nf4`` or ``int8``.

    Raises:
        ModelError: where weights cannot be had.
    """
    drawn_or_read = seed if model.weights == "random" else provenance.files_of(model)
    key = f"{model.model_dump_json()}{quantization}{drawn_or_read}"
    if key not in _bases:
        _bases.clear()  # one base at a time: two of 9B would not fit anywhere
        base = _random(model, seed, quantization) if model.weights == "random" else _pretrained(model, quantization)
        base.requires_grad_(False).eval()
        quantized.make_trainable(base)
        _bases[key] = base if quantization != "none" else base.to(device())
    return _bases[key] if keep else _bases.pop(key)


def forget(base: PreTrainedModel) -> None:
    """Drop a base from the shared ones, because it may no longer be what was loaded."""
    for key in [key for key, kept in _bases.items() if kept is base]:
        del _bases[key]


def _random(model: Model, seed: int, quantization: str) -> PreTrainedModel:
    torch.manual_seed(seed)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(
        architecture(model), attn_implementation=model.attention, dtype=dtype(model)
    )
    if quantization == "none":
        return built
    with tempfile.TemporaryDirectory() as folder:  # weights are quantised while they are read
        built.save_pretrained(folder)
        return _pretrained(model.model_copy(update={"path": folder, "weights": "pretrained"}), quantization)


def _pretrained(model: Model, quantization: str) -> PreTrainedModel:
    source, revision = source_of(model)
    given: dict[str, Any] = {}
    if quantization != "none":
        given = {"quantization_config": quantized.settings(quantization, dtype(model)), "device_map": {"": device()}}
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype(model),
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
            **given,
        )
    except (OSError, ValueError) as error:
        raise unavailable(model, source, "weights", error) from None
    return loaded


def device() -> torch.device:
    """The device that models run on: this process's GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def dtype(model: Model) -> torch.dtype:
    """Resolve ``auto``: bfloat16 only where the hardware computes in it.

    A CPU without avx512_bf16 or AMX emulates bfloat16, four times slower than float32 and worse.
    """
    if model.dtype != "auto":
        return torch.float32 if model.dtype == "float32" else getattr(torch, model.dtype)
    return torch.bfloat16 if _computes_bf16() else torch.float32


@cache
def _computes_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def bytes_of(model: torch.nn.Module) -> int:
    """Memory of a model's weights, in bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Count parameters, tied ones once, quantised ones as the weights they stand for.

    Returns:
        Those that learn, and all.
    """
    parameters = list(model.parameters())
    sizes = [quantized.logical_size(parameter) for parameter in parameters]
    return sum(size for size, p in zip(sizes, parameters, strict=True) if p.requires_grad), sum(sizes)
