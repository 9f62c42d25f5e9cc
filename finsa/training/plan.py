"""Which micro-batch fits: chosen for a budget of memory before a weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finsa.config import RunConfig, Train
from finsa.data.task import Task
from finsa.errors import ConfigError, Problem
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.modeling import base, hardware, learner, memory
from finsa.modeling.memory import Need


@dataclass(frozen=True)
class Plan:
    """How a run is to fit into memory.

    Args:
        micro_batch_size: rows per forward and process.
        accumulation: micro-batches per optimiser step.
        gradient_checkpointing: whether layers run forward twice, to keep less.
        score_tokens: padded tokens per batch when labels are scored.
        training: what a step needs; None where nothing learns.
        scoring: what scoring needs.
        budget: bytes that were to suffice; None: what the machine has.
    """

    micro_batch_size: int
    accumulation: int
    gradient_checkpointing: bool
    score_tokens: int
    training: Need | None
    scoring: Need
    budget: int | None

    def peak(self) -> int:
        """Bytes of the more demanding of the two."""
        return max(self.scoring.total(), self.training.total() if self.training else 0)

    def of(self, train: Train) -> Train:
        """The schedule with the plan's sizes."""
        names = ("micro_batch_size", "gradient_checkpointing", "score_tokens")
        return train.model_copy(update={name: getattr(self, name) for name in names})

    def facts(self) -> dict[str, Any]:
        """What the run's record keeps."""
        sizes = {name: value for name, value in vars(self).items() if name not in ("training", "scoring")}
        needs = {"training": self.training, "scoring": self.scoring}
        return sizes | {f"{name}_bytes": vars(need) | {"total": need.total()} for name, need in needs.items() if need}


@dataclass(frozen=True)
class _Rows:
    """Lengths that decide: the longest row of training and of scoring, a usual row, positions the LM head reads."""

    longest: int
    usual: int
    projected: int
    reads: int


def make(cfg: RunConfig, job: Task, lengths: Any, world: int) -> Plan:
    """Plan a run.

    Args:
        cfg: with ``train.memory``, the largest micro-batch that fits is chosen, and checkpointing only where nothing
            fits without it; without, the configured micro-batch stays.
        job: its renderer.
        lengths: tokens of its prompts, (n,).
        world: number of processes; each has the budget to itself.

    Raises:
        ConfigError: for a budget that nothing fits into.
    """
    train, rows = cfg.train, _rows(cfg, job, np.asarray(lengths))
    shapes = memory.shapes(cfg, learner.on_meta(cfg, job.renderer))
    per_process = max(1, train.batch_size // world)
    budget = train.memory_bytes()

    def step(micro: int, checkpointing: bool) -> Need | None:
        if cfg.method.learn == "nothing":
            return None
        accumulated = micro < per_process
        return memory.training(shapes, micro, rows.longest, rows.projected, checkpointing, accumulated)

    def score(tokens: int) -> Need:
        return memory.scoring(shapes, max(tokens, rows.longest), rows.usual, rows.reads, step(1, False) is not None)

    checkpointed = [train.gradient_checkpointing] if train.gradient_checkpointing != "auto" else [False, True]
    sizes = [train.micro_batch_size]
    if budget is not None and cfg.method.learn != "nothing":
        sizes = [size for size in range(per_process, 0, -1) if per_process % size == 0]
    ways = [(size, bool(again)) for again in checkpointed for size in sizes]
    limit = hardware.memory() if budget is None else budget
    tokens = train.score_tokens
    while budget is not None and score(tokens).total() > budget and tokens > rows.longest:
        tokens //= 2
    fitting = [way for way in ways if max(_total(step(*way)), score(tokens).total()) <= limit]
    if not fitting and budget is not None:
        least = max(min(_total(step(*way)) for way in ways), score(tokens).total())
        raise ConfigError([Problem("train.memory", _refusal(cfg, budget, least))])
    size, again = fitting[0] if fitting else ways[0]
    return Plan(size, per_process // size, again, tokens, step(size, again), score(tokens), budget)


def _total(need: Need | None) -> int:
    return 0 if need is None else need.total()


def _refusal(cfg: RunConfig, budget: int, least: int) -> str:
    further = "" if cfg.train.gradient_checkpointing is not False else ", train.gradient_checkpointing=auto"
    cheaper = "" if cfg.method.quantization == "nf4" else ", method=qlora"
    return (
        f"{cfg.train.memory} ({budget / 2**30:.2f} GiB) does not suffice: one row at a time needs about "
        f"{least / 2**30:.2f} GiB. Give more, or set a smaller data.max_length{further}{cheaper} or a smaller model"
    )


def _rows(cfg: RunConfig, job: Task, lengths: Any) -> _Rows:
    answer = max(map(len, job.renderer.answers)) + 1
    tree = len(LabelTree.of(scored_answers(job.renderer)[0]).tokens)
    chosen = cfg.method.loss_on == "label"
    longest = int(lengths.max()) + (tree if chosen else answer)
    projected = {"label": 1 + tree, "all": longest}.get(cfg.method.loss_on, answer)
    return _Rows(longest, int(np.median(lengths)), projected, 1 + tree)


def show(plan: Plan, cfg: RunConfig) -> dict[str, str]:
    """The plan in words, for the terminal."""
    stored = "" if cfg.method.quantization == "none" else f", base in {cfg.method.quantization}"
    here = f"of {hardware.memory() / 2**30:.0f} GiB here"
    if plan.budget is not None:
        here = f"of the {plan.budget / 2**30:.2f} GiB given"
    parts = plan.training or plan.scoring
    told = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in vars(parts).items() if value)
    words = {
        "memory": f"about {plan.peak() / 2**30:.2f} GiB ({base.dtype(cfg.model)}{stored}), {here}; GiB: {told}; "
        f"scoring {plan.scoring.total() / 2**30:.2f}"
    }
    if plan.training is not None:
        again = ", gradient checkpointing" if plan.gradient_checkpointing else ""
        words["micro-batch"] = f"{plan.micro_batch_size} rows, accumulation {plan.accumulation}{again}"
    return words
