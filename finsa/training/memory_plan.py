"""The memory plan: the micro-batch that fits and the duration of a run, estimated before loading weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finsa.config import RunConfig, Train
from finsa.data.tokenized import TokenizedDataset
from finsa.errors import ConfigError, Problem
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.inference.scoring import PREFIX_SHARE, label_log_probs, trees_for
from finsa.models import adapters, base, factory, flops, hardware, memory
from finsa.models.classifier import unwrap_peft
from finsa.models.memory import PeakMemory
from finsa.training import layout, objective

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Sizes of a run and the estimated memory.

    Args:
        micro_batch_size: rows per forward pass and process.
        accumulation: micro-batches per optimizer step.
        gradient_checkpointing: whether activations are recomputed in backward to save memory.
        score_tokens: padded tokens per scoring batch.
        training: memory of a training step; None if nothing is trained.
        scoring: memory of scoring.
        budget: configured bytes; None: no budget was given.
        limit: the budget, or the memory of the machine in bytes.
    """

    micro_batch_size: int
    accumulation: int
    gradient_checkpointing: bool
    score_tokens: int
    training: PeakMemory | None
    scoring: PeakMemory
    budget: int | None
    limit: int

    def fits(self) -> bool:
        """Whether the estimate is within the limit."""
        return self.peak() <= self.limit

    def peak(self) -> int:
        """Bytes of training or scoring, whichever is larger."""
        return max(self.scoring.total(), self.training.total() if self.training else 0)

    def apply(self, train: Train) -> Train:
        """The training settings with the plan's sizes."""
        names = ("micro_batch_size", "gradient_checkpointing", "score_tokens")
        return train.model_copy(update={name: getattr(self, name) for name in names})

    def facts(self) -> dict[str, Any]:
        """The entry of ``run.json``."""
        sizes = {name: value for name, value in vars(self).items() if name not in ("training", "scoring", "limit")}
        needs = {"training": self.training, "scoring": self.scoring}
        return sizes | {f"{name}_bytes": vars(need) | {"total": need.total()} for name, need in needs.items() if need}


