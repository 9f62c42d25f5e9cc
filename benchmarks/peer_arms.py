"""What each arm of benchmarks/peers.py is given: one set of settings, and what each peer calls them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from finsa.config import ROOT, RunConfig

CHILD = ROOT / "benchmarks" / "peer_trainers.py"
MAX_LENGTH = 256
ANSWER_BATCH, NEW_TOKENS = 16, 8


@dataclass(frozen=True)
class Settings:
    """What every arm is given, taken from finsa's configuration.

    Args:
        model: folder of the base weights.
        data: folder of the rows.
        steps: of the optimizer, over all epochs.
        warmup_steps: optimizer steps, since the peers count warm-up differently.
        answer_batch, new_tokens: of generated answers.
    """

    model: str
    data: str
    epochs: int
    batch_size: int
    steps: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    seed: int
    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    max_length: int = MAX_LENGTH
    answer_batch: int = ANSWER_BATCH
    new_tokens: int = NEW_TOKENS
    llamafactory_template: str = "smollm2"
    swift_model_type: str = "llama"
    swift_template: str = "chatml"


@dataclass(frozen=True)
class Peer:
    """A peer and where it comes from.

    Args:
        package: its distribution; with a version where it has an environment of its own.
        extras: what its commands need beside its requirements.
        left_out: requirements that are not installed.
        empty: modules of these that it imports without using them for text; an empty module stands in.
    """

    package: str
    extras: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()


MEDIA = ("torchvision", "torchaudio")  # images and sound; their wheels on the package index need CUDA's libraries
PEERS = {
    "finsa": Peer("finsa"),
    "transformers": Peer("transformers"),
    "trl": Peer("trl"),
    "llamafactory": Peer("llamafactory==0.9.5", ("jieba", "nltk", "rouge-chinese"), MEDIA, ("torchaudio",)),
    "swift": Peer("ms-swift==4.6.0", (), MEDIA),
}


@dataclass(frozen=True)
class Arm:
    """A peer with settings.

    Args:
        title: in the table.
        peer: whose code runs.
        changed: settings that differ from the peer's defaults, beside those that are held equal.
        why: what that means, and why its authors would call it fair.
    """

    title: str
    peer: str
    changed: dict[str, Any]
    why: str


SHIPPED = "float32, since most CPUs only emulate bfloat16; otherwise its defaults, gradient checkpointing among them"
FASTEST = "float32; no gradient checkpointing, since memory suffices; rows of similar length in a batch"
ARMS = {
    "finsa": Arm(
        "finsa",
        "finsa",
        {},
        "as shipped: `run.py`, which validates, scores the test rows and writes the run folder, then `stage=predict`; "
        "only the base model's scores are switched off, because no peer makes them",
    ),
    "transformers": Arm(
        "transformers Trainer",
        "transformers",
        {"train_sampling_strategy": "group_by_length"},
        "its defaults (float32, no gradient checkpointing), with rows of similar length in a batch, which is faster",
    ),
    "trl_best": Arm(
        "trl SFTTrainer at its best",
        "trl",
        {"bf16": False, "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"},
        FASTEST,
    ),
    "trl_shipped": Arm(
        "trl SFTTrainer as shipped",
        "trl",
        {},
        "its defaults: bfloat16 autocast and gradient checkpointing. They are made for GPUs; on a CPU trl_best is fair",
    ),
    "llamafactory_shipped": Arm("LLaMA-Factory as shipped", "llamafactory", {}, SHIPPED),
    "llamafactory_best": Arm(
        "LLaMA-Factory at its best",
        "llamafactory",
        {"disable_gradient_checkpointing": True, "train_sampling_strategy": "group_by_length"},
        FASTEST,
    ),
    "swift_shipped": Arm("ms-swift as shipped", "swift", {}, SHIPPED),
    "swift_best": Arm(
        "ms-swift at its best", "swift", {"gradient_checkpointing": False, "group_by_length": True}, FASTEST
    ),
}


def settings_of(cfg: RunConfig, rows: int, folder: Path) -> Settings:
    """The settings that all arms share; warm-up in steps, because the trainers round a share differently."""
    adapter, train = cfg.method.adapter, cfg.train
    assert adapter is not None
    assert cfg.model.lora_targets is not None
    steps = math.ceil(math.ceil(rows / train.batch_size) * train.epochs)
    return Settings(
        model=str(cfg.model.path),
        data=str(folder),
        epochs=train.epochs,
        batch_size=train.batch_size,
        steps=steps,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup_steps=math.ceil(train.warmup * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=cfg.seed,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=list(getattr(cfg.model.lora_targets, str(adapter.targets))),
    )


def dataset_info() -> dict[str, Any]:
    """LLaMA-Factory's description of the rows."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    one = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {**tags, "system_tag": "system"}}
    return {split: {"file_name": f"chats/{split}.jsonl", **one} for split in ("train", "test")}


