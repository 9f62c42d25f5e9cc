"""Validate everything and print the plan, without loading weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from finsa import baselines, processes
from finsa.config import RunConfig
from finsa.data import table, task
from finsa.evaluation import tables
from finsa.modeling import base, hardware, learner, quantization, tokenizers
from finsa.runs import Result
from finsa.training import plan, schedule

MEASURED_ROWS = 20_000


def run(cfg: RunConfig) -> Result:
    """Print rows, token lengths, steps, parameters and memory of the run that the same command would start."""
    if cfg.method.baseline is not None:
        return _plan_baseline(cfg)
    quantization.require_library(cfg.method)
    data = table.load(cfg.data)
    data.require(*(("test",) if cfg.method.learn == "nothing" else ("train", "validation", "test")))
    tokenizer, whose, style = tokenizers.own_or_embedded(cfg.model, local_only=True)
    job = task.build(cfg.model_copy(update={"model": style}), data, tokenizer)
    hardware.prepare(cfg.train)
    trainable, total = base.count_parameters(learner.on_meta(cfg, job.renderer))
    sample = _sample(job, "train" if job.table.splits["train"].height else "test")
    lengths = (sample.lengths + max(map(len, job.renderer.answers)) + 1).tolist()
    used = sum(job.class_counts(cfg))
    words = zip(data.labels.names, data.labels.words, strict=True)
    told: dict[str, object] = {
        "rows": _rows(data),
        "labels": ", ".join(f"{name} → {word}" for name, word in words),
        "tokens per row": f"{_percentiles(lengths)} (tokenizer: {whose})",
        "texts cut": f"{sum(cut > 0 for cut in sample.cut):,} of the rows measured, at {cfg.data.max_length} tokens",
        "parameters": f"{trainable:,} trainable of {total:,} total",
    }
    planned = plan.make(cfg, job, sample.lengths, processes.world())
    if cfg.method.learn != "nothing":
        steps = schedule.steps_of(planned.of(cfg.train), used, processes.world())
        told["training"] = f"{used:,} rows, {steps:,} steps of {cfg.train.batch_size} sequences"
    told |= plan.show(planned, cfg)
    tables.show_plan(f"{cfg.stage.name}: {cfg.model.name}, {cfg.method.name}, {cfg.data.name}", told)
    tables.show_ledger(data.ledger, job.truncated())
    metrics: dict[str, Any] = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "memory_bytes": planned.peak(),
    }
    metrics["memory_plan"] = planned.facts()
    return Result("check", None, metrics)


def _plan_baseline(cfg: RunConfig) -> Result:
    data = table.load(cfg.data)
    data.require("train", "validation", "test")
    job = task.Labelled(data)
    texts = job.texts("train")
    learns = baselines.build(cfg, len(data.labels)).plan([texts[row] for row in job.training_order(cfg)])
    told = {"rows": _rows(data), "labels": ", ".join(data.labels.names), "language model": "none", **learns}
    tables.show_plan(f"{cfg.stage.name}: {cfg.method.name}, {cfg.data.name}", told)
    tables.show_ledger(data.ledger, {})
    return Result("check", None, {})


def _rows(data: table.Table) -> str:
    return ", ".join(f"{name} {part.height:,}" for name, part in data.splits.items())


def _sample(job: task.Task, split: str) -> Any:
    texts = job.table.splits[split]["text"]
    return job.prompts(split) if len(texts) <= MEASURED_ROWS else job.renderer.encode(texts[:MEASURED_ROWS].to_list())


def _percentiles(lengths: list[int]) -> str:
    low, middle, high, top = np.percentile(lengths, [5, 50, 95, 100])
    return f"5 % {low:.0f}, median {middle:.0f}, 95 % {high:.0f}, longest {top:.0f}"
