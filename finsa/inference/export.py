"""Export of a run's model: merged weights, a PEFT adapter, a transformers classifier, or ONNX.

Letters: b rows of a batch, s tokens, c classes, v vocabulary, m nodes of the label tree, k = 1 + m positions read.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from finsa.config import MoeJointStage
from finsa.data import few_shot
from finsa.data.labels import LabelSpace
from finsa.data.rows import Renderer
from finsa.data.values import TASKS
from finsa.errors import ModelError
from finsa.inference import gguf_export, loading, model_cards, predictor
from finsa.inference.graphs import GRAPH
from finsa.inference.label_tree import LabelTree, scored_answers, tree_inputs
from finsa.inference.predictor import MANIFEST, Record
from finsa.models import adapters, base, factory
from finsa.models.classifier import HEAD_FILE, Classifier, unwrap_peft
from finsa.models.moe import mixture
from finsa.runs import provenance, run_folder

PROMPT_TOKENIZER = "prompt_tokenizer"  # the run's tokenizer, besides one that adds the prompt itself


def label_refusal(renderer: Renderer, form: str) -> str | None:
    """The reason why labels cannot be exported in a format; None if they can."""
    answers, _ = scored_answers(renderer)
    if form == "classifier" and renderer.labels.task in TASKS:
        return f"a sequence classifier has one class per text, and this is {renderer.labels.task}; choose format=onnx"
    if form == "classifier" and renderer.prompt.middle is not None:
        return "its tokenizer adds the prompt around a text, and this prompt also has a target; choose format=onnx"
    if form == "classifier" and any(len(answer) > 1 for answer in answers):
        words = ", ".join(
            f"{word} ({len(answer)})" for word, answer in zip(renderer.labels.words, answers, strict=True)
        )
        return f"a score head has one row per label, but these have several tokens: {words}; choose format=onnx"
    return None


def write(record: Record, form: str, precision: str, folder: Path, texts: Sequence[str] = ()) -> None:
    """Write a run's model to a folder, with everything needed to use it.

    Args:
        record: of the run.
        form: one of the formats.
        precision: of the weights.
        folder: output folder.
        texts: on which the tokenizer of a GGUF file is checked.

    Raises:
        ModelError: if the model cannot be written in this format.
        RunError: if the run's weights have changed since it wrote them.
    """
    provenance.require_weights(record.path, record.facts)
    folder.mkdir(parents=True)
    renderer, cfg = predictor.renderer_of(record), record.cfg
    tokenizer, is_mixture, more = ".", isinstance(cfg.stage, MoeJointStage), dict[str, Any]()
    if form == "adapter" and is_mixture:  # all adapters, and the router with its manifest
        for part in ("adapters", "mixture"):
            shutil.copytree(record.path / part, folder / part)
    elif form == "adapter":
        shutil.copytree(factory.adapter_folder(cfg, record.path), folder, dirs_exist_ok=True)
    elif is_mixture:
        _write_hard_routed(record, folder)
    else:
        model = whole_model(record, renderer)
        if form == "classifier":
            tokenizer = PROMPT_TOKENIZER
            _write_classifier(model, renderer, record.temperature, folder)
        elif form == "merged":
            backbone = model.backbone if isinstance(model, Classifier) else model
            assert not isinstance(backbone, PeftModel)
            backbone.save_pretrained(folder)
            if isinstance(model, Classifier):
                head = factory.adapter_folder(cfg, folder) / HEAD_FILE
                head.parent.mkdir(parents=True)
                shutil.copy2(factory.adapter_folder(cfg, record.path) / HEAD_FILE, head)
        elif form == "gguf":
            renderer.tokenizer.save_pretrained(folder)
            more = gguf_export.write(model, renderer, record.name, precision, texts, folder)
        else:
            write_onnx(model.float().cpu(), renderer, record.temperature, folder, precision)
    renderer.tokenizer.save_pretrained(folder / tokenizer)
    _describe(record, renderer, form, precision, folder, tokenizer, more)
    model_cards.write(folder, form, cfg, record.path, record.facts, renderer)


def _backbone(record: Record) -> Any:
    """A run's base model; a quantized one is dequantized, because adapters were trained on the rounded weights."""
    cfg = record.cfg
    weights = loading.weights_of(cfg.model, record.path)
    backbone: Any = base.load_base(weights, cfg.seed, quantization=cfg.method.quantization)
    return backbone if cfg.method.quantization == "none" else backbone.dequantize()


