"""The layout of micro-batches: rows are padded or packed, and a prefix that all rows share may be forwarded once.

Loss and gradients equal those of separate rows in every layout. Only dropout differs: a shared prefix has one mask per
micro-batch instead of one per row. Each row still sees a mask of the same distribution, so the expected gradient is
the same.

Whether packing is worthwhile is decided by counting FLOPs, so that the decision is the same on every
machine. Packing saves the padding; attention is computed row by row (`finsa/models/attention.py`).

Letters: b rows of a batch, p tokens of the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers.trainer_pt_utils import get_length_grouped_indices

from finsa.config import Train
from finsa.data.rows import Row
from finsa.errors import ConfigError, Problem
from finsa.models import attention, flops
from finsa.models.classifier import Classifier, unwrap_peft
from finsa.models.moe.mixture import Mixture
from finsa.runs import processes
from finsa.training.batches import Batch, StepSplitter

# Thresholds of `auto` for a shared prefix: p, and the share of tokens saved (measured, docs/performance.md).
PREFIX_TOKENS, PREFIX_SAVED = 16, 0.25
# Thresholds of `auto` for packing: sampled steps, and FLOPs of padding over those of packing (docs/performance.md).
SAMPLED_STEPS, PACKING_PAYS = 64, 1.1

# ------------------------------------------------------------------------------------------------ shared prefix


@dataclass(frozen=True)
class Prefix:
    """The decision whether a shared prefix is forwarded once.

    Args:
        tokens: number of tokens that all training rows begin with.
        saved: share of all tokens that is saved.
        used: number of tokens that are forwarded once per micro-batch; 0: rows are forwarded completely.
        reason: for the decision.
    """

    tokens: int
    saved: float
    used: int
    reason: str


class CommonPrefix:
    """The tokens that all rows begin with, determined chunk by chunk.

    It ends one token early, so that no row is empty and the last token predicts the same for all rows. A text that a
    classification head or a router reads is not part of it.
    """

    def __init__(self) -> None:
        self.rows, self.total, self.longest = 0, 0, 0  # number of rows, their tokens, tokens of the longest
        self._bounds: dict[str, tuple[list[int], list[int]]] = {}
        self._text: int | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """Add further rows."""
        for field in ("input_ids", "labels"):
            lists = [row[field] for row in rows]  # type: ignore[literal-required]
            lists += self._bounds.get(field, ())
            self._bounds[field] = min(lists), max(lists)
        self.rows, self.total = self.rows + len(rows), self.total + sum(len(row["input_ids"]) for row in rows)
        self.longest = max(self.longest, *(len(row["input_ids"]) for row in rows))
        starts = [row["text_span"][0] for row in rows if "text_span" in row]
        if starts:
            self._text = min(starts) if self._text is None else min(self._text, *starts)

    @property
    def tokens(self) -> int:
        """Number of tokens that all rows begin with."""
        # In lexicographic order, all lists share what the first and the last one share.
        shared = min(_shared_length(*bounds) for bounds in self._bounds.values()) - 1
        return max(0, shared if self._text is None else min(shared, self._text))


def _shared_length(first: Sequence[int], last: Sequence[int]) -> int:
    pairs = zip(first, last, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def plan_prefix(common: CommonPrefix, model: torch.nn.Module, train: Train, suffix: int = 0) -> Prefix:
    """Decide whether the prefix of the training rows is forwarded once.

    Args:
        common: computed from all of them.
        model: the model to train.
        train: its ``shared_prefix`` is auto, true or false.
        suffix: number of tokens that a batch appends to each row.
    """
    tokens, mean = common.tokens, common.total / common.rows
    saved = tokens / mean * max(0.0, 1 - 1 / min(train.micro_batch_size, train.batch_size))
    setting = f"train.shared_prefix={str(train.shared_prefix).lower()}"
    obstacle = setting if train.shared_prefix is False else prefix_obstacle(model, train, common.longest + suffix)
    if obstacle is None and train.shared_prefix == "auto" and (tokens < PREFIX_TOKENS or saved < PREFIX_SAVED):
        obstacle = f"{setting}: worthwhile from {PREFIX_TOKENS} tokens and {PREFIX_SAVED:.0%} saved"
    if obstacle is None and tokens == 0:
        obstacle = "the rows share no tokens"
    return Prefix(tokens, round(saved, 4), 0 if obstacle else tokens, obstacle or setting)


def prefix_obstacle(model: torch.nn.Module, train: Train, longest: int) -> str | None:
    """Why rows of at most `longest` tokens cannot share a prefix without changing the result; None if they can."""
    if isinstance(model, Mixture):
        return "in a mixture the text selects the experts, for the prefix too"
    if train.packing is True and not attends_row_by_row(model, train):
        return "flash-attention packs rows without a prefix"
    if train.gradient_checkpointing is True:
        return "gradient checkpointing stores no keys and values"
    if train.strategy in ("fsdp", "deepspeed"):
        return "FSDP and DeepSpeed gather weights per forward pass of the whole model"
    if attention.is_remote(model):
        return "the model's code is remote"
    return None if attention.full_attention(model, longest) else "the model has layers without full attention"


def forward_prefix(model: torch.nn.Module, batch: Batch) -> tuple[Any, torch.Tensor | float]:
    """Run the forward pass of the prefix of a padded batch, with gradients.

    Args:
        model: a causal language model or a classifier, wrapped by PEFT or DDP or not.
        batch: from the collator.

    Returns:
        Keys and values, expanded to b rows without copying, and the summed loss of the prefix of one row; None and
        0 for a batch without prefix.
    """
    if "prefix" not in batch:
        return None, 0.0
    inner: Any = getattr(model, "module", model)
    net = unwrap_peft(inner.backbone if isinstance(inner, Classifier) else inner)
    ids, labels = batch["prefix"][None], batch.get("prefix_labels")
    loss: torch.Tensor | float = 0.0
    if labels is None:
        past = net.base_model(input_ids=ids, use_cache=True).past_key_values
    else:
        output = net(input_ids=ids, use_cache=True)
        past, loss = output.past_key_values, functional.cross_entropy(output.logits[0].float(), labels, reduction="sum")
    b = len(batch["input_ids"])
    for layer in past.layers:
        layer.keys, layer.values = (states.expand(b, -1, -1, -1) for states in (layer.keys, layer.values))
    return past, loss


# ------------------------------------------------------------------------------------------------ packing


@dataclass(frozen=True)
class Packing:
    """The decision whether rows are packed.

    Args:
        used: whether each micro-batch is one sequence of all its rows.
        saves: FLOPs of padded batches divided by those of packed ones; above 1 if packing is cheaper; None: not
            counted.
        reason: for the decision.
    """

    used: bool
    saves: float | None
    reason: str


def plan_packing(
    lengths: Any, model: torch.nn.Module, train: Train, splitter: StepSplitter, prefix: int, packable: bool
) -> Packing:
    """Decide whether rows are packed.

    Args:
        lengths: tokens of all training rows, (n,).
        model: the model to train.
        train: its ``packing`` is auto, true or false.
        splitter: splits a step into micro-batches.
        prefix: number of tokens that are forwarded once per micro-batch.
        packable: whether the objective supports packed rows.

    Raises:
        ConfigError: if packing is required but impossible.
    """
    setting = f"train.packing={str(train.packing).lower()}"
    obstacle = packing_obstacle(model, train, packable)
    if train.packing is True and obstacle:
        raise ConfigError([Problem("train.packing", f"{obstacle}. Set it to auto or false")])
    if train.packing is False or obstacle:
        return Packing(False, None, obstacle or setting)
    if train.packing == "auto" and not attends_row_by_row(model, train):
        return Packing(False, None, "packing with flash-attention has not been measured")
    costs = flops.estimate(model, train.gradient_checkpointing is True)
    bodies = [[length - prefix for length in step] for step in _sampled_steps(lengths, train)]
    micro_batches = [[step[row] for row in group] for step in bodies for group in splitter.groups(step)]
    padded = sum(padded_cost(costs, rows, prefix) for rows in micro_batches)
    saves = round(padded / sum(packed_cost(costs, rows, prefix) for rows in micro_batches), 3)
    if train.packing is True:
        return Packing(True, saves, setting)
    return Packing(saves >= PACKING_PAYS, saves, f"{setting}: worthwhile from {PACKING_PAYS}x")


def packing_obstacle(model: Any, train: Train, packable: bool) -> str | None:
    """Why rows cannot be packed without changing the result; None if they can."""
    if not packable:
        return "only a loss on tokens supports packed rows, not a loss over labels or a mixture"
    if not attention.full_attention(model):
        return "the model has layers without full attention"
    if attends_row_by_row(model, train) or attention.uses_flash_attention(model):
        return None
    return (
        "attention must be computed row by row (on a CPU, with model.attention=sdpa and without gradient "
        "checkpointing, FSDP or DeepSpeed) or by flash-attention"
    )


def attends_row_by_row(model: Any, train: Train) -> bool:
    """Whether attention over a packed sequence can be computed row by row."""
    whole = train.strategy in ("single", "ddp") and train.gradient_checkpointing is not True
    return whole and attention.can_pack(model)


def _sampled_steps(lengths: Any, train: Train) -> Iterator[list[int]]:
    """Lengths of the rows of some steps, sampled as by the trainer."""
    size, draw = train.batch_size // processes.world_size(), np.random.default_rng(0)
    taken = draw.permutation(lengths)[: 4 * SAMPLED_STEPS * size].tolist()
    if train.group_by_length:
        order = get_length_grouped_indices(taken, size, generator=torch.Generator().manual_seed(0))
        taken = [taken[row] for row in order]
        starts = [int(at) * size for at in draw.permutation(-(-len(taken) // size))]
    else:
        starts = list(range(0, len(taken), size))
    yield from (taken[at : at + size] for at in starts[:SAMPLED_STEPS])


def padded_cost(costs: flops.Costs, rows: list[int], prefix: int) -> float:
    """FLOPs of a padded micro-batch, without those that do not depend on the layout.

    Args:
        rows: tokens of each row without the prefix.
        prefix: tokens of the prefix.
    """
    tokens, width = len(rows) * max(rows), max(rows)
    attended = (
        prefix + width if prefix else 0.5 * width
    )  # after a prefix, attention needs a mask and computes all pairs
    return costs.total(prefix + tokens, 0.5 * prefix**2 + tokens * attended, 0, 0)


def packed_cost(costs: flops.Costs, rows: list[int], prefix: int) -> float:
    """FLOPs of a packed micro-batch, with attention row by row; see `padded_cost`."""
    attended = [prefix + row if prefix else 0.5 * row for row in rows]
    pairs = sum(row * each for row, each in zip(rows, attended, strict=True))
    return costs.total(prefix + sum(rows), 0.5 * prefix**2 + pairs, 0, 0)
