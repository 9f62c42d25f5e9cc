"""A LLaMA-Factory training file (YAML of ``llamafactory-cli train``, stage sft) as an experiment.

Keys that the file leaves out count with LLaMA-Factory's defaults, as its documentation states them: what they decide
is written down too, because the defaults here are others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finsa.config import catalogue
from finsa.errors import ConfigError, DataError, Problem, nearest, suggest
from finsa.interop.keys import IGNORED, UNSUPPORTED
from finsa.interop.summary import Account

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
ATTENTION = {"sdpa": "sdpa", "fa2": "flash_attention_2", "disabled": "eager"}
PLAIN = {"empty": "{text}", "default": "Human: {text}\nAssistant:"}  # templates without tokens of a chat: their words
LOCAL = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]")  # how a path begins that is no id of the hub
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")


ANOTHER = "For another model write one, and name its folder: --config-dir <folder> with <folder>/model/<name>.yaml"


def translate(given: Mapping[str, Any], name: str, processes: int, folders: catalogue.Folders = ()) -> Account:
    """Translate a training file, but for its data sets.

    Args:
        given: the file's content.
        name: of the file, for messages.
        processes: that it was started on.
        folders: added with ``--config-dir``.

    Raises:
        ConfigError: for what is no supervised fine-tuning, or a model that no file below ``conf/model`` describes.
    """
    account = Account(given, name)
    _kind(account, name)
    _model(account, name, folders)
    _method(account, name)
    _schedule(account, processes)
    _rest(account)
    return account


def _refused(key: str, text: str, name: str) -> ConfigError:
    return ConfigError([Problem(key, text, name)])


def _kind(account: Account, name: str) -> None:
    stage = account.get("stage", "sft")
    if stage != "sft":
        other = "; continued pre-training is stage=pretrain here" if stage == "pt" else ""
        raise _refused("stage", f"'{stage}' is not translated, only sft (supervised fine-tuning){other}", name)
    account.tell("stage", "translated", "stage=train")
    if account.get("do_train", True) is not True:
        raise _refused("do_train", "is false: this file trains nothing; evaluate a run with stage=evaluate", name)
    account.tell("do_train", "translated", "stage=train")


def _model(account: Account, name: str, folders: catalogue.Folders) -> None:
    written = str(account.get("model_name_or_path", ""))
    if not written:
        raise _refused("model_name_or_path", "is missing, so this is no training file of LLaMA-Factory", name)
    choices = catalogue.choices_of("model", folders)
    models = {choice: catalogue.read(catalogue.file_of("model", choice, folders)) for choice in choices}
    if LOCAL.match(written) or Path(written).is_dir():
        _local_model(account, name, Path(written).expanduser().absolute(), models)
    else:
        _hub_model(account, name, written, models)
    if account.get("model_revision", "main") != "main":
        account.set("model_revision", "model.revision", str(account.given["model_revision"]))
    _prompt(account)
    attention = account.get("flash_attn", "auto")
    if attention in ATTENTION:
        account.set("flash_attn", "model.attention", ATTENTION[attention])
    _precision(account)


def _hub_model(account: Account, name: str, written: str, models: dict[str, Any]) -> None:
    known = {_hub_id(values): choice for choice, values in models.items()}
    last = {hub_id.rpartition("/")[2]: choice for hub_id, choice in known.items() if hub_id}
    choice = known.get(written.lower()) or last.get(written.rpartition("/")[2].lower())
    if choice is None:
        hint = suggest(written, [hub_id for hub_id in known if hub_id])
        raise _refused("model_name_or_path", f"no file of conf/model has hub_id {written}. {hint} {ANOTHER}", name)
    account.choose("model_name_or_path", "model", choice)
    if written.lower() not in known:  # somebody else's copy or tuning of that model
        account.set("model_name_or_path", "model.hub_id", written, "another repository of that name, its newest commit")
        account.values["model.revision"] = "main"


def _local_model(account: Account, name: str, folder: Path, models: dict[str, Any]) -> None:
    """A folder is never the hub's model: its weights are taken, and its configuration says which file describes it."""
    if (folder / "adapter_config.json").is_file():
        text = f"{folder} is an adapter (adapter_config.json) and no model; name the model that it was trained on"
        raise _refused("model_name_or_path", text, name)
    same_name = [
        choice for choice, values in models.items() if _hub_id(values).rpartition("/")[2] == folder.name.lower()
    ]
    file = folder / "config.json"
    remark = "its architecture agrees"
    if file.is_file():
        shape = {key: value for key, value in read(file).items() if key in SHAPE}
        fitting = [
            choice
            for choice, values in models.items()
            if shape and shape.items() <= (values.get("architecture") or {}).items()
        ]
        said = ", ".join(f"{key} {value}" for key, value in shape.items())
        missing = f"no file of conf/model describes the model in {folder} ({said})."
    else:
        fitting, remark = same_name, "not found here; its architecture is taken to be the one of its name"
        missing = f"there is no config.json in {folder}, and no file of conf/model has a hub_id of that name."
    if not fitting:
        raise _refused("model_name_or_path", f"{missing} {ANOTHER}", name)
    account.choose("model_name_or_path", "model", next((one for one in same_name if one in fitting), fitting[0]))
    account.set("model_name_or_path", "model.path", str(folder), remark)


