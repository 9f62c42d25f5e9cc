"""Base models: from a folder, from the hub, with random weights, or on the meta device without memory."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from finsa.config import Model
from finsa.data import hub
from finsa.errors import ConfigError, Problem, suggest
from finsa.models import folders
from finsa.models.quantization import bitsandbytes_config, disable_cpu_repacking, logical_size
from finsa.models.tokenizers import source_of, unavailable
from finsa.runs import provenance
from finsa.runs.weight_files import read_json
from finsa.session import Session

# Entries of config.json that may differ from an architecture block without the model being another one.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def architecture(model: Model) -> PretrainedConfig:
    """The architecture's configuration: from ``config.json`` if it is on this machine, otherwise from the YAML block.

    Raises:
        ConfigError: if the block has keys that the architecture does not know (transformers would ignore them) or
            differs from ``config.json``, and if there is neither.
    """
    file = _config_file(model)
    found = None if file is None else _read(file)
    if model.architecture is not None:
        block = _read_block(model.architecture)
        if found is None or model.weights == "random":
            return block  # for code that is shipped with the weights, the block is a stand-in
        assert file is not None
        _require_same(model, block, found, file)
        return found
    if found is not None:
        return found
    if file is None:
        text = f"is null, and there is no {folders.CONFIG} to read it from; give model.path a folder that has one"
    else:
        kind = (read_json(file) or {}).get("model_type")
        text = (
            f"transformers has no architecture '{kind}' ({file}), so the code shipped with the weights is needed. "
            "Plans need a stand-in of the same size: write an architecture block as in conf/model/baichuan2_7b.yaml"
        )
    raise ConfigError([Problem("model.architecture", text)])


def _config_file(model: Model) -> Path | None:
    """The model's ``config.json``; downloaded for a hub model without an architecture block."""
    if model.path is not None:
        file = Path(source_of(model)[0]) / folders.CONFIG
        return file if file.is_file() else None
    if model.hub_id is None:
        return None
    file_in_cache = hub.cached(model.hub_id, folders.CONFIG, model.revision)
    if file_in_cache is not None or model.architecture is not None:
        return file_in_cache
    refusal = hub.unreachable()
    try:
        if refusal is None:
            return hub.fetch(model.hub_id, folders.CONFIG, model.revision)
    except OSError as error:
        refusal = str(error)
    raise unavailable(model, model.hub_id, model.revision, folders.CONFIG, refusal or "")


def _read(file: Path) -> PretrainedConfig | None:
    """Read a ``config.json``; None if its architecture is defined by code that is shipped with the weights.

    Raises:
        ConfigError: if transformers rejects its values.
    """
    values = read_json(file) or {}
    if values.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        return AutoConfig.from_pretrained(str(file.parent))
    except Exception as error:  # a wrong value may cause an error of any type
        reason = str(error).splitlines()[0][:160]
        raise ConfigError([Problem("model.path", f"{file} cannot be read by transformers: {reason}")]) from None


def _read_block(given: dict[str, Any]) -> PretrainedConfig:
    block = {key: value for key, value in copy.deepcopy(given).items() if key != "lora_targets"}
    try:
        known = set(AutoConfig.for_model(block["model_type"]).to_dict())
    except ValueError:
        raise ConfigError(
            [Problem("model.architecture.model_type", f"transformers knows no '{block['model_type']}'")]
        ) from None
    unknown = sorted(key for key in set(block) - known if block[key] is not None)
    if unknown:
        hint = "A key inherited from a model of another family is removed by"
        problems = (
            Problem(f"model.architecture.{key}", f"unknown key. {suggest(key, known)} {hint} {key}: null")
            for key in unknown
        )
        raise ConfigError(problems)
    return AutoConfig.for_model(**{key: value for key, value in block.items() if key in known})


def _require_same(model: Model, block: PretrainedConfig, found: PretrainedConfig, file: Path) -> None:
    """Check that an architecture block and the model's ``config.json`` mean the same to transformers.

    Raises:
        ConfigError: with the keys that differ.
    """
    keys = ["model_type"]
    if block.model_type == found.model_type:
        given = (key for key, value in (model.architecture or {}).items() if value is not None)
        keys = [key for key in given if key not in (*TOKENS, "lora_targets")]
    different = []
    for key in keys:
        expected, actual = getattr(block, key, None), getattr(found, key, None)
        if isinstance(expected, dict) and isinstance(actual, dict):
            actual = {name: actual.get(name) for name in expected}
        if expected != actual:
            different.append(f"{key}: {expected} (in the file {actual})")
    if different:
        listed = "; ".join(different[:6]) + (f"; and {len(different) - 6} more" if len(different) > 6 else "")
        text = (
            f"model={model.name} differs from {file}: {listed}. To use {folders.CONFIG}: model=local "
            "model.path=<folder>, or architecture: null in the model's file; otherwise correct the values"
        )
        raise ConfigError([Problem("model.architecture", text)])