def whole_model(record: Record, renderer: Renderer) -> Any:
    """A run's model with its adapter merged: a causal language model or a classifier, in evaluation mode."""
    cfg, backbone = record.cfg, _backbone(record)
    if cfg.method.learn == "nothing":
        return backbone.eval()
    model = factory.restore(cfg, backbone, factory.adapter_folder(cfg, record.path), renderer)
    return factory.merge(model).requires_grad_(False).eval()


def _write_hard_routed(record: Record, folder: Path) -> None:
    """Write a mixture as one merged transformers model per expert, and the router."""
    for name in mixture.expert_names(record.path):
        model = adapters.load(_backbone(record), record.path / "adapters" / name)
        model.merge_and_unload().save_pretrained(folder / loading.EXPERTS / name)
    shutil.copytree(record.path / "mixture", folder / "mixture")
    manifest = folder / "mixture" / mixture.MANIFEST
    _write_json(manifest, {**json.loads(manifest.read_text(encoding="utf-8")), "routing": "hard"})


def _write_classifier(model: Any, renderer: Renderer, temperature: float, folder: Path) -> None:
    """Write a sequence classifier whose score head is the LM head's label rows divided by the temperature.

    The softmax of its logits is the run's probability of each label. Its tokenizer adds the prompt, so the input is
    only a stripped text.
    """
    from transformers import AutoModelForSequenceClassification

    names = renderer.labels.names
    config = type(model.config).from_dict(
        {
            **model.config.to_dict(),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "pad_token_id": _padding_token(renderer),
        }
    )
    try:
        # the score head is set below; all other weights have the same names in both models
        classifier: Any = AutoModelForSequenceClassification.from_config(config, dtype=next(model.parameters()).dtype)
        classifier.base_model.load_state_dict(model.base_model.state_dict())
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise ModelError(f"format: transformers has no sequence classifier of this architecture ({reason})") from None
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError("format: this LM head has a bias, and a score head has none; choose format=onnx")
    with torch.no_grad():
        rows = head.weight[[answer[0] for answer in renderer.answers]].float()
        # subtracting the mean keeps the logits small, for smaller rounding errors in bfloat16
        classifier.score.weight.copy_((rows - rows.mean(dim=0)) / temperature)
    classifier.save_pretrained(folder)
    _prompting_tokenizer(renderer, config.pad_token_id).save_pretrained(folder)


def _padding_token(renderer: Renderer) -> int:
    """A padding token other than the prompt's last token: transformers reads the last non-padding token."""
    last, default = (renderer.suffix or renderer.prefix)[-1], renderer.tokenizer.pad_token_id
    return int(default if default != last else next(n for n in range(len(renderer.tokenizer)) if n != last))


