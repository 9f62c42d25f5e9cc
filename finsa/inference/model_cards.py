"""Model cards: ``README.md`` next to the weights of a run or an export, from the run's records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from finsa.config import Model, MoeJointStage, RunConfig, locate
from finsa.data.rows import Renderer
from finsa.data.values import TASKS
from finsa.evaluation import tables
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.models import base

FILE = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
LIBRARIES = {"adapter": "peft", "merged": "transformers", "classifier": "transformers", "onnx": "onnx", "gguf": "gguf"}
KINDS = {
    "adapter": "a PEFT adapter",
    "merged": "a complete transformers model",
    "classifier": "a transformers sequence classifier whose tokenizer adds the prompt",
    "onnx": "an ONNX graph",
    "gguf": "a complete model in the format of llama.cpp, and an Ollama Modelfile",
}


def write(
    folder: Path,
    form: str,
    cfg: RunConfig,
    run: Path,
    facts: dict[str, Any],
    renderer: Renderer,
    source: str = ".",
) -> None:
    """Write the model card of a folder.

    Args:
        folder: contains the weights.
        form: format of an export; ``adapter`` or ``merged`` inside a run folder.
        cfg: configuration of the run.
        run: the run folder, with ``metrics.json`` and ``ledger.json``.
        facts: of its ``run.json``.
        renderer: of its prompts.
        source: where the example code loads the model from: the folder, or its repository on the hub.
    """
    metrics, ledger = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("metrics.json", "ledger.json"))
    model, license, labels, prompt = cfg.model, license_of(cfg.model), renderer.labels, renderer.prompt
    fields = [] if prompt.middle is None else ["{target}", prompt.middle]
    header = {
        "library_name": LIBRARIES.get(form),
        "base_model": model.hub_id,
        "license": license,
        "pipeline_tag": "text-classification",
        "tags": ["finsa"],
    }
    header = {key: value for key, value in header.items() if value is not None}
    pooled, mixture = cfg.method.head == "classifier", isinstance(cfg.stage, MoeJointStage)
    answers = [] if pooled else scored_answers(renderer)[0]
    # in a run folder the tokenizer is elsewhere
    inside = folder == run / "model" or (folder.is_relative_to(run) and "adapters" in folder.relative_to(run).parts)
    tokenizer = ("../../tokenizer" if form == "adapter" else "../tokenizer") if inside else source
    load = f'AutoModelForCausalLM.from_pretrained("{source}").eval()'
    if form == "adapter":
        name = _json(model.hub_id or f"<folder of {model.name}>")
        revision = f", revision={_json(model.revision)}" if model.hub_id else ""
        backbone = f"AutoModelForCausalLM.from_pretrained({name}{revision}, dtype={base.dtype(model)})"
        load = f'PeftModel.from_pretrained({backbone}, "{source}").eval()'
    chinese = any("一" <= letter <= "鿿" for letter in cfg.data.prompt)
    templating = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    card = templating.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        cfg=cfg,
        form=form,
        facts={"data_fingerprint": None, **facts},
        renderer=renderer,
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        kind="the experts of a mixture and their router" if mixture else KINDS[form],
        base=f"`{model.hub_id}` at revision `{model.revision}`" if model.hub_id else f"`{model.name}`",
        origin=f"[{model.hub_id}](https://huggingface.co/{model.hub_id})" if model.hub_id else f"`{model.name}`",
        license=license,
        version=(facts.get("versions") or {}).get("finsa"),
        commit=facts.get("git_commit"),
        test=metrics["test"],
        calibration=metrics.get("calibration", {}).get("test"),
        splits=ledger["splits"],
        sizes=ledger.get("rows", {}),
        words=dict(zip(labels.names, labels.words, strict=True)),
        task=labels.task,
        values=TASKS,
        numbers=labels.numbers if labels.task == "regression" else [],
        scores=tables.scores_of(metrics["test"]),
        thresholds=metrics.get("calibration", {}).get("thresholds", {}),
        temperature=(facts.get("calibration") or {}).get("temperature", 1.0),
        pooled=pooled,
        mixture=mixture,
        answers=dict(
            zip(labels.answers if labels.task == "multi_label" else labels.names, map(list, answers), strict=False)
        ),
        tree=list(LabelTree.of(answers).tokens),
        suffix=[] if pooled else renderer.suffix,
        inside=inside,
        source=source,
        tokenizer=tokenizer,
        model=load,
        input="".join([*fields, "{text}"] if prompt.target_first else ["{text}", *fields[::-1]]),
        example=_json("公司上半年净利润同比增长三成" if chinese else "Net profit rose by a third in the first half"),
        target=(_json("公司") if chinese else _json("the company")) if fields else None,
        json=_json,
    )
    (folder / FILE).write_text(card, encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def license_of(model: Model) -> str | None:
    """The license from the model card of a base model, in its folder or in the hub's cache; None if unknown."""
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
    license = values.get("license") if isinstance(values, dict) else None
    return license if isinstance(license, str) else None
