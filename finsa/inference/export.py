"""Writing a run's model in another format: one function per format, and what each cannot do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from finsa.config import MoeJointStage
from finsa.data.rows import Renderer
from finsa.errors import ModelError
from finsa.inference import export_manifest, hard_routing, loading, model_cards, predictor
from finsa.inference.label_tree import scored_answers
from finsa.inference.predictor import Record
from finsa.models import base, factory
from finsa.models.classifier import FILE as HEAD
from finsa.models.classifier import Classifier
from finsa.runs import provenance, run_folder

PROMPT_TOKENIZER = "prompt_tokenizer"  # beside one that puts the prompt around by itself


def refusal_of_labels(renderer: Renderer, form: str) -> str | None:
    """Why labels cannot be written in a format; None: they can."""
    answers, _ = scored_answers(renderer)
    if form == "classifier" and any(len(answer) > 1 for answer in answers):
        words = ", ".join(
            f"{word} ({len(answer)})" for word, answer in zip(renderer.labels.words, answers, strict=True)
        )
        return f"a score head has one row per label, and these have several tokens: {words}; choose format=onnx"
    return None


def write(record: Record, form: str, precision: str, folder: Path) -> None:
    """Write a run's model into a folder, with all that is needed to ask it.

    Raises:
        ModelError: where the model cannot be written in this format.
        RunError: where the run's weights are not those that it wrote.
    """
    provenance.require_weights(record.path, record.facts)
    folder.mkdir(parents=True)
    renderer = predictor.renderer_of(record)
    tokenizer = "."
    if form == "adapter":
        _write_adapter(record, folder)
    elif isinstance(record.cfg.stage, MoeJointStage):
        hard_routing.write(record.cfg, loading.weights_of(record.cfg.model, record.path), record.path, folder)
    else:
        model = whole_model(record, renderer)
        if form == "classifier":
            tokenizer = PROMPT_TOKENIZER
            _write_classifier(model, renderer, record.temperature, folder)
        elif form == "merged":
            _write_merged(record, model, folder)
        else:
            from finsa.inference import graphs

            graphs.write_onnx(model.float().cpu(), renderer, record.temperature, folder, precision)
            if form == "openvino":
                graphs.write_openvino(folder)
    renderer.tokenizer.save_pretrained(folder / tokenizer)
    _describe(record, renderer, form, precision, folder, tokenizer)
    model_cards.write(folder, form, record.cfg, record.path, record.facts, renderer)


def whole_model(record: Record, renderer: Renderer) -> Any:
    """A run's model without an adapter: a quantised base is dequantised first, since that is what it was trained on.

    Returns:
        A causal language model, or a classifier, in evaluation mode.
    """
    cfg = record.cfg
    backbone: Any = base.load_base(
        loading.weights_of(cfg.model, record.path), cfg.seed, quantization=cfg.method.quantization
    )
    if cfg.method.quantization != "none":
        backbone = backbone.dequantize()
    if cfg.method.learn == "nothing":
        return backbone.eval()
    model = factory.restore(cfg, backbone, factory.adapter_folder(cfg, record.path), renderer)
    return factory.merged(model).requires_grad_(False).eval()


def _write_merged(record: Record, model: Any, folder: Path) -> None:
    backbone = model.backbone if isinstance(model, Classifier) else model
    assert not isinstance(backbone, PeftModel)
    backbone.save_pretrained(folder)
    if isinstance(model, Classifier):
        place = factory.adapter_folder(record.cfg, record.path)
        own = factory.adapter_folder(record.cfg, folder)
        own.mkdir(parents=True)
        shutil.copy2(place / HEAD, own / HEAD)


def _write_adapter(record: Record, folder: Path) -> None:
    """Copy the adapter as PEFT reads it; of a mixture all adapters, the router, and its manifest."""
    if isinstance(record.cfg.stage, MoeJointStage):
        for part in ("adapters", "mixture"):
            shutil.copytree(record.path / part, folder / part)
        return
    shutil.copytree(factory.adapter_folder(record.cfg, record.path), folder, dirs_exist_ok=True)


def _write_classifier(model: Any, renderer: Renderer, temperature: float, folder: Path) -> None:
    """Write a sequence-classification model whose score head is the LM head's rows of the labels over the temperature.

    The softmax of its logits thus is the run's probability of each label. Its tokenizer puts the prompt around a text,
    so that a stripped text alone is what it is given.
    """
    from transformers import AutoModelForSequenceClassification

    names = renderer.labels.names
    config = type(model.config).from_dict(
        {
            **model.config.to_dict(),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "pad_token_id": _filler(renderer),
        }
    )
    try:
        # the LM head goes to its three rows; what is left of the weights has the same names in both
        made: Any = AutoModelForSequenceClassification.from_config(config, dtype=next(model.parameters()).dtype)
        made.base_model.load_state_dict(model.base_model.state_dict())
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise ModelError(f"format: transformers has no sequence classifier of this architecture ({reason})") from None
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError("format: this LM head has a bias, and a score head has none; choose format=onnx")
    with torch.no_grad():
        rows = head.weight[[answer[0] for answer in renderer.answers]].float()
        made.score.weight.copy_((rows - rows.mean(dim=0)) / temperature)  # small logits: less is rounded in bfloat16
    made.save_pretrained(folder)
    _prompting(renderer, config.pad_token_id).save_pretrained(folder)


def _filler(renderer: Renderer) -> int:
    """A token for padding that does not end the prompt: the last one that is none is what is read."""
    last = (renderer.suffix or renderer.prefix)[-1]
    own = renderer.tokenizer.pad_token_id
    return int(own if own != last else next(n for n in range(len(renderer.tokenizer)) if n != last))


def _prompting(renderer: Renderer, filler: int) -> Any:
    """The run's tokenizer, which also puts the prompt around a text and takes no text for markup."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = renderer.literal
    parts = {"head": renderer.prefix, "tail": renderer.suffix}
    names = {key: [str(inner.id_to_token(number)) for number in ids] for key, ids in parts.items() if ids}
    inner.post_processor = TemplateProcessing(
        single=" ".join([*["head"] * ("head" in names), "$A", *["tail"] * ("tail" in names)]),
        special_tokens=[{"id": key, "ids": parts[key], "tokens": names[key]} for key in names],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=renderer.tokenizer.eos_token,
        pad_token=renderer.tokenizer.convert_ids_to_tokens(filler),
        model_max_length=len(renderer.prefix) + renderer.room + len(renderer.suffix),
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        split_special_tokens=True,
    )


