"""Which micro-batch fits: chosen for a budget of memory before a weight is loaded."""

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
from finsa.models.classifier import causal
from finsa.models.memory import Need
from finsa.training import objective, prefix

IntArray = NDArray[np.int64]


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
        limit: these bytes.
    """

    micro_batch_size: int
    accumulation: int
    gradient_checkpointing: bool
    score_tokens: int
    training: Need | None
    scoring: Need
    budget: int | None
    limit: int

    def fits(self) -> bool:
        """Whether the estimate is within the limit."""
        return self.peak() <= self.limit

    def peak(self) -> int:
        """Bytes of the more demanding of the two."""
        return max(self.scoring.total(), self.training.total() if self.training else 0)

    def of(self, train: Train) -> Train:
        """The schedule with the plan's sizes."""
        names = ("micro_batch_size", "gradient_checkpointing", "score_tokens")
        return train.model_copy(update={name: getattr(self, name) for name in names})

    def facts(self) -> dict[str, Any]:
        """What the run's record keeps."""
        sizes = {name: value for name, value in vars(self).items() if name not in ("training", "scoring", "limit")}
        needs = {"training": self.training, "scoring": self.scoring}
        return sizes | {f"{name}_bytes": vars(need) | {"total": need.total()} for name, need in needs.items() if need}


