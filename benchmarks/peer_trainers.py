"""Train, answer and render with a peer's own code; benchmarks/peers.py runs this file in the peer's environment.

    python benchmarks/peer_trainers.py train trl <folder> '{"bf16": false}'
    python benchmarks/peer_trainers.py answer trl <folder>
    python benchmarks/peer_trainers.py tokens llamafactory <folder>

Nothing of finsa is imported here. The folder is that of an arm; beside it lie the settings, and the rows as lists of
chat messages. LLaMA-Factory and ms-swift train and answer with their own commands; only their tokens are rendered here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]
Tokens = tuple[list[int], list[int]]  # of the prompt, and of the answer with what ends it


def main() -> None:
    """Run one verb."""
    verb, peer, place, *more = sys.argv[1:]
    folder = Path(place)
    settings = read(folder.parent.parent / "data" / "settings.json")
    if verb == "train":
        changed = json.loads(more[0]) if more else {}
        (train_trl if peer == "trl" else train_transformers)(settings, folder, changed)
    elif verb == "answer":
        answer(settings, folder)
    else:
        encode = RENDERERS[peer](settings)
        rows = {split: list(map(encode, read(Path(settings["data"]) / f"{split}.json"))) for split in ("train", "test")}
        (folder / "tokens.json").write_text(json.dumps(rows), encoding="utf-8")


def read(file: Path) -> Any:
    """Read a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


# -- transformers and trl


def shared(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What both trainers are given, in the words of transformers' TrainingArguments."""
    return {
        "output_dir": str(folder / "trained"),
        "num_train_epochs": settings["epochs"],
        "per_device_train_batch_size": settings["batch_size"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": settings["schedule"],
        "warmup_steps": settings["warmup_steps"],
        "weight_decay": settings["weight_decay"],
        "max_grad_norm": settings["max_grad_norm"],
        "seed": settings["seed"],
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": True,
        "use_cpu": True,
    }


def lora(settings: dict[str, Any]) -> Any:
    """The adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["targets"],
        task_type="CAUSAL_LM",
    )


def train_trl(settings: dict[str, Any], folder: Path, changed: dict[str, Any]) -> None:
    """SFTTrainer on conversational prompts and completions; it learns the completion only, as it does by default."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = read(Path(settings["data"]) / "train.json")
    data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    config = SFTConfig(**shared(settings, folder), max_length=settings["max_length"], **changed)
    trainer = SFTTrainer(settings["model"], args=config, train_dataset=data, peft_config=lora(settings))
    finish(trainer, folder)


def train_transformers(settings: dict[str, Any], folder: Path, changed: dict[str, Any]) -> None:
    """Trainer on rows with labels at the answer and its end token, padded per batch; torch's default float32."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    encode = render_transformers(settings)
    pairs = map(encode, read(Path(settings["data"]) / "train.json"))
    data = Dataset.from_list([{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in pairs])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    torch.manual_seed(settings["seed"])
    trainer = Trainer(
        get_peft_model(model, lora(settings)),
        TrainingArguments(**shared(settings, folder), **changed),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=data,
    )
    finish(trainer, folder)


def finish(trainer: Any, folder: Path) -> None:
    """Train, save the adapter, and note the steps and the CPU seconds of the training loop alone."""
    started = time.process_time()
    done = trainer.train()
    facts = {"steps": done.global_step, "loop_cpu_seconds": round(time.process_time() - started, 1)}
    trainer.save_model()
    (folder / "trainer.json").write_text(json.dumps(facts), encoding="utf-8")


def answer(settings: dict[str, Any], folder: Path) -> None:
    """Generate greedily, in left-padded batches."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "trained").eval()
    rows, size, answers = read(Path(settings["data"]) / "test.json"), settings["answer_batch"], []
    for start in range(0, len(rows), size):
        batch = tokenizer.apply_chat_template(
            [row[:-1] for row in rows[start : start + size]],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            made = model.generate(**batch, max_new_tokens=settings["new_tokens"], do_sample=False)
        answers += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    (folder / "answers.json").write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")


# -- tokens as each peer renders them


def render_transformers(settings: dict[str, Any]) -> Callable[[Messages], Tokens]:
    """The tokenizer's chat template, then the answer and the end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])

    def encode(messages: Messages) -> Tokens:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
        return list(prompt), [*answer, tokenizer.eos_token_id]

    return encode


def render_trl(settings: dict[str, Any]) -> Callable[[Messages], Tokens]:
    """The chat template over prompt and completion; the completion is what follows the prompt's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])

    def encode(messages: Messages) -> Tokens:
        prompt = list(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False))
        whole = list(tokenizer.apply_chat_template(messages, return_dict=False))
        if whole[: len(prompt)] != prompt:
            raise ValueError(f"the prompt's tokens do not begin the row's: {messages}")
        return prompt, whole[len(prompt) :]

    return encode


def render_llamafactory(settings: dict[str, Any]) -> Callable[[Messages], Tokens]:
    """LLaMA-Factory's template."""
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=settings["llamafactory_template"]))

    def encode(messages: Messages) -> Tokens:
        system, *turns = messages
        prompt, answer = template.encode_oneturn(tokenizer, turns, system["content"])
        return list(prompt), list(answer)

    return encode


def render_swift(settings: dict[str, Any]) -> Callable[[Messages], Tokens]:
    """ms-swift's template, in training: the first label is the answer's first token."""
    from swift import get_processor, get_template

    processor = get_processor(settings["model"], model_type=settings["swift_model_type"])
    template = get_template(processor, template_type=settings["swift_template"])
    template.set_mode("train")

    def encode(messages: Messages) -> Tokens:
        row = template.encode({"messages": [dict(message) for message in messages]})
        ids, labels = list(row["input_ids"]), list(row["labels"])
        start = next(at for at, label in enumerate(labels) if label != -100)
        return ids[:start], ids[start:]

    return encode


RENDERERS = {
    "transformers": render_transformers,
    "trl": render_trl,
    "llamafactory": render_llamafactory,
    "swift": render_swift,
}

if __name__ == "__main__":
    main()
