"""Model cards: the ``README.md`` beside the weights of a run or an export, from what the run recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from finsa.config import Model, MoeJointStage, RunConfig, locate
from finsa.data.rows import Renderer
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.models import base

FILE = "README.md"
LIBRARIES = {"adapter": "peft", "merged": "transformers", "classifier": "transformers", "onnx": "onnx"}
EXAMPLES = (
    "Net profit rose by a third in the first half",
    "公司上半年净利润同比增长三成",
)  # the latter for Chinese prompts
KINDS = {
    "adapter": "a PEFT adapter",
    "merged": "a whole model of transformers",
    "classifier": "a sequence-classification model of transformers, whose tokenizer puts the prompt around a text",
    "onnx": "an ONNX graph",
}

_ENCODE = """\
prefix = {prefix}  # {prefix_text}
suffix = {suffix}  # {suffix_text}


def encode(text):
    ids = tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return prefix + ids[:{room}] + suffix
"""

_LANGUAGE_MODEL = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
model = {model}
answers = {answers}  # tokens of each label
{encode}

@torch.inference_mode()
def probabilities(text):
    prompt, log_probs = encode(text), []
    for answer in answers.values():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        log_probs.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
    return dict(zip(answers, (torch.stack(log_probs) / {temperature}).softmax(0).tolist()))


print(probabilities({example}))
"""

_MERGE = """\
Merged into the base it is a whole model, whose folder needs the tokenizer as well:
`model.merge_and_unload().save_pretrained("merged"); tokenizer.save_pretrained("merged")`, or `format=merged` of
`stage=export`."""

_PIPELINE = """\
from transformers import pipeline

classify = pipeline("text-classification", model=".", top_k=None)
print(classify({example}.strip(), truncation=True))
"""

_ONNX = """\
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("model.onnx")
labels = {labels}
tree = {tree}  # tokens of the labels that follow every prompt
{encode}

def probabilities(text):
    prompt = encode(text)
    inputs = {{"input_ids": np.array([prompt + tree]), "lengths": np.array([len(prompt)])}}
    return dict(zip(labels, session.run(["probs"], inputs)[0][0].tolist()))


print(probabilities({example}))
"""

_GRAPH = """\
| name | shape, type | meaning |
|---|---|---|
| `input_ids` (input) | (rows, tokens), int64 | {ids}, padded with 0 on the right |
| `lengths` (input) | (rows,), int64 | tokens of each prompt{without} |
| `log_probs` (output) | (rows, {classes}), float32 | log-probability of each label, without the temperature |
| `probs` (output) | (rows, {classes}), float32 | probability of each label, calibrated |

The labels are in the order {labels}.
"""


def write(folder: Path, form: str, cfg: RunConfig, run: Path, facts: dict[str, Any], renderer: Renderer) -> None:
    """Write the card of a folder.

    Args:
        folder: with the weights.
        form: format of an export; ``adapter`` or ``merged`` within a run folder.
        cfg: configuration of the run.
        run: its folder, with ``metrics.json`` and ``ledger.json``.
        facts: of its ``run.json``.
        renderer: of its prompts.
    """
    metrics, ledger = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("metrics.json", "ledger.json"))
    licence = licence_of(cfg.model)
    values = {
        "library_name": LIBRARIES.get(form),
        "base_model": cfg.model.hub_id,
        "license": licence,
        "pipeline_tag": "text-classification",
        "tags": ["finsa"],
    }
    known = {key: value for key, value in values.items() if value is not None}
    temperature = (facts.get("calibration") or {}).get("temperature", 1.0)
    parts = [
        f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---",
        f"# {cfg.method.name}, {cfg.model.name}, {cfg.data.title}",
        _about(form, cfg, facts),
        f"## Scores\n\n{_scores(metrics)}",
        f"## Data\n\n{_data(cfg, ledger, facts)}",
        f"## Prompt and labels\n\n{_prompt(cfg, renderer)}",
        f"## Probabilities\n\n{_probabilities(form, temperature)}",
        f"## Use\n\n{_use(folder, form, cfg, run, renderer, temperature)}",
        f"## Licence\n\n{_licence(cfg.model, licence)}",
    ]
    (folder / FILE).write_text("\n\n".join(part.rstrip() for part in parts) + "\n", encoding="utf-8")