class _Steps:
    """What batches of a run need, each found once: `Need` by its shape."""

    def __init__(self, cfg: RunConfig, job: TokenizedDataset, lengths: IntArray, world: int) -> None:
        self.cfg, self.lengths = cfg, lengths
        self.model = factory.on_meta(cfg, job.renderer)
        self.answers = scored_answers(job.renderer)[0]
        self.tree = LabelTree.of(self.answers)
        self.learns = cfg.method.learn != "nothing"
        self.objective = objective.of(cfg.method, job.renderer, job.class_counts(cfg)) if self.learns else None
        self.rows = max(1, cfg.train.batch_size // world)
        self.answer = max(map(len, job.renderer.answers)) + 1
        self.longest = int(lengths.max()) + (len(self.tree.tokens) if cfg.method.loss_on == "label" else self.answer)
        self._known: dict[tuple[int, int], Need] = {}

    def train(self, b: int, checkpointing: bool) -> Need | None:
        """A step's, of micro-batches of b rows of the longest; None where nothing learns."""
        if self.objective is None:
            return None
        if (found := self._known.get((b, checkpointing))) is not None:
            return found
        projected = self.longest - 1 if self.cfg.method.loss_on == "all" else self.answer
        batch, total = _batch(b, self.longest, projected), self.objective.total
        with _checkpointed(self.model, checkpointing):
            found = memory.training(self.cfg, self.model, lambda: total(self.model, batch), accumulated=b < self.rows)
        self._known[b, checkpointing] = found
        return found

    def score(self, tokens: int) -> Need:
        """Of scoring batches of so many padded tokens: the one of the longest rows, or the one of most rows."""
        most = max(_scored(self.lengths + len(self.tree.tokens), tokens))
        longest = int(self.lengths.max()) + len(self.tree.tokens)
        shapes = {most, (max(1, tokens // longest), longest)}
        return max((self._scored(b, s) for b, s in shapes), key=Need.total)

    def _scored(self, b: int, s: int) -> Need:
        batch = _batch(b, s, 1)

        def run() -> torch.Tensor:
            if self.cfg.method.head == "classifier":
                return objective.classified(self.model, batch)
            tree = max(trees_for(self.model, self.answers, s), key=lambda tree: len(tree.tokens))
            return label_log_probs(self.model, batch["input_ids"], batch["lengths"], tree)

        return memory.scoring(self.cfg, self.model, run, self.learns)


@contextmanager
def _checkpointed(model: Any, wished: bool) -> Iterator[None]:
    """Let a model's layers run forward twice within, where that is wished."""
    net: Any = causal(getattr(model, "backbone", model))
    if wished:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        net.enable_input_require_grads()
    try:
        yield
    finally:
        adapters.stop_checkpointing(net)


def _scored(lengths: IntArray, tokens: int) -> Iterator[tuple[int, int]]:
    """Rows and padded length of the batches that scoring makes of rows of such lengths; see `scoring.batches`."""
    ordered = np.sort(lengths)[::-1]
    start = 0
    while start < len(ordered):
        b = max(1, tokens // int(ordered[start]))
        yield min(b, len(ordered) - start), int(ordered[start])
        start += b


def _batch(b: int, s: int, projected: int) -> dict[str, torch.Tensor]:
    """A batch of the collator's, without contents."""
    kind: dict[str, Any] = {"dtype": torch.long, "device": "meta"}
    ids, rows = torch.empty(b, s, **kind), torch.empty(b, **kind)
    read, spans = torch.empty(b, projected, **kind), torch.empty(b, 2, **kind)
    return {"input_ids": ids, "labels": ids, "lengths": rows, "read": read, "targets": rows, "text_span": spans}


def make(cfg: RunConfig, job: TokenizedDataset, lengths: Any, world: int) -> Plan:
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
    train, steps = cfg.train, _Steps(cfg, job, np.asarray(lengths), world)
    budget, tokens = train.memory_bytes(), train.score_tokens
    limit = hardware.memory() if budget is None else budget
    scored = steps.score(tokens)
    while budget is not None and scored.total() > budget and tokens > steps.longest:
        tokens //= 2
        scored = steps.score(tokens)
    sizes = [train.micro_batch_size]
    if budget is not None and steps.learns:
        sizes = [size for size in range(1, steps.rows + 1) if steps.rows % size == 0]
    checkpointed = [train.gradient_checkpointing] if train.gradient_checkpointing != "auto" else [False, True]
    for again in map(bool, checkpointed if scored.total() <= limit else ()):
        # a whole step at once needs no gradients of earlier micro-batches, so it may fit where a smaller one does not
        fitting = [sizes[-1]] if _total(steps.train(sizes[-1], again)) <= limit else sizes[:-1]
        fitting = fitting[: bisect_right(fitting, limit, key=lambda size: _total(steps.train(size, again)))]
        if fitting:
            return _plan(fitting[-1], again, tokens, scored, steps, budget, limit)
    if budget is not None:
        least = max(min(_total(steps.train(1, bool(again))) for again in checkpointed), scored.total())
        raise ConfigError([Problem("train.memory", _refusal(cfg, budget, least))])
    return _plan(sizes[0], bool(checkpointed[0]), tokens, scored, steps, budget, limit)


def _plan(size: int, again: bool, tokens: int, scored: Need, steps: _Steps, budget: int | None, limit: int) -> Plan:
    return Plan(size, steps.rows // size, again, tokens, steps.train(size, again), scored, budget, limit)


def of_blocks(cfg: RunConfig, model: Any, length: int) -> Plan:
    """Plan pre-training with the configured micro-batch.

    Args:
        cfg: its schedule.
        model: on the meta device, as `learner.on_meta` builds it.
        length: tokens of a block.
    """
    train, again = cfg.train, cfg.train.gradient_checkpointing is True
    model = model.float() if cfg.method.adapter is None else model  # as stage=pretrain learns it
    batch, total = _batch(train.micro_batch_size, length, length - 1), objective.tokens().total
    accumulated = train.micro_batch_size < train.batch_size
    with _checkpointed(model, again):
        need = memory.training(cfg, model, lambda: total(model, batch), accumulated)
    micro, limit = train.micro_batch_size, hardware.memory()
    return Plan(micro, train.batch_size // micro, again, train.score_tokens, need, need, None, limit)


def _total(need: Need | None) -> int:
    return 0 if need is None else need.total()


def _refusal(cfg: RunConfig, budget: int, least: int) -> str:
    further = "" if cfg.train.gradient_checkpointing is not False else ", train.gradient_checkpointing=auto"
    cheaper = "" if cfg.method.quantization == "nf4" else ", method=qlora"
    return (
        f"{cfg.train.memory} ({budget / 2**30:.2f} GiB) does not suffice: one row at a time needs about "
        f"{least / 2**30:.2f} GiB. Give more, or set a smaller data.max_length{further}{cheaper} or a smaller model"
    )


MOST_SETTINGS = 2  # that a verdict names: each takes a plan


def verdict(plan: Plan, cfg: RunConfig, job: TokenizedDataset, lengths: Any, world: int) -> str:
    """Say that a plan does not fit, and which settings would; empty where it fits.

    Args:
        plan: of this configuration, made with the same arguments.
    """
    if plan.fits():
        return ""
    found, does = [], list[str]()
    for words, changed in _smaller(cfg):
        smaller = make(changed, job, lengths, world)
        found.append((words, smaller))
        if smaller.fits():
            does.append(f"{words}: {smaller.peak() / 2**30:.2f} GiB")
        if len(does) == MOST_SETTINGS:
            break
    text = f"does not fit into the {plan.limit / 2**30:.2f} GiB here"
    if does:
        return f"{text}; these settings would: {'; '.join(does)}"
    words, least = min(found, key=lambda each: each[1].peak(), default=("as configured", plan))
    least_of_all = f"{words}: {least.peak() / 2**30:.2f} GiB"
    return f"{text}, and no setting would make it fit (the least is {least_of_all}); choose a smaller model"


def _smaller(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Configurations that need less memory, as what to add to the command; those that change least come first."""
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


# What training and scoring reach of the rate of matrix products (benchmarks/results/training_step.json), roughly.
SHARES = (0.6, 0.3)


def seconds(
    cfg: RunConfig, job: TokenizedDataset, lengths: Any, steps: int, checkpointing: bool, world: int
) -> tuple[float, float]:
    """Estimate how long a run takes, from the rate of matrix products that is measured here: at least and at most.

    Args:
        cfg: as for `make`.
        job: as for `make`.
        lengths: tokens of prompts, (n,), for all rows.
        steps: of the optimiser; 0 where nothing learns.
        checkpointing: whether layers run forward twice.
        world: number of processes.
    """
    model, lengths = factory.on_meta(cfg, job.renderer), np.asarray(lengths, np.float64)
    answer = max(map(len, job.renderer.answers)) + 1
    tokens, pairs = lengths.mean() + answer, ((lengths + answer) ** 2).mean()
    rows, work = steps * cfg.train.batch_size, 0.0
    trained, once = _shared_head(cfg, job, model, tokens, int(lengths.max()) + answer)
    if steps:
        read = tokens if cfg.method.loss_on == "all" else answer
        work += rows * flops.of(model, checkpointing).total(tokens - trained, pairs, read, 1)
    splits = {split: job.dataset.splits[split].height for split in ("validation", "test")}
    held = min(splits["validation"], cfg.train.validation_rows or splits["validation"])
    validations = steps // cfg.train.validate_every if cfg.train.validate_every else cfg.train.epochs
    scored = validations * held + 2 * splits["test"] if steps else splits["test"]  # the base model is scored too
    work += scored * flops.of(model.requires_grad_(False)).total(tokens - once, pairs, answer, 1)
    rate = hardware.matmul_rate(base.dtype(cfg.model)) * world
    return work / rate / SHARES[0], work / rate / SHARES[1]


def _shared_head(cfg: RunConfig, job: TokenizedDataset, model: Any, tokens: float, longest: int) -> tuple[float, float]:
    """Tokens per row that are not forwarded again, in training and in scoring, because all prompts begin alike."""
    head = len(job.renderer.prefix) - 1
    if head < prefix.PREFIX_TOKENS or prefix.obstacle(model, cfg.train, longest) is not None:
        return 0.0, 0.0
    saved = head * (1 - 1 / min(cfg.train.micro_batch_size, cfg.train.batch_size))
    pays = cfg.train.shared_prefix is True or (
        cfg.train.shared_prefix == "auto" and saved / tokens >= prefix.PREFIX_SAVED
    )
    return saved * pays, head * (head >= PREFIX_SHARE * tokens)


def show_seconds(cfg: RunConfig, least: float, most: float) -> str:
    """A duration in words."""
    rate = hardware.matmul_rate(base.dtype(cfg.model)) / 1e9
    low, high = (_rounded(value) for value in (least, most))
    return (
        f"{low if low == high else f'{low} to {high}'}, scoring included, at {SHARES[1]:.0%} to {SHARES[0]:.0%} of the "
        f"{rate:,.0f} GFLOP/s that matrix products reach here"
    )


def _rounded(duration: float) -> str:
    if duration < 90:
        return f"{max(1, round(duration))} s"
    return f"{duration / 60:.0f} min" if duration < 5400 else f"{duration / 3600:,.1f} h"


def show(plan: Plan, cfg: RunConfig, judged: str = "") -> dict[str, str]:
    """The plan in words, for the terminal.

    Args:
        plan: of this configuration.
        cfg: its names.
        judged: what `verdict` says.
    """
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
    if judged:
        words["verdict"] = judged
    if plan.training is not None:
        again = ", gradient checkpointing" if plan.gradient_checkpointing else ""
        words["micro-batch"] = f"{plan.micro_batch_size} rows, accumulation {plan.accumulation}{again}"
    return words