class _Estimates:
    """Estimates of the memory of batches; each shape is estimated once."""

    def __init__(self, cfg: RunConfig, data: TokenizedDataset, lengths: IntArray, world: int) -> None:
        thought = cfg.model.thought.max_tokens + len(data.renderer.thought_end) if cfg.model.think == "open" else 0
        self.cfg, self.lengths = cfg, lengths + thought  # a thought has at most this length
        self.model = factory.on_meta(cfg, data.renderer)
        self.answers = scored_answers(data.renderer)[0]
        self.tree = LabelTree.of(self.answers)
        self.values = data.dataset.labels.outputs  # of a row, if the loss reads them
        self.learns = cfg.method.learn != "nothing"
        counts, costs = data.class_counts(cfg), cfg.evaluation.costs
        self.objective = objective.build(cfg.method, data.renderer, counts, costs) if self.learns else None
        self.rows = max(1, cfg.train.batch_size // world)
        self.answer = max(map(len, data.renderer.answers)) + 1 + thought
        self.longest = int(lengths.max()) + (len(self.tree.tokens) if cfg.method.loss_on == "label" else self.answer)
        self._steps: dict[tuple[int, bool], PeakMemory] = {}

    def train(self, b: int, checkpointing: bool) -> PeakMemory | None:
        """Memory of a step with micro-batches of b rows of maximal length; None if nothing is trained."""
        if self.objective is None:
            return None
        if (b, checkpointing) in self._steps:
            return self._steps[b, checkpointing]
        projected = self.longest - 1 if self.cfg.method.loss_on == "all" else self.answer
        batch, total = _batch(b, self.longest, projected, self.values), self.objective.total
        with _checkpointed(self.model, checkpointing):
            need = memory.estimate_training(
                self.cfg, self.model, lambda: total(self.model, batch), accumulated=b < self.rows
            )
        self._steps[b, checkpointing] = need
        return need

    def score(self, tokens: int) -> PeakMemory:
        """Memory of scoring with `tokens` padded tokens per batch: with the longest rows, or the most rows."""
        most = max(_scored(self.lengths + len(self.tree.tokens), tokens))
        longest = int(self.lengths.max()) + len(self.tree.tokens)
        shapes = {most, (max(1, tokens // longest), longest)}
        return max((self._scored(b, s) for b, s in shapes), key=PeakMemory.total)

    def _scored(self, b: int, s: int) -> PeakMemory:
        batch = _batch(b, s, 1)

        def run() -> torch.Tensor:
            if self.cfg.method.head == "classifier":
                return objective.classifier_logits(self.model, batch)
            tree = max(trees_for(self.model, self.answers, s), key=lambda tree: len(tree.tokens))
            return label_log_probs(self.model, batch["input_ids"], batch["lengths"], tree)

        return memory.estimate_scoring(self.cfg, self.model, run, self.learns)


@contextmanager
def _checkpointed(model: Any, enabled: bool) -> Iterator[None]:
    """Enable gradient checkpointing temporarily, if it is to be enabled."""
    net: Any = unwrap_peft(getattr(model, "backbone", model))
    if enabled:
        net.activation_checkpointing_enable({"use_reentrant": False})
        net.enable_input_require_grads()
    try:
        yield
    finally:
        adapters.stop_checkpointing(net)


def _scored(lengths: IntArray, tokens: int) -> Iterator[tuple[int, int]]:
    """Number of rows and padded length of each scoring batch; see `finsa.models.batches`."""
    ordered = np.sort(lengths)[::-1]
    start = 0
    while start < len(ordered):
        b = max(1, tokens // int(ordered[start]))
        yield min(b, len(ordered) - start), int(ordered[start])
        start += b


def _batch(b: int, s: int, projected: int, width: int = 1) -> dict[str, torch.Tensor]:
    """A batch as built by the collator, on the meta device."""
    kind: dict[str, Any] = {"dtype": torch.long, "device": "meta"}
    ids, rows = torch.empty(b, s, **kind), torch.empty(b, **kind)
    read, spans = torch.empty(b, projected, **kind), torch.empty(b, 2, **kind)
    values = torch.empty(b, width, device="meta")
    batch = {"input_ids": ids, "labels": ids, "lengths": rows, "read": read, "targets": rows, "text_span": spans}
    return {**batch, "values": values, "rejected": rows, "reference": values}


def make(cfg: RunConfig, data: TokenizedDataset, lengths: Any, world: int) -> Plan:
    """Plan a run.

    Args:
        cfg: with ``train.memory``, the largest micro-batch that fits is chosen, and checkpointing only if nothing
            fits without it; without, the configured micro-batch stays.
        data: its renderer.
        lengths: tokens of its prompts, (n,).
        world: number of processes; each has the budget to itself.

    Raises:
        ConfigError: for a budget that nothing fits into.
    """
    train, estimates = cfg.train, _Estimates(cfg, data, np.asarray(lengths), world)
    budget, tokens = train.memory_bytes(), train.score_tokens
    limit = hardware.total_memory() if budget is None else budget
    scoring = estimates.score(tokens)
    while budget is not None and scoring.total() > budget and tokens > estimates.longest:
        tokens //= 2
        scoring = estimates.score(tokens)

    def plan(size: int, checkpointing: bool) -> Plan:
        need = estimates.train(size, checkpointing)
        return Plan(size, estimates.rows // size, checkpointing, tokens, need, scoring, budget, limit)

    def step_bytes(size: int, checkpointing: bool) -> int:
        need = estimates.train(size, checkpointing)
        return 0 if need is None else need.total()

    sizes = [train.micro_batch_size]
    if budget is not None and estimates.learns:
        sizes = [size for size in range(1, estimates.rows + 1) if estimates.rows % size == 0]
    ways = [False, True] if train.gradient_checkpointing == "auto" else [train.gradient_checkpointing]
    for checkpointing in ways if scoring.total() <= limit else ():
        # A step in one micro-batch needs no gradients of earlier ones, so it may fit although a smaller one does not.
        fitting = [sizes[-1]] if step_bytes(sizes[-1], checkpointing) <= limit else sizes[:-1]
        fitting = fitting[: bisect_right(fitting, limit, key=lambda size: step_bytes(size, checkpointing))]
        if fitting:
            return plan(fitting[-1], checkpointing)
    if budget is None:
        return plan(sizes[0], ways[0])
    least = max(min(step_bytes(1, checkpointing) for checkpointing in ways), scoring.total())
    further = "" if train.gradient_checkpointing is not False else ", train.gradient_checkpointing=auto"
    cheaper = "" if cfg.method.quantization == "nf4" else ", method=qlora"
    text = (
        f"{train.memory} ({budget / 2**30:.2f} GiB) does not suffice: one row at a time needs about "
        f"{least / 2**30:.2f} GiB. Give more, or set a smaller data.max_length{further}{cheaper} or a smaller model"
    )
    raise ConfigError([Problem("train.memory", text)])


def of_blocks(cfg: RunConfig, model: Any, length: int) -> Plan:
    """Plan pre-training with the configured micro-batch.

    Args:
        cfg: its schedule.
        model: on the meta device, from `factory.on_meta`.
        length: tokens of a block.
    """
    train, micro, checkpointing = cfg.train, cfg.train.micro_batch_size, cfg.train.gradient_checkpointing is True
    model = model.float() if cfg.method.adapter is None else model  # as stage=pretrain trains it
    batch, total = _batch(micro, length, length - 1), objective.tokens().total
    with _checkpointed(model, checkpointing):
        need = memory.estimate_training(cfg, model, lambda: total(model, batch), accumulated=micro < train.batch_size)
    accumulation, limit = train.batch_size // micro, hardware.total_memory()
    return Plan(micro, accumulation, checkpointing, train.score_tokens, need, need, None, limit)


MOST_SETTINGS = 2  # maximum number of suggested settings, because each requires a plan


def verdict(plan: Plan, cfg: RunConfig, data: TokenizedDataset, lengths: Any, world: int) -> str:
    """A sentence that a plan does not fit, and which settings would; empty if it fits.

    Args:
        plan: of this configuration, from `make` with the same arguments.
    """
    if plan.fits():
        return ""
    tried, fitting = [], list[str]()
    for words, changed in _smaller(cfg):
        smaller = make(changed, data, lengths, world)
        tried.append((words, smaller))
        if smaller.fits():
            fitting.append(f"{words}: {smaller.peak() / 2**30:.2f} GiB")
        if len(fitting) == MOST_SETTINGS:
            break
    text = f"does not fit into the {plan.limit / 2**30:.2f} GiB here"
    if fitting:
        return f"{text}; these settings would: {'; '.join(fitting)}"
    words, least = min(tried, key=lambda each: each[1].peak(), default=("as configured", plan))
    least_of_all = f"{words}: {least.peak() / 2**30:.2f} GiB"
    return f"{text}, and no setting would make it fit (the least is {least_of_all}); choose a smaller model"


def _smaller(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Configurations that need less memory, each with its overrides; those with the smallest changes come first."""
    one = {"micro_batch_size": 1, "gradient_checkpointing": True, "score_tokens": min(2048, cfg.train.score_tokens)}
    if cfg.method.learn == "nothing":
        del one["micro_batch_size"], one["gradient_checkpointing"]
    fewer = cfg.model_copy(update={"train": cfg.train.model_copy(update=one)})
    words = " ".join(f"train.{key}={str(value).lower()}" for key, value in one.items())
    weights = [("", cfg.model, cfg.method)]
    if base.dtype(cfg.model).itemsize == 4:
        weights.append(("model.dtype=bfloat16", cfg.model.model_copy(update={"dtype": "bfloat16"}), cfg.method))
    if cfg.method.quantization == "none" and cfg.method.learn != "all":
        weights.append(("method.quantization=nf4", cfg.model, cfg.method.model_copy(update={"quantization": "nf4"})))
    for batches, way in (("", cfg), (words, fewer)):
        for name, model, method in weights:
            if batches or name:
                yield " ".join(filter(None, (name, batches))), way.model_copy(update={"model": model, "method": method})


# Share of the matmul rate that a run reaches, at most and at least (benchmarks/results/training_step.json).
SHARES = (0.6, 0.3)


def seconds(
    cfg: RunConfig, data: TokenizedDataset, lengths: Any, steps: int, checkpointing: bool, world: int
) -> tuple[float, float]:
    """Estimate the minimum and maximum duration of a run in seconds, from the measured matmul rate.

    Args:
        cfg: as for `make`.
        data: as for `make`.
        lengths: tokens of prompts, (n,), for all rows.
        steps: optimizer steps; 0 if nothing is trained.
        checkpointing: whether gradient checkpointing is used.
        world: number of processes.
    """
    model, lengths = factory.on_meta(cfg, data.renderer), np.asarray(lengths, np.float64)
    answer = max(map(len, data.renderer.answers)) + 1
    tokens, pairs = lengths.mean() + answer, ((lengths + answer) ** 2).mean()
    rows, work = steps * cfg.train.batch_size, 0.0
    saved_training, saved_scoring = _shared_prefix(cfg, data, model, tokens, int(lengths.max()) + answer)
    if steps:
        read = tokens if cfg.method.loss_on == "all" else answer
        work += rows * flops.estimate(model, checkpointing).total(tokens - saved_training, pairs, read, 1)
    splits = {split: data.dataset.splits[split].height for split in ("validation", "test")}
    held = min(splits["validation"], cfg.train.validation_rows or splits["validation"])
    validations = steps // cfg.train.validate_every if cfg.train.validate_every else cfg.train.epochs
    scored = validations * held + 2 * splits["test"] if steps else splits["test"]  # the base model is scored too
    work += scored * flops.estimate(model.requires_grad_(False)).total(tokens - saved_scoring, pairs, answer, 1)
    rate = hardware.matmul_rate(base.dtype(cfg.model)) * world
    return work / rate / SHARES[0], work / rate / SHARES[1]


def _shared_prefix(
    cfg: RunConfig, data: TokenizedDataset, model: Any, tokens: float, longest: int
) -> tuple[float, float]:
    """Tokens per row that a shared prefix saves, in training and in scoring."""
    p = len(data.renderer.prefix) - 1
    if p < layout.PREFIX_TOKENS or layout.prefix_obstacle(model, cfg.train, longest) is not None:
        return 0.0, 0.0
    saved = p * (1 - 1 / min(cfg.train.micro_batch_size, cfg.train.batch_size))
    pays = cfg.train.shared_prefix is True or (
        cfg.train.shared_prefix == "auto" and saved / tokens >= layout.PREFIX_SAVED
    )
    return saved * pays, p * (p >= PREFIX_SHARE * tokens)


def show_seconds(cfg: RunConfig, least: float, most: float) -> str:
    """Format the estimated duration for the terminal."""
    rate = hardware.matmul_rate(base.dtype(cfg.model)) / 1e9
    low, high = (_rounded(value) for value in (least, most))
    return (
        f"{low if low == high else f'{low} to {high}'}, scoring included, at {SHARES[1]:.0%} to {SHARES[0]:.0%} of the "
        f"matmul rate of this machine ({rate:,.0f} GFLOP/s)"
    )


def _rounded(duration: float) -> str:
    if duration < 90:
        return f"{max(1, round(duration))} s"
    return f"{duration / 60:.0f} min" if duration < 5400 else f"{duration / 3600:,.1f} h"


def show(plan: Plan, cfg: RunConfig, verdict: str = "") -> dict[str, str]:
    """Format a plan as lines for the terminal.

    Args:
        plan: of this configuration.
        cfg: the configuration.
        verdict: from `verdict`.
    """
    stored = "" if cfg.method.quantization == "none" else f", base in {cfg.method.quantization}"
    here = f"of {hardware.total_memory() / 2**30:.0f} GiB here"
    if plan.budget is not None:
        here = f"of the {plan.budget / 2**30:.2f} GiB given"
    parts = plan.training or plan.scoring
    split = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in vars(parts).items() if value)
    lines = {
        "memory": f"about {plan.peak() / 2**30:.2f} GiB ({base.dtype(cfg.model)}{stored}), {here}; GiB: {split}; "
        f"scoring {plan.scoring.total() / 2**30:.2f}"
    }
    if verdict:
        lines["verdict"] = verdict
    if plan.training is not None:
        again = ", gradient checkpointing" if plan.gradient_checkpointing else ""
        lines["micro-batch"] = f"{plan.micro_batch_size} rows, accumulation {plan.accumulation}{again}"
    return lines