def licence_of(model: Model) -> str | None:
    """The licence in the card of a base model, in its folder or in the hub's cache; None where it is not known."""
    card: Any = None
    if model.path is not None:
        card = locate(model.path) / FILE
    elif model.hub_id is not None:
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(model.hub_id, FILE, revision=model.revision)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    text = Path(card).read_text(encoding="utf-8", errors="replace")
    try:
        values = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except (yaml.YAMLError, IndexError):
        return None
    found = values.get("license") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def _about(form: str, cfg: RunConfig, facts: dict[str, Any]) -> str:
    origin = f"`{cfg.model.hub_id}` at revision `{cfg.model.revision}`" if cfg.model.hub_id else f"`{cfg.model.name}`"
    kind = "the experts of a mixture and their router" if isinstance(cfg.stage, MoeJointStage) else KINDS[form]
    version, commit = (facts.get("versions") or {}).get("finsa"), facts.get("git_commit")
    lines = [f"This folder holds {kind}. Base model: {origin}. Method: `{cfg.method.name}`, seed {cfg.seed}."]
    lines.append(f"Trained with finsa {version}" + (f", commit `{commit}`." if commit else "."))
    if cfg.model.name == "tiny":
        lines.append("The base is finsa's embedded model of 3.7 million parameters: a demonstration, not for real use.")
    return " ".join(lines)


def _scores(metrics: dict[str, Any]) -> str:
    test, calibration = metrics["test"], metrics.get("calibration", {}).get("test")
    lines = [
        f"Test split, {test['n']:,} rows. Intervals are for 95 %: Wilson for accuracy, bootstrap over rows for F1."
    ]
    lines += ["", "| score | value | interval |", "|---|---|---|"]
    for name, title in (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("weighted_f1", "weighted F1")):
        low, high = test["intervals"][name]
        lines.append(f"| {title} | {test[name]:.4f} | {low:.4f} to {high:.4f} |")
    lines += ["", "| label | precision | recall | F1 | rows |", "|---|---|---|---|---|"]
    for label, row in test["per_class"].items():
        cell = label.replace("|", r"\|")
        lines.append(
            f"| {cell} | {row['precision']:.4f} | {row['recall']:.4f} | {row['f1']:.4f} | {row['support']:,} |"
        )
    if calibration:
        lines += ["", f"Expected calibration error {calibration['ece']:.4f}, log loss {calibration['loss']:.4f}."]
    return "\n".join(lines)


def _data(cfg: RunConfig, ledger: dict[str, Any], facts: dict[str, Any]) -> str:
    lines = [f"Data set `{cfg.data.title}`, fingerprint `{facts.get('data_fingerprint')}`."]
    if cfg.data.origin:
        lines.append(f"Origin: {cfg.data.origin}.")
    lines += ["", "| split | rows | by label |", "|---|---|---|"]
    for split, counts in ledger["splits"].items():
        shown = ", ".join(f"{label} {count:,}" for label, count in counts.items())
        lines.append(f"| {split} | {sum(counts.values()):,} | {shown} |")
    return "\n".join(lines)


def _prompt(cfg: RunConfig, renderer: Renderer) -> str:
    pairs = zip(renderer.labels.names, renderer.labels.words, strict=True)
    words = ", ".join(name if name == word else f"{name} (the model answers {word})" for name, word in pairs)
    prefix, suffix = (renderer.tokenizer.decode(ids) for ids in (renderer.prefix, renderer.suffix))
    return (
        f"Labels: {words}.\n\n```text\n{prefix}{{text}}{suffix}\n```\n\n"
        f"White space around a text is stripped; a text keeps its first {renderer.room:,} tokens."
    )


