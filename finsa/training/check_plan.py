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
        lines: further ones for the table.
    """
    data = dataset.load(cfg.data, session)
    tokenizer, whose, style = tokenizers.own_or_embedded(cfg.model, local_only=True)
    job = tokenized.build(cfg.model_copy(update={"model": style}), data, tokenizer, session)
    hardware.prepare(cfg.train)
    trainable, total = base.count_parameters(factory.on_meta(cfg, job.renderer))
    sample = _sample(job, "train" if job.dataset.splits["train"].height else "test")
    lengths = (sample.lengths + max(map(len, job.renderer.answers)) + 1).tolist()
    used = sum(job.class_counts(cfg))
    words = zip(data.labels.names, data.labels.words, strict=True)
    truncated = sum(cut > 0 for cut in sample.cut)
    table: dict[str, object] = {
        "rows": data.sizes(),
        "labels": ", ".join(f"{name} → {word}" for name, word in words),
        "tokens per row": f"{_percentiles(lengths)} (tokenizer: {whose})",
        "truncated texts": f"{truncated:,} of {len(lengths):,}, at {cfg.data.max_length} tokens",
    }
    world, steps = processes.world(), 0
    planned = memory_plan.make(cfg, job, sample.lengths, world)
    if isinstance(cfg.stage, MoeJointStage):
        experts = expert_runs.names(cfg.stage, data)
        planned = _of_experts(planned, len(experts), trainable)
        table["experts"] = ", ".join(experts)
        trainable, total = trainable * len(experts), total + trainable * (len(experts) - 1)
    table["parameters"] = f"{trainable:,} trainable of {total:,} total"
    if cfg.method.learn != "nothing":
        steps = preflight.optimiser_steps(planned.apply(cfg.train), used, world)
        table["training"] = f"{used:,} rows, {steps:,} steps of {cfg.train.batch_size} sequences"
        if isinstance(cfg.stage, MoeJointStage) and cfg.stage.warmup_steps:
            table["training"] = f"{table['training']}, after {cfg.stage.warmup_steps:,} of router and head"
    least, most = memory_plan.seconds(cfg, job, sample.lengths, steps, planned.gradient_checkpointing, world)
    verdict = memory_plan.verdict(planned, cfg, job, sample.lengths, world)
    table |= (
        memory_plan.show(planned, cfg, verdict)
        | {"time": memory_plan.show_seconds(cfg, least, most)}
        | _weights(cfg)
        | lines
    )
    tables.show_plan(_title(cfg), table)
    if cfg.stage.name == "check":  # of a chain's links, the plans alone
        tables.show_ledger(data.ledger, job.truncated())
    metrics: dict[str, Any] = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "memory_bytes": planned.peak(),
    }
    metrics |= {"memory_plan": planned.facts(), "fits": planned.fits(), "seconds": [round(least, 1), round(most, 1)]}
    return Result("check", None, metrics)


def _of_experts(planned: memory_plan.Plan, experts: int, trainable: int) -> memory_plan.Plan:
    """A plan of one adapter's training as that of several on one base; the router is small beside them."""
    more = 4 * trainable * (experts - 1)  # float32, as adapters are
    training = planned.training and replace(
        planned.training,
        weights=planned.training.weights + more,
        optimiser=planned.training.optimiser * experts,
    )
    return replace(planned, training=training, scoring=replace(planned.scoring, weights=planned.scoring.weights + more))


# ------------------------------------------------------------------------------------------------ pre-training