def on_meta(model: Model) -> PreTrainedModel:
    """Build a model on the meta device, with the dtype and attention that it would be loaded with."""
    attention = "eager" if model.attention == "eager" else "sdpa"  # the meta device has no other kernel
    with torch.device("meta"):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture(model), attn_implementation=attention, dtype=dtype(model)
        )
    return built


def key(model: Model, seed: int, quantization: str) -> str:
    """A string that is equal for two base models exactly if they are the same; see `load_base`."""
    weights = seed if model.weights == "random" else provenance.files_of(model)
    return f"{model.model_dump_json()}{quantization}{weights}"


def load_base(model: Model, seed: int, quantization: str = "none", session: Session | None = None) -> PreTrainedModel:
    """Load a base model, frozen and in evaluation mode.

    Args:
        model: the configuration of the model.
        seed: seed of random weights.
        quantization: ``none``, ``nf4`` or ``int8``.
        session: shares the model with later calls; None for methods that change the base model's weights.

    Raises:
        ModelError: if the weights cannot be loaded.
    """
    name = key(model, seed, quantization)
    shared: dict[str, PreTrainedModel] = session.base_models if session else {}
    if name not in shared:
        shared.clear()  # one base model at a time: two of 9B would not fit into memory
        base = _random(model, seed, quantization) if model.weights == "random" else _pretrained(model, quantization)
        base.requires_grad_(False).eval()
        disable_cpu_repacking(base)
        shared[name] = base if quantization != "none" else base.to(device())
    return shared[name]


def _random(model: Model, seed: int, quantization: str) -> PreTrainedModel:
    torch.manual_seed(seed)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(
        architecture(model), attn_implementation=model.attention, dtype=dtype(model)
    )
    return built if quantization == "none" else quantize(built, quantization)


def quantize(built: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """Quantize a base model that is in memory, without a copy on disk.

    Args:
        built: the model, on any device, in the dtype that products are to be computed in.
        quantization: ``nf4`` or ``int8``.

    Returns:
        A new model on this process's device; layers that are not quantized may share the memory of `built`.
    """
    config, dtype = copy.deepcopy(built.config), built.dtype
    quantized: PreTrainedModel = type(built).from_pretrained(
        None,
        config=config,
        state_dict=built.state_dict(),
        dtype=dtype,
        attn_implementation=built.config._attn_implementation,
        quantization_config=bitsandbytes_config(quantization, dtype),
        device_map={"": device()},
    )
    return quantized


def _pretrained(model: Model, quantization: str) -> PreTrainedModel:
    folders.raise_any(folders.weights_problems(model))
    source, revision = source_of(model)
    refusal = hub.refusal(source)
    given: dict[str, Any] = {}
    if quantization != "none":
        given = {"quantization_config": bitsandbytes_config(quantization, dtype(model)), "device_map": {"": device()}}
    try:
        folders.require_no_adapter(source, revision, refusal is not None)
        with hub.cache_alone(refusal):
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=dtype(model),
                attn_implementation=model.attention,
                trust_remote_code=model.trust_remote_code,
                **given,
            )
    except (OSError, ValueError) as error:
        raise unavailable(model, source, revision, "weights", refusal or error) from None
    return loaded


def device() -> torch.device:
    """The device that models run on: this process's GPU if there is one, otherwise the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def dtype(model: Model) -> torch.dtype:
    """Resolve ``auto``: bfloat16 if the hardware supports it, otherwise float32.

    A CPU without avx512_bf16 or AMX emulates bfloat16, four times slower than float32 and less accurately.
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
    """Count parameters: tied ones once, quantized ones as the weights that they encode.

    Returns:
        The number of trainable parameters, and of all.
    """
    parameters = list(model.parameters())
    sizes = [logical_size(parameter) for parameter in parameters]
    return sum(size for size, p in zip(sizes, parameters, strict=True) if p.requires_grad), sum(sizes)