def _probabilities(form: str, temperature: float) -> str:
    fitted = "fitted on the validation rows" if temperature != 1 else "as none was fitted"
    lines = [
        "A probability is `softmax(log_probs / temperature)` over the labels, where `log_probs` are the",
        f"log-probabilities of the whole labels. The temperature is {temperature:.6g}, {fitted}.",
    ]
    if form == "classifier":
        lines.append("The score head is divided by it already: the softmax of the logits is calibrated.")
    if form == "onnx":
        lines.append("The output `probs` is divided by it already.")
    return " ".join(lines)


def _use(folder: Path, form: str, cfg: RunConfig, run: Path, renderer: Renderer, temperature: float) -> str:
    """The command of finsa, and Python without finsa where a few lines do."""
    inside = folder.is_relative_to(run) and "adapters" in folder.relative_to(run).parts
    inside = inside or folder == run / "model"
    place = "<the run's folder>" if inside else "<this folder>"
    example = json.dumps(EXAMPLES[any("一" <= letter <= "鿿" for letter in cfg.data.prompt)], ensure_ascii=False)
    parts = [f"```bash\npython run.py stage=predict run={place} text={example}\n```"]
    pooled = cfg.method.head == "classifier"
    answers, _ = ([], "") if pooled else scored_answers(renderer)
    tree = list(LabelTree.of(answers).tokens)
    suffix = [] if pooled else renderer.suffix
    encode = _ENCODE.format(
        prefix=renderer.prefix,
        suffix=suffix,
        prefix_text=json.dumps(renderer.tokenizer.decode(renderer.prefix), ensure_ascii=False),
        suffix_text=json.dumps(renderer.tokenizer.decode(suffix), ensure_ascii=False),
        room=renderer.room,
    )
    names = list(renderer.labels.names)
    if form == "classifier":
        parts.append(f"```python\n{_PIPELINE.format(example=example)}```")
    elif form == "onnx":
        ids = "prompt and text" if pooled else "each prompt" + (f", then {tree}" if tree else "")
        without = f", without the {len(tree)} behind it" if tree else ""
        parts.append(f"```python\n{_ONNX.format(labels=names, tree=tree, encode=encode, example=example)}```")
        parts.append(_GRAPH.format(ids=ids, without=without, classes=len(names), labels=", ".join(names)))
    elif not pooled and not isinstance(cfg.stage, MoeJointStage):
        parts.append(
            f"```python\n{_language_model(form, cfg, inside, names, answers, encode, temperature, example)}```"
        )
        parts += [_MERGE] * (form == "adapter")
    return "\n\n".join(parts)


def _language_model(
    form: str,
    cfg: RunConfig,
    inside: bool,
    names: list[str],
    answers: Any,
    encode: str,
    temperature: float,
    example: str,
) -> str:
    source = json.dumps(cfg.model.hub_id or f"<folder of {cfg.model.name}>", ensure_ascii=False)
    pinned = f", revision={json.dumps(cfg.model.revision)}" if cfg.model.hub_id else ""
    model, imports = 'AutoModelForCausalLM.from_pretrained(".").eval()', ""
    if form == "adapter":
        imports = "from peft import PeftModel\n"
        dtype = f", dtype={base.dtype(cfg.model)}"
        backbone = f"AutoModelForCausalLM.from_pretrained({source}{pinned}{dtype})"
        model = f'PeftModel.from_pretrained({backbone}, ".").eval()'
    return _LANGUAGE_MODEL.format(
        imports=imports,
        tokenizer=("../../tokenizer" if form == "adapter" else "../tokenizer") if inside else ".",
        model=model,
        answers=dict(zip(names, map(list, answers), strict=True)),
        encode=encode,
        temperature=temperature,
        example=example,
    )


def _licence(model: Model, licence: str | None) -> str:
    origin = f"[{model.hub_id}](https://huggingface.co/{model.hub_id})" if model.hub_id else f"`{model.name}`"
    if licence is None:
        return f"These weights derive from {origin}, whose licence applies; its model card names it."
    return f"These weights derive from {origin}, whose licence ({licence}) applies."
