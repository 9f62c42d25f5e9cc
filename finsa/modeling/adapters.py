"""LoRA adapters on a frozen base, through PEFT; saved and loaded as ordinary PEFT folders.

PiSSA takes the largest singular directions out of the base and trains them as the adapter. Its base is given back as
it was, and what is saved is the difference to its start, an ordinary LoRA of twice the rank on the unchanged base:
B A - B0 A0 = [B, -B0] [A; A0].
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from finsa.config import Adapter, Model
from finsa.errors import ConfigError, ModelError, Problem, suggest


def targets(model: Model, adapter: Adapter) -> list[str]:
    """Resolve an adapter's targets to module names of this model.

    A model with remote code may have other module names than the native stand-in that random weights are built from.
    """
    if isinstance(adapter.targets, tuple):
        return list(adapter.targets)
    named: dict[str, Any] = model.lora_targets.model_dump()
    if model.weights == "random" and model.architecture.get("lora_targets"):
        named = model.architecture["lora_targets"]
    return list(named[adapter.targets])


def attach(base: PreTrainedModel, model: Model, adapter: Adapter, seed: int) -> PeftModel:
    """Put a fresh adapter on a base; only the adapter learns, in float32 whatever the base's type.

    Raises:
        ConfigError: where a target is no linear layer of this model.
    """
    names = targets(model, adapter)
    _check_targets(base, names)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=adapter.variant == "dora",
        use_rslora=adapter.variant == "rslora",
        init_lora_weights="pissa_niter_16" if _decomposes(base, adapter) else True,
    )
    weights = {name: p.data for name, p in base.named_parameters()} if _decomposes(base, adapter) else {}
    peft_model: PeftModel = get_peft_model(base, config)
    if weights:
        peft_model.pissa_base = weights  # the tensors themselves: PEFT puts others in their place
        peft_model.pissa_start = {name: t.clone() for name, t in get_peft_model_state_dict(peft_model).items()}
    return peft_model


def _decomposes(base: PreTrainedModel, adapter: Adapter) -> bool:
    """Whether weights are decomposed; shapes without memory have none, and their counts are the same."""
    return adapter.variant == "pissa" and base.device.type != "meta"


def _check_targets(base: PreTrainedModel, names: list[str]) -> None:
    linears = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if _is_linear(module)}
    linears.discard("lm_head")
    unknown = [name for name in names if name not in linears]
    if unknown:
        hint = suggest(unknown[0], linears)
        raise ConfigError([Problem("method.adapter.targets", f"this model has no linear layer '{unknown[0]}'. {hint}")])


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def save(model: PeftModel, folder: Path) -> None:
    """Write an adapter that fits the base as it was before `attach`."""
    start = getattr(model, "pissa_start", None)
    if start is None:
        model.save_pretrained(folder)
        return
    trained = get_peft_model_state_dict(model)
    both = {
        name: torch.cat([tensor, start[name]], 0) if "lora_A" in name else torch.cat([tensor, -start[name]], 1)
        for name, tensor in trained.items()
    }
    config = copy.copy(model.peft_config["default"])
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in both.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on a base, for scoring.

    Raises:
        ModelError: for a folder that holds no adapter, or one that does not fit the base.
    """
    try:
        loaded: PeftModel = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: no adapter that fits this base: {str(error).splitlines()[0]}") from None
    return loaded.eval()


def detach(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off again, leaving the base as it was before `attach`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base: PreTrainedModel = model.unload()
    for name, parameter in base.named_parameters():
        if name in getattr(model, "pissa_base", {}):
            parameter.data = model.pissa_base[name]
    # trl replaces `forward` on the instance each time a trainer is made; the class's own one comes back.
    base.__dict__.pop("forward", None)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(attribute, None)
    return base.requires_grad_(False).eval()


def stop_checkpointing(base: PreTrainedModel) -> None:
    """Let a base keep its activations again, as it did before a training that checkpointed them.

    Each trainer's hook on the embeddings goes: transformers keeps but the last one's handle.
    """
    if base.is_gradient_checkpointing:
        base.gradient_checkpointing_disable()
    base.disable_input_require_grads()
    hooks = base.get_input_embeddings()._forward_hooks
    for number, hook in list(hooks.items()):
        if "enable_input_require_grads" in getattr(hook, "__qualname__", ""):
            del hooks[number]
