"""LoRA adapters on a frozen base model, through PEFT; saved and loaded as ordinary PEFT folders.

PiSSA moves the largest singular directions of the base model's weights into the adapter and trains them there. `detach`
restores the original weights, and `save` writes the difference between the trained and the initial adapter, which is an
ordinary LoRA of twice the rank on the original base model: B A - B0 A0 = [B, -B0] [A; A0].
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from finsa.config import Adapter, Model
from finsa.errors import ConfigError, ModelError, Problem, suggest
from finsa.runs import adapter_folders
from finsa.runs.adapter_folders import KEY

# Names of query and value projections, separate or fused, in transformers and in code shipped with weights.
QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"))
FUSED = ("query_key_value", "qkv_proj", "W_pack", "Wqkv", "c_attn")


def resolve_targets(base: PreTrainedModel, model: Model, adapter: Adapter) -> list[str]:
    """Resolve an adapter's targets to names of linear layers of this model.

    Raises:
        ConfigError: if a target is not a linear layer of this model, or a named set cannot be found in it.
    """
    lm_head = base.get_output_embeddings()
    linears = {  # the path of one layer by its name
        path.rpartition(".")[2]: path
        for path, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not lm_head
    }
    names = adapter_folders.names(model, adapter)
    if names is None:  # a named set, in a model whose configuration does not list its layers
        if adapter.targets == "all":
            names = list(linears)
        elif adapter.targets == "query_value":
            pairs = [list(pair) for pair in QUERY_VALUE if set(pair) <= set(linears)]
            names = pairs[0] if pairs else [name for name in FUSED if name in linears]
        else:
            names = [name for name, path in linears.items() if "attn" in path or "attention" in path]
        if not names:
            text = (
                f"{adapter.targets} cannot be found by name in this model; list layers, such as "
                f"[{','.join(list(linears)[:2])}]"
            )
            raise ConfigError([Problem("method.adapter.targets", text)])
    unknown = [name for name in names if name not in linears]
    if unknown:
        hint = suggest(unknown[0], linears)
        raise ConfigError([Problem("method.adapter.targets", f"this model has no linear layer '{unknown[0]}'. {hint}")])
    return names


def attach(base: PreTrainedModel, model: Model, adapter: Adapter, seed: int) -> PeftModel:
    """Add an adapter to a base model: a new one, or the saved one in ``adapter.init``.

    Only the adapter is trainable, in float32 whatever the dtype of the base model.

    Raises:
        ConfigError: if a target is not a linear layer of this model, or ``adapter.init`` is another kind of adapter.
        ModelError: if the matrices of ``adapter.init`` do not fit this base model.
    """
    names = resolve_targets(base, model, adapter)
    torch.manual_seed(seed)
    if adapter.init is not None:
        return _attach_saved(base, adapter, adapter.init, names)
    # On the meta device there are no weights to decompose; the number of parameters is the same.
    pissa = adapter.variant == "pissa" and base.device.type != "meta"
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=adapter.variant == "dora",
        use_rslora=adapter.variant == "rslora",
        init_lora_weights="pissa_niter_16" if pissa else True,
    )
    weights = {name: p.data for name, p in base.named_parameters()} if pissa else {}
    peft_model: PeftModel = get_peft_model(base, config)
    if weights:
        peft_model.pissa_base = weights  # no copies are needed: PEFT replaces the tensors
        peft_model.pissa_start = {name: t.clone() for name, t in get_peft_model_state_dict(peft_model).items()}
    return peft_model


def _attach_saved(base: PreTrainedModel, adapter: Adapter, init: str, names: list[str]) -> PeftModel:
    """Add a saved adapter to a base model for further training; on the meta device only its shapes are checked."""
    saved = adapter_folders.read(init)
    config = LoraConfig.from_pretrained(str(saved.folder))  # not a new one, because the saved one may skip layers
    config.inference_mode, config.lora_dropout, config.init_lora_weights = False, adapter.dropout, True
    config.base_model_name_or_path = None  # PEFT warns of another path, and the weights have been compared
    try:
        peft_model: PeftModel = get_peft_model(base, config)
        found = sorted({name.rpartition(".")[2] for name in peft_model.targeted_module_names})
        if set(found) != set(names):
            text = f"the adapter in {saved.folder} has targets {', '.join(found)}, not {', '.join(names)}. Add "
            raise ConfigError([Problem(KEY, f"{text}'method.adapter.targets=[{','.join(found)}]'")])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            loaded = set_peft_model_state_dict(peft_model, load_peft_weights(str(saved.folder), device="cpu"))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"{KEY}: {saved.folder} does not fit this base: {' '.join(lines[:2])}") from None
    odd = [*loaded.unexpected_keys, *(key for key in loaded.missing_keys if "lora_" in key)]
    if odd:
        where = "this base has no such layer" if loaded.unexpected_keys else "the adapter lacks it"
        raise ModelError(f"{KEY}: {saved.folder} does not fit this base: {odd[0]}: {where}")
    return peft_model


def save(model: PeftModel, folder: Path) -> None:
    """Write an adapter that fits the base model as it was before `attach`."""
    start = getattr(model, "pissa_start", None)
    if start is None:
        model.save_pretrained(folder)
        return
    tensors = {}
    for name, trained in get_peft_model_state_dict(model).items():
        both = [trained, start[name]] if "lora_A" in name else [trained, -start[name]]
        tensors[name] = torch.cat(both, dim=0 if "lora_A" in name else 1).detach().cpu().contiguous()
    config = copy.copy(model.peft_config["default"])
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Add a saved adapter to a base model for scoring.

    Raises:
        ModelError: if the folder contains no adapter, or one that does not fit the base model.
    """
    try:
        loaded: PeftModel = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: no adapter that fits this base: {str(error).splitlines()[0]}") from None
    return loaded.eval()


def detach(model: PeftModel) -> PreTrainedModel:
    """Remove the adapter and return the base model as it was before `attach`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base: PreTrainedModel = model.unload()
    for name, parameter in base.named_parameters():
        if name in getattr(model, "pissa_base", {}):
            parameter.data = model.pissa_base[name]
    # trl replaces `forward` on the instance for each trainer; this restores that of the class.
    base.__dict__.pop("forward", None)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(attribute, None)
    return base.requires_grad_(False).eval()


def stop_checkpointing(base: PreTrainedModel) -> None:
    """Disable activation checkpointing, and remove the hooks that trainers have put on the embeddings.

    The hooks are found by name, because transformers keeps only the last trainer's handle.
    """
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
    base.disable_input_require_grads()
    hooks = base.get_input_embeddings()._forward_hooks
    for number, hook in list(hooks.items()):
        if "enable_input_require_grads" in getattr(hook, "__qualname__", ""):
            del hooks[number]