def show_pretraining(cfg: RunConfig, lines: dict[str, object]) -> Result:
    """Print the plan of causal pre-training: documents, blocks, steps, memory."""
    corpus = cfg.data.corpus
    assert corpus is not None
    quantization.require_library(cfg.method)
    found = documents.load(cfg.data, _heldout(cfg))
    tokenizer, whose, _ = tokenizers.own_or_embedded(cfg.model, local_only=True)
    measured = found.learn[:MEASURED_DOCUMENTS]
    tokens = sum(len(ids) + 1 for ids in tokenizer(measured, add_special_tokens=False)["input_ids"])
    blocks = int(tokens * len(found.learn) / len(measured)) // corpus.block
    if corpus.vocabulary is not None:
        whose = f"an estimate, because one of {corpus.vocabulary:,} entries is trained on the documents"
    hardware.prepare(cfg.train)
    model = factory.on_meta(cfg, None)
    trainable, total = base.count_parameters(model)
    planned = memory_plan.of_blocks(cfg, model, corpus.block)
    table: dict[str, object] = {
        "documents": f"{len(found.learn):,} to learn from, {len(found.held):,} held out",
        "blocks": f"about {blocks:,} of {corpus.block} tokens (tokenizer: {whose})",
        "parameters": f"{trainable:,} trainable of {total:,} total",
    }
    if blocks:
        steps = preflight.optimiser_steps(cfg.train, blocks, processes.world())
        table["training"] = f"about {steps:,} steps of {cfg.train.batch_size} blocks"
    table |= memory_plan.show(planned, cfg) | _weights(cfg) | lines
    tables.show_plan(_title(cfg), table)
    metrics = {"trainable_parameters": trainable, "total_parameters": total, "memory_bytes": planned.peak()}
    return Result("check", None, metrics)


def _heldout(cfg: RunConfig) -> float:
    """The share of documents that is held out: the configured one, or that of ``conf/stage/pretrain.yaml``."""
    stage = cfg.stage
    if not isinstance(stage, PretrainStage):
        values, _ = compose.compose_values(["stage=pretrain", "data=tiny_corpus"])
        return float(values["stage"]["heldout"])
    return stage.heldout


def show_without_rows(link: RunConfig, session: Session) -> dict[str, Any]:
    """Print the plan of a link whose rows cannot be read, as if each had ``data.max_length`` tokens: an upper bound."""
    if link.method.baseline is not None or link.stage.name == "pretrain":
        return {}
    values, choices = compose.compose_values(["data=sample", f"data.max_length={link.data.max_length}"])
    sample = compose.build(values, choices, []).data
    tokenizer, _, style = tokenizers.own_or_embedded(link.model, local_only=True)
    rendered = link.model_copy(update={"model": style, "data": sample})
    job = tokenized.build(rendered, dataset.load(sample, session), tokenizer, session)
    trainable, total = base.count_parameters(factory.on_meta(link, job.renderer))
    planned = memory_plan.make(link, job, np.full(1, link.data.max_length), processes.world())
    table: dict[str, object] = {
        "rows": "missing, see below",
        "parameters": f"{trainable:,} trainable of {total:,} total",
        "training": f"steps of {link.train.batch_size} sequences; their number follows from the rows",
    }
    table |= memory_plan.show(planned, link) | _weights(link)
    tables.show_plan(f"{_title(link)}, rows of {link.data.max_length} tokens at most", table)
    return {"trainable_parameters": trainable, "total_parameters": total, "memory_bytes": planned.peak()}


# ------------------------------------------------------------------------------------------------ lines


def _weights(cfg: RunConfig) -> dict[str, object]:
    """A line where the weights are neither a folder nor in the hub's cache."""
    if cfg.model.weights != "pretrained" or cfg.model.path is not None or cfg.model.hub_id is None:
        return {}
    found = try_to_load_from_cache(cfg.model.hub_id, "config.json", revision=cfg.model.revision)
    return {} if isinstance(found, str) else {"weights": f"not on this machine: {cfg.model.hub_id} is downloaded first"}


def _title(cfg: RunConfig) -> str:
    return f"{cfg.stage.name}: {cfg.model.name}, {cfg.method.name}, {cfg.data.title}"


def _sample(job: tokenized.TokenizedDataset, split: str) -> Any:
    texts = job.dataset.splits[split]["text"]
    return job.prompts(split) if len(texts) <= MEASURED_ROWS else job.renderer.encode(texts[:MEASURED_ROWS].to_list())


def _percentiles(lengths: list[int]) -> str:
    low, middle, high, top = np.percentile(lengths, [5, 50, 95, 100])
    return f"5 % {low:.0f}, median {middle:.0f}, 95 % {high:.0f}, longest {top:.0f}"
