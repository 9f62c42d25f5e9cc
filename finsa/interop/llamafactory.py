"""Translation of a LLaMA-Factory training file (YAML of ``llamafactory-cli train``, stage sft) into an experiment.

Keys that the file omits have LLaMA-Factory's documented defaults. These are translated too, because finsa has others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finsa.config import catalogue
from finsa.errors import DataError, nearest, suggest
from finsa.interop.keys import IGNORED, UNSUPPORTED
from finsa.interop.translation import Translation

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
ATTENTION = {"sdpa": "sdpa", "fa2": "flash_attention_2", "disabled": "eager"}
PLAIN = {"empty": "{text}", "default": "Human: {text}\nAssistant:"}  # templates without chat tokens
LOCAL = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]")  # the beginning of a path, which no hub id has
PREFERENCES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}  # methods by pref_loss
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")
ANOTHER = "For another model, write a file: --config-dir <folder> with <folder>/model/<name>.yaml"
DATA_KEYS = ("dataset", "dataset_dir", "val_size", "eval_dataset")  # see finsa/interop/datasets.py


def translate(given: Mapping[str, Any], name: str, processes: int, folders: catalogue.Folders = ()) -> Translation:
    """Translate a training file, except for its data sets.

    Args:
        given: content of the file.
        name: name of the file, for messages.
        processes: number of processes that the file was written for.
        folders: folders added with ``--config-dir``.

    Raises:
        ConfigError: if it is neither supervised fine-tuning nor training on pairs, or if no file in ``conf/model``
            describes its model.
    """
    translation = Translation(given, name)
    stage = translation.get("stage", "sft")
    if stage not in ("sft", "dpo"):
        advice = {
            "pt": "; for continued pre-training use stage=pretrain",
            "kto": "; method=kto learns from pairs, not from tagged answers",
        }
        text = f"'{stage}' is not translated, only sft (supervised fine-tuning) and dpo (pairs){advice.get(stage, '')}"
        raise translation.error("stage", text)
    if stage == "sft":
        translation.record("stage", "translated", "stage=train")
    if translation.get("do_train", True) is not True:
        raise translation.error("do_train", "is false, so nothing is trained; use stage=evaluate to evaluate a run")
    translation.record("do_train", "translated", "stage=train")
    _model(translation, folders)
    _method(translation)
    _training(translation, processes)
    _other_keys(translation)
    return translation


def _model(translation: Translation, folders: catalogue.Folders) -> None:
    written = str(translation.get("model_name_or_path", ""))
    if not written:
        raise translation.error("model_name_or_path", "is missing, so this is not a training file of LLaMA-Factory")
    choices = catalogue.choices_of("model", folders)
    models = {choice: catalogue.read(catalogue.file_of("model", choice, folders)) for choice in choices}
    if LOCAL.match(written) or Path(written).is_dir():
        _local_model(translation, Path(written).expanduser().absolute(), models)
    else:
        _hub_model(translation, written, models)
    if translation.get("model_revision", "main") != "main":
        translation.set("model_revision", "model.revision", str(translation.given["model_revision"]))
    template = translation.get("template")
    if template is None or template in PLAIN:
        translation.set("template", "model.prompt", "plain")
        translation.set("template", "model.think", "none")
    else:
        translation.set("template", "model.prompt", "chat", "the chat template of the tokenizer")
        if "enable_thinking" in translation.given:
            closed = translation.get("enable_thinking") is False
            translation.set("enable_thinking", "model.think", "closed" if closed else "none")
    attention = translation.get("flash_attn", "auto")
    if attention in ATTENTION:
        translation.set("flash_attn", "model.attention", ATTENTION[attention])
    bf16 = next((key for key in ("bf16", "pure_bf16") if translation.get(key, False)), None)
    if bf16 is not None:
        translation.set(bf16, "model.dtype", "auto", "bfloat16 if the hardware supports it; adapters are float32")
    elif translation.get("fp16", False):
        translation.set("fp16", "model.dtype", "float16")


def _hub_model(translation: Translation, written: str, models: dict[str, Any]) -> None:
    known = {_hub_id(values): choice for choice, values in models.items()}
    by_name = {hub_id.rpartition("/")[2]: choice for hub_id, choice in known.items() if hub_id}
    choice = known.get(written.lower()) or by_name.get(written.rpartition("/")[2].lower())
    if choice is None:
        hint = suggest(written, [hub_id for hub_id in known if hub_id])
        raise translation.error("model_name_or_path", f"no file in conf/model has hub_id {written}. {hint} {ANOTHER}")
    translation.choose("model_name_or_path", "model", choice)
    if written.lower() not in known:  # a copy or fine-tuned version of that model
        remark = "another repository of that name, its newest commit"
        translation.set("model_name_or_path", "model.hub_id", written, remark)
        translation.values["model.revision"] = "main"


def _local_model(translation: Translation, folder: Path, models: dict[str, Any]) -> None:
    """Translate a folder: its weights are loaded, and its ``config.json`` decides which file describes the model."""
    if (folder / "adapter_config.json").is_file():
        text = f"{folder} is an adapter (adapter_config.json), not a model; name the model that it was trained on"
        raise translation.error("model_name_or_path", text)
    same_name = [
        choice for choice, values in models.items() if _hub_id(values).rpartition("/")[2] == folder.name.lower()
    ]
    file = folder / "config.json"
    if file.is_file():
        shape = {key: value for key, value in read(file).items() if key in SHAPE}
        fitting = [
            choice
            for choice, values in models.items()
            if shape and shape.items() <= (values.get("architecture") or {}).items()
        ]
        remark = "same architecture"
        listed = ", ".join(f"{key} {value}" for key, value in shape.items())
        missing = f"no file in conf/model describes the model in {folder} ({listed})."
    else:
        fitting, remark = same_name, "not found here; assumed to have the architecture that its name suggests"
        missing = f"there is no config.json in {folder}, and no file in conf/model has a hub_id of that name."
    if not fitting:
        raise translation.error("model_name_or_path", f"{missing} {ANOTHER}")
    choice = next((choice for choice in same_name if choice in fitting), fitting[0])
    translation.choose("model_name_or_path", "model", choice)
    translation.set("model_name_or_path", "model.path", str(folder), remark)


def _hub_id(values: dict[str, Any]) -> str:
    return str(values.get("hub_id") or "").lower()


def set_prompt(translation: Translation) -> None:
    """Translate the text that the template puts around a row, for data sets that are translated as well."""
    template = translation.get("template", "empty")
    remark = "LLaMA-Factory adds an end token after the text" if template == "default" else ""
    translation.set("template", "data.prompt", PLAIN.get(template, "{text}"), remark)


def _method(translation: Translation) -> None:
    kind = translation.get("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        raise translation.error("finetuning_type", f"'{kind}' is not translated. Choose from: full, lora.")
    pairs = translation.get("stage", "sft") == "dpo"
    if pairs and kind != "lora":
        raise translation.error("finetuning_type", f"'{kind}' is not translated for stage dpo, only lora")
    if pairs:
        loss = str(translation.get("pref_loss", "sigmoid"))
        if loss not in PREFERENCES:
            raise translation.error("pref_loss", f"'{loss}' is not translated. {suggest(loss, PREFERENCES)}")
        translation.choose("pref_loss", "method", PREFERENCES[loss])
        translation.set("pref_beta", "method.preference.beta", translation.number("pref_beta", 0.1))
        if loss == "simpo":
            translation.set("simpo_gamma", "method.preference.margin", translation.number("simpo_gamma", 0.5))
        translation.set("stage", "method.init", "base", "the reference is the base model")
        translation.record("finetuning_type", "translated", f"method={PREFERENCES[loss]}")
    else:
        translation.choose("finetuning_type", "method", "lora_response" if kind == "lora" else "full")
    if kind == "lora":
        _adapter(translation)
    bits = translation.get("quantization_bit")
    if bits not in (None, 4, 8):
        raise translation.error("quantization_bit", f"{bits} is not translated. Choose from: 4 (nf4), 8 (int8).")
    if bits is not None:
        translation.set("quantization_bit", "method.quantization", "nf4" if bits == 4 else "int8")
    if pairs:
        translation.record("train_on_prompt", "no effect", "the labels of a pair are compared")
        return
    loss_on = "all" if translation.get("train_on_prompt", False) else "response"
    translation.set("train_on_prompt", "method.loss_on", loss_on)


def _adapter(translation: Translation) -> None:
    variants = {"use_dora": "dora", "use_rslora": "rslora", "pissa_init": "pissa"}
    chosen = {key: variant for key, variant in variants.items() if translation.get(key, False)}
    if len(chosen) > 1:
        text = f"cannot be combined with other variants, but {', '.join(chosen)} are set"
        raise translation.error(next(iter(chosen)), text)
    for key, variant in chosen.items():
        translation.set(key, "method.adapter.variant", variant)
    rank = translation.integer("lora_rank", 8)
    translation.set("lora_rank", "method.adapter.rank", rank)
    translation.set("lora_alpha", "method.adapter.alpha", translation.number("lora_alpha", 2 * rank))
    translation.set("lora_dropout", "method.adapter.dropout", translation.number("lora_dropout", 0.0))
    target = translation.get("lora_target", "all")
    names = [str(word).strip() for word in (target if isinstance(target, list) else str(target).split(","))]
    translation.set("lora_target", "method.adapter.targets", "all" if names == ["all"] else names)
    if translation.get("loraplus_lr_ratio") is not None:
        ratio = translation.number("loraplus_lr_ratio", 1)
        translation.set("loraplus_lr_ratio", "method.adapter.lr_ratio", ratio)


def _training(translation: Translation, processes: int) -> None:
    micro = translation.integer("per_device_train_batch_size", 8)
    batch = micro * translation.integer("gradient_accumulation_steps", 1) * processes
    remark = f"per device x accumulation x {processes} process{'es' if processes > 1 else ''}"
    translation.set("per_device_train_batch_size", "train.micro_batch_size", micro)
    translation.set("gradient_accumulation_steps", "train.batch_size", batch, remark)
    translation.set("learning_rate", "train.learning_rate", translation.number("learning_rate", 5e-5))
    translation.set("num_train_epochs", "train.epochs", translation.number("num_train_epochs", 3))
    steps = translation.integer("max_steps", -1)
    if steps > 0:
        translation.set("max_steps", "train.max_steps", steps, "overrides the epochs")
        translation.values["train.epochs"] = float(steps)  # enough, because an epoch has at least one step
    schedule = str(translation.get("lr_scheduler_type", "linear"))
    if schedule in SCHEDULES:
        translation.set("lr_scheduler_type", "train.schedule", SCHEDULES[schedule])
    else:
        text = f"train.schedule is {', '.join(dict.fromkeys(SCHEDULES.values()))}"
        translation.record("lr_scheduler_type", "not supported", text)
    warmup_steps, ratio = translation.number("warmup_steps", 0), translation.number("warmup_ratio", 0.0)
    if schedule == "constant":
        warmup_steps, ratio = 0, 0.0  # transformers ignores the warmup for this schedule
    if warmup_steps:
        share = 0 < warmup_steps < 1  # a share of all steps since version 5 of transformers
        value = warmup_steps if share else float(translation.integer("warmup_steps", 0))
        translation.set("warmup_steps", "train.warmup", value, "share of all steps" if share else "steps")
        translation.record("warmup_ratio", "no effect", "warmup_steps takes precedence")
    else:
        translation.set("warmup_ratio", "train.warmup", ratio, "share of all steps")
        translation.record("warmup_steps", "no effect", "0")
    translation.set("weight_decay", "train.weight_decay", translation.number("weight_decay", 0.0))
    translation.set("max_grad_norm", "train.max_grad_norm", translation.number("max_grad_norm", 1.0))
    translation.set("group_by_length", "train.group_by_length", bool(translation.get("group_by_length", False)))
    if "disable_gradient_checkpointing" in translation.given:
        checkpointing = not translation.given["disable_gradient_checkpointing"]
        translation.set("disable_gradient_checkpointing", "train.gradient_checkpointing", checkpointing)
    translation.set("seed", "seed", translation.integer("seed", 42))
    length = translation.integer("cutoff_len", 2048)
    translation.set("cutoff_len", "data.max_length", length, "only the text is ever truncated")
    translation.set("load_best_model_at_end", "train.patience", None, "the best checkpoint on validation is kept")
    metric = str(translation.get("metric_for_best_model", "loss"))
    if translation.get("load_best_model_at_end", False) and "loss" in metric:
        translation.set("metric_for_best_model", "train.select_by", "loss")
    if 0 < translation.number("logging_steps", 10) < 1:
        translation.record("logging_steps", "no effect", "a share of all steps; train.log_every is in steps")
    else:
        translation.set("logging_steps", "train.log_every", max(1, translation.integer("logging_steps", 10)))


def _other_keys(translation: Translation) -> None:
    """Record the outcome of each key that has not been translated."""
    if "report_to" in translation.given:
        given, trackers = translation.given["report_to"], catalogue.choices_of("tracking", ())
        names = ["wandb" if name == "all" else str(name) for name in (given if isinstance(given, list) else [given])]
        first, *others = [name for name in dict.fromkeys(names) if name in trackers] or ["none"]
        translation.choose("report_to", "tracking", first)
        if others:
            translation.set("report_to", "tracking.also", others)
    if translation.get("neat_packing", False) is True and translation.get("packing", True) is True:
        translation.record("packing", "no effect", IGNORED["neat_packing"])
    known = {*IGNORED, *UNSUPPORTED}
    for key in translation.remaining():
        if key in UNSUPPORTED:
            neutral, reason = UNSUPPORTED[key]
            value = translation.given[key]
            if value is None or value in neutral:
                translation.record(key, "no effect", "the same default here")
            else:
                translation.record(key, "not supported", reason)
        elif key in IGNORED:
            translation.record(key, "no effect", IGNORED[key])
        elif key not in DATA_KEYS:
            near = nearest(key, known | set(translation.given) - {key})
            text = f"unknown key; did you mean {near}?" if near else "unknown key"
            translation.record(key, "not supported", text)


def read(file: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that contains an object.

    Raises:
        DataError: if it cannot be read as one.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or type(error).__name__
        raise DataError(f"input: {file} cannot be read as YAML or JSON: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise DataError(f"input: {file} is not an object of keys and values, as a LLaMA-Factory YAML is")
    return content