def _describe(record: Record, renderer: Renderer, form: str, precision: str, folder: Path, tokenizer: str) -> None:
    """Write what serving needs to know: the run's own record, and the manifest."""
    shutil.copy2(record.path / "config.yaml", folder / "config.yaml")
    labels = dict(zip(record.labels.names, record.labels.words, strict=True))
    facts = {**record.facts, "labels": labels, "weights": None}  # the run's, which are not here
    (folder / run_folder.EXPORTED).write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    head = record.cfg.method.head == "classifier"
    values = {
        "format": form,
        "precision": precision if form in ("onnx", "openvino") else None,
        "tokenizer": tokenizer,
        "pooled": head,
        "rule": "classification head" if head else scored_answers(renderer)[1],
        "labels": labels,
        "prompt": {
            "template": record.cfg.data.prompt,
            "head": renderer.tokenizer.decode(renderer.prefix),
            "tail": renderer.tokenizer.decode(renderer.suffix),
        },
        "text_tokens": renderer.room,
        "temperature": record.temperature,
        "temperature_applied": form == "classifier",  # its logits are divided by it already
        "base": {
            "hub_id": record.cfg.model.hub_id,
            "revision": record.cfg.model.revision,
            "path": record.cfg.model.path,
        },
        "run": record.path.name,
    }
    (folder / export_manifest.MANIFEST).write_text(
        json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
