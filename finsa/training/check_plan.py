"""The plan of a training run: rows, token lengths, steps, parameters, memory and time; no weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from finsa.config import MoeJointStage, PretrainStage, RunConfig, compose
from finsa.data import dataset, documents, tokenized
from finsa.evaluation import tables
from finsa.models import base, factory, hardware, quantization, tokenizers
from finsa.runs import processes
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.training import expert_runs, memory_plan, preflight

MEASURED_ROWS = 20_000
MEASURED_DOCUMENTS = 2_000


def show_training(cfg: RunConfig, lines: dict[str, object], session: Session) -> Result:
    """Print the plan of fine-tuning.

    Args:
        cfg: checked by `preflight.require_trainable`.
        lines: further lines for the table.
        session: session of the command.
    """
    world, learns = processes.world_size(), cfg.method.learn != "nothing"
    tokenizer, whose, style = tokenizers.load_or_embedded(cfg.model, local_only=True)
    rows = dataset.load(cfg.data, session)
    data = tokenized.build(cfg.model_copy(update={"model": style}), rows, tokenizer, session)
    hardware.prepare(cfg.train)
    trainable, total = base.count_parameters(factory.on_meta(cfg, data.renderer))

    split = "train" if rows.splits["train"].height else "test"
    texts = data.texts(split)
    sample = data.prompts(split) if len(texts) <= MEASURED_ROWS else data.renderer.encode(texts[:MEASURED_ROWS])
    lengths = sample.lengths + max(map(len, data.renderer.answers)) + 1
    low, median, high, longest = np.percentile(lengths, [5, 50, 95, 100])
    tokens = f"5 % {low:.0f}, median {median:.0f}, 95 % {high:.0f}, longest {longest:.0f}"
    truncated = sum(cut > 0 for cut in sample.cut)
    words = zip(rows.labels.names, rows.labels.words, strict=True)
    table: dict[str, object] = {
        "rows": rows.sizes(),
        "labels": ", ".join(f"{name} → {word}" for name, word in words),
        "tokens per row": f"{tokens} (tokenizer: {whose})",
        "truncated texts": f"{truncated:,} of {len(lengths):,}, at {cfg.data.max_length} tokens",
    }

    plan = memory_plan.make(cfg, data, sample.lengths, world)
    if isinstance(cfg.stage, MoeJointStage):
        experts = expert_runs.names(cfg.stage, rows)
        plan = _with_experts(plan, len(experts), trainable)
        table["experts"] = ", ".join(experts)
        trainable, total = trainable * len(experts), total + trainable * (len(experts) - 1)
    table["parameters"] = f"{trainable:,} trainable of {total:,} total"
    steps = 0
    if learns:
        used = sum(data.class_counts(cfg))
        steps = preflight.optimizer_steps(plan.apply(cfg.train), used, world)
        table["training"] = f"{used:,} rows, {steps:,} steps of {cfg.train.batch_size} sequences"
        if isinstance(cfg.stage, MoeJointStage) and cfg.stage.warmup_steps:
            table["training"] = f"{table['training']}, after {cfg.stage.warmup_steps:,} of router and head"
    if cfg.method.preference is not None and cfg.method.starts_from_run and cfg.data.columns.rejected is None:
        table["pairs"] = f"scores of {cfg.method.preference.folds} models first, each trained like {cfg.method.init}"
    least, most = memory_plan.seconds(cfg, data, sample.lengths, steps, plan.gradient_checkpointing, world)
    verdict = memory_plan.verdict(plan, cfg, data, sample.lengths, world)
    if cfg.model.think == "open":
        thought = cfg.model.thought
        table["thoughts"] = f"{thought.samples} of up to {thought.max_tokens:,} tokens per answer; time not estimated"
    table |= memory_plan.show(plan, cfg, verdict) | {"time": memory_plan.show_seconds(cfg, least, most)}
    tables.show_plan(_title(cfg), table | _missing_weights(cfg) | lines)
    if cfg.stage.name == "check":  # of a chain's links, the plans alone
        tables.show_ledger(rows.ledger, data.truncated())
    return Result(
        "check",
        None,
        {
            "trainable_parameters": trainable,
            "total_parameters": total,
            "memory_bytes": plan.peak(),
            "memory_plan": plan.facts(),
            "fits": plan.fits(),
            "seconds": [round(least, 1), round(most, 1)],
        },
    )


def _with_experts(plan: memory_plan.Plan, experts: int, trainable: int) -> memory_plan.Plan:
    """The plan of several adapters on one base model, given that of one; the memory of the router is negligible."""
    more = 4 * trainable * (experts - 1)  # adapters are in float32
    training = plan.training and replace(
        plan.training, weights=plan.training.weights + more, optimizer=plan.training.optimizer * experts
    )
    return replace(plan, training=training, scoring=replace(plan.scoring, weights=plan.scoring.weights + more))


def show_pretraining(cfg: RunConfig, lines: dict[str, object]) -> Result:
    """Print the plan of causal pre-training: documents, blocks, steps, memory."""
    corpus = cfg.data.corpus
    assert corpus is not None
    quantization.require_library(cfg.method)
    if isinstance(cfg.stage, PretrainStage):
        heldout = cfg.stage.heldout
    else:  # that of conf/stage/pretrain.yaml
        heldout = float(compose.compose_values(["stage=pretrain", "data=tiny_corpus"])[0]["stage"]["heldout"])
    loaded = documents.load(cfg.data, heldout)
    tokenizer, whose, _ = tokenizers.load_or_embedded(cfg.model, local_only=True)
    measured = loaded.learn[:MEASURED_DOCUMENTS]
    tokens = sum(len(ids) + 1 for ids in tokenizer(measured, add_special_tokens=False)["input_ids"])
    blocks = int(tokens * len(loaded.learn) / len(measured)) // corpus.block
    if corpus.vocabulary is not None:
        whose = f"an estimate, because one of {corpus.vocabulary:,} entries is trained on the documents"
    hardware.prepare(cfg.train)
    model = factory.on_meta(cfg, None)
    trainable, total = base.count_parameters(model)
    plan = memory_plan.of_blocks(cfg, model, corpus.block)
    table: dict[str, object] = {
        "documents": f"{len(loaded.learn):,} to train on, {len(loaded.held):,} held out",
        "blocks": f"about {blocks:,} of {corpus.block} tokens (tokenizer: {whose})",
        "parameters": f"{trainable:,} trainable of {total:,} total",
    }
    if blocks:
        steps = preflight.optimizer_steps(cfg.train, blocks, processes.world_size())
        table["training"] = f"about {steps:,} steps of {cfg.train.batch_size} blocks"
    tables.show_plan(_title(cfg), table | memory_plan.show(plan, cfg) | _missing_weights(cfg) | lines)
    metrics = {"trainable_parameters": trainable, "total_parameters": total, "memory_bytes": plan.peak()}
    return Result("check", None, metrics)


def show_without_rows(link: RunConfig, session: Session) -> dict[str, Any]:
    """Print the plan of a link whose rows cannot be read: an upper bound, with ``data.max_length`` tokens per row."""
    if link.method.baseline is not None or link.stage.name == "pretrain":
        return {}
    values, choices = compose.compose_values(["data=sample", f"data.max_length={link.data.max_length}"])
    sample = compose.build(values, choices, []).data
    tokenizer, _, style = tokenizers.load_or_embedded(link.model, local_only=True)
    rendered = link.model_copy(update={"model": style, "data": sample})
    data = tokenized.build(rendered, dataset.load(sample, session), tokenizer, session)
    trainable, total = base.count_parameters(factory.on_meta(link, data.renderer))
    plan = memory_plan.make(link, data, np.full(1, link.data.max_length), processes.world_size())
    table: dict[str, object] = {
        "rows": "missing, see below",
        "parameters": f"{trainable:,} trainable of {total:,} total",
        "training": f"steps of {link.train.batch_size} sequences; their number follows from the rows",
    }
    title = f"{_title(link)}, rows of {link.data.max_length} tokens at most"
    tables.show_plan(title, table | memory_plan.show(plan, link) | _missing_weights(link))
    return {"trainable_parameters": trainable, "total_parameters": total, "memory_bytes": plan.peak()}


def _missing_weights(cfg: RunConfig) -> dict[str, object]:
    """A line if the weights are neither in a folder nor in the cache of the hub."""
    if cfg.model.weights != "pretrained" or cfg.model.path is not None or cfg.model.hub_id is None:
        return {}
    cached = try_to_load_from_cache(cfg.model.hub_id, "config.json", revision=cfg.model.revision)
    return (
        {} if isinstance(cached, str) else {"weights": f"not on this machine: {cfg.model.hub_id} is downloaded first"}
    )


def _title(cfg: RunConfig) -> str:
    return f"{cfg.stage.name}: {cfg.model.name}, {cfg.method.name}, {cfg.data.title}"