def llamafactory(settings: Settings, folder: Path, changed: dict[str, Any], train: bool) -> dict[str, Any]:
    """A file for ``llamafactory-cli train``, which trains, or answers with the trained adapter."""
    told: dict[str, Any] = {
        "model_name_or_path": settings.model,
        "stage": "sft",
        "finetuning_type": "lora",
        "template": settings.llamafactory_template,
        "dataset_dir": settings.data,
        "cutoff_len": settings.max_length,
        "infer_dtype": "float32",
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    if not train:
        return told | {
            "do_predict": True,
            "predict_with_generate": True,
            "eval_dataset": "test",
            "adapter_name_or_path": str(folder / "trained"),
            "output_dir": str(folder / "answered"),
            "per_device_eval_batch_size": settings.answer_batch,
            "max_new_tokens": settings.new_tokens,
            "do_sample": False,
        }
    return told | {
        "do_train": True,
        "dataset": "train",
        "output_dir": str(folder / "trained"),
        "lora_rank": settings.rank,
        "lora_alpha": int(settings.alpha),
        "lora_dropout": settings.dropout,
        "lora_target": ",".join(settings.targets),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "save_strategy": "no",
        "logging_steps": 10,
        **changed,
    }


def swift(settings: Settings, folder: Path, changed: dict[str, Any], train: bool) -> dict[str, Any]:
    """Options of ``swift sft`` or ``swift infer``."""
    told: dict[str, Any] = {
        "model": settings.model,
        "model_type": settings.swift_model_type,
        "template": settings.swift_template,
        "torch_dtype": "float32",
        "max_length": settings.max_length,
        "seed": settings.seed,
    }
    if not train:
        return told | {
            "adapters": str(next(folder.glob("trained/**/checkpoint-*"))),
            "infer_backend": "transformers",
            "val_dataset": f"{settings.data}/chats/test.jsonl",
            "result_path": str(folder / "answered" / "answers.jsonl"),
            "max_batch_size": settings.answer_batch,
            "max_new_tokens": settings.new_tokens,
            "temperature": 0,
        }
    return told | {
        "dataset": f"{settings.data}/chats/train.jsonl",
        "split_dataset_ratio": 0,
        "tuner_type": "lora",
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.targets,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta2": 0.999,
        "max_grad_norm": settings.max_grad_norm,
        "output_dir": str(folder / "trained"),
        "add_version": False,
        "save_strategy": "epoch",
        "save_only_model": True,
        "report_to": "none",
        "dataloader_num_workers": 0,
        **changed,
    }


def finsa(settings: Settings, folder: Path, changed: dict[str, Any], train: bool) -> list[str]:
    """Overrides of ``run.py``."""
    if not train:
        (run,) = (file.parent for file in folder.glob("trained/**/run.json"))
        return [
            "stage=predict",
            f"run={run}",
            f"input={settings.data}/questions/test.jsonl",
            f"output={folder / 'answers.jsonl'}",
        ]
    files = "{" + ",".join(f"{split}:{settings.data}/{split}.jsonl" for split in ("train", "validation", "test")) + "}"
    return [
        *("model=smollm2_135m", f"model.path={settings.model}", "model.dtype=float32", "method=lora_response"),
        *("data=tfns", f"data.files={files}", f"data.max_length={settings.max_length}"),
        f"train.epochs={settings.epochs}",
        f"train.batch_size={settings.batch_size}",
        f"train.learning_rate={settings.learning_rate}",
        f"train.schedule={settings.schedule}",
        f"train.warmup={settings.warmup_steps}",
        f"train.weight_decay={settings.weight_decay}",
        f"train.max_grad_norm={settings.max_grad_norm}",
        f"method.adapter.rank={settings.rank}",
        f"method.adapter.alpha={settings.alpha}",
        f"method.adapter.dropout={settings.dropout}",
        f"method.adapter.targets=[{','.join(settings.targets)}]",
        *(f"seed={settings.seed}", "train.threads=1", "tracking=none", "stage.compare_base=false"),
        f"output_dir={folder / 'trained'}",
        *(f"{key}={value}" for key, value in changed.items()),
    ]


def flags(told: dict[str, Any]) -> list[str]:
    """Options as a command line writes them."""
    words: list[str] = []
    for key, value in told.items():
        values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
        words += [f"--{key}", *map(str, values)]
    return words


def command(
    peer: str, settings: Settings, changed: dict[str, Any], python: Path, folder: Path, train: bool
) -> list[str]:
    """The command with which a peer trains, or answers the test rows."""
    if peer == "finsa":
        return [str(python), str(ROOT / "run.py"), *finsa(settings, folder, changed, train)]
    if peer == "llamafactory":
        file = folder / ("train.yaml" if train else "answer.yaml")
        file.write_text(yaml.safe_dump(llamafactory(settings, folder, changed, train)), encoding="utf-8")
        return [str(python.parent / "llamafactory-cli"), "train", str(file)]
    if peer == "swift":
        verb = "sft" if train else "infer"
        return [str(python.parent / "swift"), verb, *flags(swift(settings, folder, changed, train))]
    more = [json.dumps(changed)] if train else []
    return [str(python), str(CHILD), "train" if train else "answer", peer, str(folder), *more]