def _prompting_tokenizer(renderer: Renderer, padding: int) -> Any:
    """The run's tokenizer, which also adds the prompt around a text; special tokens in a text stay plain text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = renderer.literal
    parts = {"prefix": renderer.prefix, "suffix": renderer.suffix}
    names = {key: [str(inner.id_to_token(number)) for number in ids] for key, ids in parts.items() if ids}
    inner.post_processor = TemplateProcessing(
        single=" ".join([*["prefix"] * ("prefix" in names), "$A", *["suffix"] * ("suffix" in names)]),
        special_tokens=[{"id": key, "ids": parts[key], "tokens": names[key]} for key in names],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=renderer.tokenizer.eos_token,
        pad_token=renderer.tokenizer.convert_ids_to_tokens(padding),
        model_max_length=len(renderer.prefix) + renderer.room + len(renderer.suffix),
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        split_special_tokens=True,
    )


def _describe(
    record: Record, renderer: Renderer, form: str, precision: str, folder: Path, tokenizer: str, more: dict[str, Any]
) -> None:
    """Write the files needed to load an export: the run's configuration and ``run.json``, and the manifest."""
    shutil.copy2(record.path / "config.yaml", folder / "config.yaml")
    if record.cfg.method.examples is not None:
        shutil.copy2(record.path / few_shot.FILE, folder / few_shot.FILE)
    labels = dict(zip(record.labels.names, record.labels.words, strict=True))
    # the digests under "weights" refer to the run's files, which are not part of the export
    _write_json(folder / run_folder.EXPORTED, {**record.facts, "labels": labels, "weights": None})
    pooled = record.cfg.method.head == "classifier"
    values = {
        "format": form,
        "precision": precision if form in ("onnx", "gguf") else None,
        "tokenizer": tokenizer,
        "pooled": pooled,
        "rule": "classification head" if pooled else scored_answers(renderer)[1],
        "labels": labels,
        "prompt": {
            "template": record.cfg.data.prompt,
            "head": renderer.tokenizer.decode(renderer.prefix),
            "tail": renderer.tokenizer.decode(renderer.suffix),
        },
        "text_tokens": renderer.room,
        "rendering": renderer.stored(),
        "temperature": record.temperature,
        "temperature_applied": form == "classifier",  # its logits are already divided by it
        "base": {
            "hub_id": record.cfg.model.hub_id,
            "revision": record.cfg.model.revision,
            "path": record.cfg.model.path,
        },
        "run": record.path.name,
        **more,
    }
    _write_json(folder / MANIFEST, values)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ ONNX