def _hub_id(values: dict[str, Any]) -> str:
    return str(values.get("hub_id") or "").lower()


def _prompt(account: Account) -> None:
    template = account.get("template")
    if template is None or template in PLAIN:
        account.set("template", "model.prompt", "plain")
        account.set("template", "model.think", "none")
    else:
        account.set("template", "model.prompt", "chat", "the chat template that the tokenizer brings")
        closed = account.get("enable_thinking") is False
        if "enable_thinking" in account.given:
            account.set("enable_thinking", "model.think", "closed" if closed else "none")


def words(account: Account) -> None:
    """Translate what the template puts around a text, for data sets that are translated as well."""
    template = account.get("template", "empty")
    remark = "there an end token follows the text" if template == "default" else ""
    account.set("template", "data.prompt", PLAIN.get(template, "{text}"), remark)


def _precision(account: Account) -> None:
    if account.get("bf16", False) or account.get("pure_bf16", False):
        key = "bf16" if account.get("bf16", False) else "pure_bf16"
        account.set(key, "model.dtype", "auto", "bfloat16 where the hardware computes in it; adapters are float32")
    elif account.get("fp16", False):
        account.set("fp16", "model.dtype", "float16")


def _method(account: Account, name: str) -> None:
    kind = account.get("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        raise _refused("finetuning_type", f"'{kind}' is not translated. Choose from: full, lora.", name)
    account.choose("finetuning_type", "method", "lora_response" if kind == "lora" else "full")
    if kind == "lora":
        _adapter(account, name)
    bits = account.get("quantization_bit")
    if bits not in (None, 4, 8):
        raise _refused("quantization_bit", f"{bits} is not translated. Choose from: 4 (nf4), 8 (int8).", name)
    if bits is not None:
        account.set("quantization_bit", "method.quantization", "nf4" if bits == 4 else "int8")
    account.set("train_on_prompt", "method.loss_on", "all" if account.get("train_on_prompt", False) else "response")


def _adapter(account: Account, name: str) -> None:
    rank = account.whole("lora_rank", 8)
    target = account.get("lora_target", "all")
    variants = {"use_dora": "dora", "use_rslora": "rslora", "pissa_init": "pissa"}
    chosen = {key: kind for key, kind in variants.items() if account.get(key, False)}
    if len(chosen) > 1:
        raise _refused(next(iter(chosen)), f"goes with no other variant here, and {', '.join(chosen)} are set", name)
    for key, kind in chosen.items():
        account.set(key, "method.adapter.variant", kind)
    account.set("lora_rank", "method.adapter.rank", rank)
    account.set("lora_alpha", "method.adapter.alpha", account.number("lora_alpha", 2 * rank))
    account.set("lora_dropout", "method.adapter.dropout", account.number("lora_dropout", 0.0))
    names = [str(word).strip() for word in (target if isinstance(target, list) else str(target).split(","))]
    account.set("lora_target", "method.adapter.targets", "all" if names == ["all"] else names)
    if account.get("loraplus_lr_ratio") is not None:
        account.set("loraplus_lr_ratio", "method.adapter.lr_ratio", account.number("loraplus_lr_ratio", 1))


def _schedule(account: Account, processes: int) -> None:
    micro = account.whole("per_device_train_batch_size", 8)
    batch = micro * account.whole("gradient_accumulation_steps", 1) * processes
    remark = f"per device x accumulation x {processes} process{'es' if processes > 1 else ''}"
    account.set("per_device_train_batch_size", "train.micro_batch_size", micro)
    account.set("gradient_accumulation_steps", "train.batch_size", batch, remark)
    account.set("learning_rate", "train.learning_rate", account.number("learning_rate", 5e-5))
    account.set("num_train_epochs", "train.epochs", account.number("num_train_epochs", 3))
    if account.whole("max_steps", -1) > 0:
        steps = account.whole("max_steps", -1)
        account.set("max_steps", "train.max_steps", steps, "they decide, not the epochs")
        account.values["train.epochs"] = float(steps)  # an epoch has a step at least
    kind = str(account.get("lr_scheduler_type", "linear"))
    if kind in SCHEDULES:
        account.set("lr_scheduler_type", "train.schedule", SCHEDULES[kind])
    else:
        account.tell("lr_scheduler_type", "not supported", f"train.schedule is {', '.join(set(SCHEDULES.values()))}")
    _warmup(account, kind)
    account.set("weight_decay", "train.weight_decay", account.number("weight_decay", 0.0))
    account.set("max_grad_norm", "train.max_grad_norm", account.number("max_grad_norm", 1.0))
    account.set("group_by_length", "train.group_by_length", bool(account.get("group_by_length", False)))
    if "disable_gradient_checkpointing" in account.given:
        off = bool(account.given["disable_gradient_checkpointing"])
        account.set("disable_gradient_checkpointing", "train.gradient_checkpointing", not off)
    account.set("seed", "seed", account.whole("seed", 42))
    account.set("cutoff_len", "data.max_length", account.whole("cutoff_len", 2048), "only the text is ever cut")
    account.set("load_best_model_at_end", "train.patience", None, "the best checkpoint on validation is kept")
    if account.get("load_best_model_at_end", False) and "loss" in str(account.get("metric_for_best_model", "loss")):
        account.set("metric_for_best_model", "train.select_by", "loss")
    if 0 < account.number("logging_steps", 10) < 1:
        account.tell("logging_steps", "no effect", "a share of all steps; train.log_every counts steps")
    else:
        account.set("logging_steps", "train.log_every", max(1, account.whole("logging_steps", 10)))


def _warmup(account: Account, kind: str) -> None:
    steps, ratio = account.number("warmup_steps", 0), account.number("warmup_ratio", 0.0)
    if kind == "constant":
        steps, ratio = 0, 0.0  # this schedule of transformers has none
    if 0 < steps < 1:  # as transformers reads it since version 5
        account.set("warmup_steps", "train.warmup", steps, "share of all steps")
        account.tell("warmup_ratio", "no effect", "warmup_steps goes before it")
    elif steps:
        account.set("warmup_steps", "train.warmup", float(account.whole("warmup_steps", 0)), "steps")
        account.tell("warmup_ratio", "no effect", "warmup_steps goes before it")
    else:
        account.set("warmup_ratio", "train.warmup", ratio, "share of all steps")
        account.tell("warmup_steps", "no effect", "0")


def _rest(account: Account) -> None:
    if "report_to" in account.given:
        trackers = account.given["report_to"]
        wanted = trackers if isinstance(trackers, list) else [trackers]
        account.choose("report_to", "tracking", "wandb" if {"wandb", "all"} & set(map(str, wanted)) else "none")
    if account.get("neat_packing", False) is True and account.get("packing", True) is True:
        account.tell("packing", "no effect", IGNORED["neat_packing"])
    known = {*IGNORED, *UNSUPPORTED}
    for key in list(account.left()):
        value = account.given[key]
        if key in UNSUPPORTED:
            neutral, reason = UNSUPPORTED[key]
            if value is None or value in neutral:
                account.tell(key, "no effect", "its default, and so it is here")
            else:
                account.tell(key, "not supported", reason)
        elif key in IGNORED:
            account.tell(key, "no effect", IGNORED[key])
        elif key not in DATA_KEYS:
            near = nearest(key, known | set(account.given) - {key})
            account.tell(key, "not supported", f"unknown to this translation{f'; {near}?' if near else ''}")


DATA_KEYS = ("dataset", "dataset_dir", "val_size", "eval_dataset")  # see finsa/interop/datasets.py


def read(file: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds an object.

    Raises:
        DataError: where it cannot be read as one.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = getattr(error, "problem", None) or getattr(error, "strerror", None) or type(error).__name__
        raise DataError(f"input: {file} cannot be read as YAML or JSON: {said}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise DataError(f"input: {file} holds no object of keys and values, as a LLaMA-Factory YAML does")
    return content
