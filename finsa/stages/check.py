"""Validate everything and print the plan, without loading weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from finsa.config import RunConfig
from finsa.data import table, task
from finsa.evaluation import tables
from finsa.modeling import adapters, base, hardware, memory, tokenizers
from finsa.runs import Result
from finsa.training import fit, schedule

MEASURED_ROWS = 20_000


def run(cfg: RunConfig) -> Result:
    """Print rows, token lengths, steps, parameters and memory of the run that the same command would start."""
    data = table.load(cfg.data)
    data.require(*(("test",) if cfg.method.learn == "nothing" else ("train", "validation", "test")))
    tokenizer, whose, style = tokenizers.own_or_embedded(cfg.model, local_only=True)
    job = task.build(cfg.model_copy(update={"model": style}), data, tokenizer)
    hardware.prepare(cfg.train)
    model: Any = base.on_meta(cfg.model)
    if cfg.method.adapter is not None:
        model = adapters.attach(model, _native(cfg), cfg.method.adapter, cfg.seed)
    elif cfg.method.learn == "nothing":
        model.requires_grad_(False)
    trainable, total = base.count_parameters(model)
    lengths = _lengths(job)
    used = len(job.training_order(cfg))
    plan: dict[str, object] = {
        "rows": ", ".join(f"{name} {part.height:,}" for name, part in data.splits.items()),
        "labels": ", ".join(
            f"{name} → {word}" for name, word in zip(data.labels.names, data.labels.words, strict=True)
        ),
        "tokens per row": f"{_percentiles(lengths)} (tokenizer: {whose})",
        "texts cut": f"{sum(cut > 0 for cut in _cuts(job)):,} of the rows measured, at {cfg.data.max_length} tokens",
        "parameters": f"{trainable:,} trainable of {total:,} total",
    }
    if cfg.method.learn != "nothing":
        steps = schedule.steps_of(cfg.train, used, fit.processes())
        plan["training"] = f"{used:,} rows, {steps:,} steps of {cfg.train.batch_size} sequences"
    need = memory.estimate(cfg, trainable, total, float(np.mean(np.sort(lengths)[-cfg.train.micro_batch_size :])))
    plan["memory"] = (
        f"about {need / 2**30:.2f} GiB ({base.dtype(cfg.model)}), of {memory.available() / 2**30:.0f} GiB here"
    )
    tables.show_plan(f"{cfg.stage.name}: {cfg.model.name}, {cfg.method.name}, {cfg.data.name}", plan)
    tables.show_ledger(data.ledger, job.truncated())
    metrics = {"trainable_parameters": trainable, "total_parameters": total, "memory_bytes": need}
    return Result("check", None, metrics)


def _native(cfg: RunConfig) -> Any:
    return cfg.model.model_copy(update={"weights": "random"})


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
