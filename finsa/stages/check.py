"""Validate everything and print the plan, without loading weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from finsa import baselines, processes
from finsa.config import RunConfig
from finsa.data import table, task
from finsa.evaluation import tables
from finsa.modeling import base, hardware, learner, memory, quantization, tokenizers
from finsa.runs import Result
from finsa.training import schedule

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
    model = learner.build(_native(cfg), base.on_meta(cfg.model).requires_grad_(False), job.renderer)
    trainable, total = base.count_parameters(model)
    lengths = _lengths(job)
    used = sum(job.class_counts(cfg))
    words = zip(data.labels.names, data.labels.words, strict=True)
    plan: dict[str, object] = {
        "rows": _rows(data),
        "labels": ", ".join(f"{name} → {word}" for name, word in words),
        "tokens per row": f"{_percentiles(lengths)} (tokenizer: {whose})",
        "texts cut": f"{sum(cut > 0 for cut in _cuts(job)):,} of the rows measured, at {cfg.data.max_length} tokens",
        "parameters": f"{trainable:,} trainable of {total:,} total",
    }
    if cfg.method.learn != "nothing":
        steps = schedule.steps_of(cfg.train, used, processes.world())
        plan["training"] = f"{used:,} rows, {steps:,} steps of {cfg.train.batch_size} sequences"
    need = memory.estimate(cfg, trainable, total, float(np.mean(np.sort(lengths)[-cfg.train.micro_batch_size :])))
    stored = "" if cfg.method.quantization == "none" else f", base in {cfg.method.quantization}"
    plan["memory"] = (
        f"about {need / 2**30:.2f} GiB ({base.dtype(cfg.model)}{stored}), of {memory.available() / 2**30:.0f} GiB here"
    )
    tables.show_plan(f"{cfg.stage.name}: {cfg.model.name}, {cfg.method.name}, {cfg.data.name}", plan)
    tables.show_ledger(data.ledger, job.truncated())
    metrics = {"trainable_parameters": trainable, "total_parameters": total, "memory_bytes": need}
    return Result("check", None, metrics)


def _plan_baseline(cfg: RunConfig) -> Result:
    data = table.load(cfg.data)
    data.require("train", "validation", "test")
    job = task.Labelled(data)
    texts = job.texts("train")
    learns = baselines.build(cfg, len(data.labels)).plan([texts[row] for row in job.training_order(cfg)])
    plan = {"rows": _rows(data), "labels": ", ".join(data.labels.names), "language model": "none", **learns}
    tables.show_plan(f"{cfg.stage.name}: {cfg.method.name}, {cfg.data.name}", plan)
    tables.show_ledger(data.ledger, {})
    return Result("check", None, {})


def _rows(data: table.Table) -> str:
    return ", ".join(f"{name} {part.height:,}" for name, part in data.splits.items())


def _native(cfg: RunConfig) -> RunConfig:
    """The run on shapes: module names of the architecture's own, and no weights to start a head from."""
    model = cfg.model.model_copy(update={"weights": "random"})
    method = cfg.method.model_copy(update={"classifier_init": "random"})
    return cfg.model_copy(update={"model": model, "method": method})


def _lengths(job: task.Task) -> list[int]:
    split = "train" if job.table.splits["train"].height else "test"
    answer = max(map(len, job.renderer.answers)) + 1
    return (_sample(job, split).lengths + answer).tolist()


def _cuts(job: task.Task) -> list[int]:
    return _sample(job, "train" if job.table.splits["train"].height else "test").cut


def _sample(job: task.Task, split: str) -> Any:
    texts = job.table.splits[split]["text"]
    return job.prompts(split) if len(texts) <= MEASURED_ROWS else job.renderer.encode(texts[:MEASURED_ROWS].to_list())


def _percentiles(lengths: list[int]) -> str:
    low, middle, high, top = np.percentile(lengths, [5, 50, 95, 100])
    return f"5 % {low:.0f}, median {middle:.0f}, 95 % {high:.0f}, longest {top:.0f}"