class LabelGraph(torch.nn.Module):
    """Whole-label log-probabilities (b, c), as in `finsa.inference.scoring.label_log_probs`, and probabilities.

    Args:
        model: a causal language model without an adapter.
        renderer: provides the labels.
        temperature: of the probabilities.
    """

    def __init__(self, model: Any, renderer: Renderer, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.labels, self.tree = renderer.labels, LabelTree.of(scored_answers(renderer)[0])

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score rows (b, s): prompts with the given lengths (b,), each followed by the tree's tokens and padding."""
        m = len(self.tree.tokens)
        inputs = tree_inputs(self.tree, lengths, input_ids.shape[1], torch.float32) if m else _causal(input_ids)
        states = self.model.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        read = lengths[:, None] - 1 + torch.arange(m + 1)  # (b, k)
        states = states.gather(1, read[:, :, None].expand(-1, -1, states.shape[2]))
        log_probs = self.model.get_output_embeddings()(states).float().log_softmax(-1)  # (b, k, v)
        columns = [torch.stack([log_probs[:, at, token] for at, token in steps]).sum(0) for steps in self.tree.steps]
        return with_probabilities(torch.stack(columns, dim=1), self.labels, self.temperature)


class PooledGraph(torch.nn.Module):
    """Class log-probabilities (b, c) of a classification head over the text tokens, and probabilities.

    Args:
        model: a classifier whose base has no adapter.
        renderer: provides the start of the text.
        temperature: of the probabilities.
    """

    def __init__(self, model: Classifier, renderer: Renderer, temperature: float) -> None:
        super().__init__()
        self.temperature, self.labels = temperature, renderer.labels
        self.body, self.head, self.start = unwrap_peft(model.backbone).base_model, model.head, len(renderer.prefix)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score rows (b, s): prefix and text with the given lengths (b,), followed by padding."""
        states = self.body(input_ids=input_ids, use_cache=False, **_causal(input_ids)).last_hidden_state
        position = torch.arange(input_ids.shape[1])
        inside = ((position >= self.start) & (position < lengths[:, None])).float()[:, :, None]
        pooled = (states.float() * inside).sum(1) / inside.sum(1).clamp(min=1)
        logits = self.head(pooled)
        scores = logits if self.labels.task in TASKS else logits.log_softmax(dim=1)
        return with_probabilities(scores, self.labels, self.temperature)


def with_probabilities(
    scores: torch.Tensor, labels: LabelSpace, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two outputs of a graph: scores, and the probabilities of the labels or the output of a regression head."""
    if labels.task == "multi_label":
        odds = scores[:, 0::2] - scores[:, 1::2] if scores.shape[1] == 2 * len(labels) else scores
        return scores, (odds / temperature).sigmoid()
    if labels.task == "regression" and scores.shape[1] == 1:
        return scores, scores + 0  # an output of its own
    return scores, (scores / temperature).softmax(dim=1)


def _causal(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Explicit causal mask (b, 1, s, s) and positions, because those of transformers cannot be exported."""
    position = torch.arange(ids.shape[1])
    hidden = (position[None, :] > position[:, None]).float() * torch.finfo(torch.float32).min
    return {
        "attention_mask": hidden[None, None].expand(ids.shape[0], 1, -1, -1),
        "position_ids": position[None].expand(ids.shape[0], -1),
    }


def write_onnx(model: Any, renderer: Renderer, temperature: float, folder: Path, precision: str) -> None:
    """Write ``model.onnx``, from ``input_ids`` (b, s) and ``lengths`` (b,) to ``log_probs`` and ``probs`` (b, c).

    Args:
        model: a causal language model or a classifier, without an adapter, in float32 on the CPU.
        renderer: renders its prompts.
        temperature: of the probabilities.
        folder: output folder.
        precision: ``fp32``, or ``int8`` for 8-bit weights and dynamically quantized activations.

    Raises:
        ModelError: if this architecture cannot be exported.
    """
    kind = PooledGraph if isinstance(model, Classifier) else LabelGraph
    graph = kind(model, renderer, temperature)
    sample = renderer.encode(["文本", "另一条文本 text"])
    tree = graph.tree.tokens if isinstance(graph, LabelGraph) else ()
    length = max(map(len, sample))
    # at least two rows: a batch size of one would become a constant
    ids = torch.tensor([[*prompt, *tree, *[0] * (length - len(prompt))] for prompt in sample])
    lengths = torch.tensor([len(prompt) for prompt in sample])
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                graph.eval(),
                (ids, lengths),
                folder / GRAPH,
                dynamo=True,
                input_names=["input_ids", "lengths"],
                output_names=["log_probs", "probs"],
                dynamic_shapes={"input_ids": {0: rows, 1: tokens}, "lengths": {0: rows}},
                verbose=False,
            )
        except Exception as error:  # the exporter fails in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"format: this architecture cannot be written as ONNX: {reason}") from None
    if precision == "int8":
        width = model.head.out_features if isinstance(model, Classifier) else model.config.vocab_size
        _quantize(folder / GRAPH, width)


def _quantize(file: Path, width: int) -> None:
    """Quantize the matrix products of a graph to int8; `width` is the output size of the last one."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(file)
    del model.graph.value_info[:]  # they have the shapes of untransposed weights, on which the quantizer fails
    for part in file.parent.glob(f"{file.name}*"):
        part.unlink()
    logging.getLogger().setLevel(
        logging.ERROR
    )  # silences the recommendation of a preprocessing that changes nothing here
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    products = ((node.name, sizes.get(node.input[1], [0, 0])) for node in model.graph.node if node.op_type == "MatMul")
    # The head is applied at one or two positions, so quantizing it gains nothing. Inputs of narrowing products have
    # outliers, which a common scale represents poorly: keeping these products in float32 changes 0.4 % instead of
    # 1.0 % of the predictions of the embedded default model.
    kept = [name for name, (rows, columns) in products if columns == width or rows > columns]
    quantize_dynamic(
        model,
        file,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=kept,
        per_channel=True,
        reduce_range=True,  # 7-bit weights: without VNNI, products of 8 by 8 bits overflow
        weight_type=QuantType.QInt8,
    )
