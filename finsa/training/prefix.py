"""The prefix that all rows share: forwarded once per micro-batch, with gradients, and attended to by every row.

Loss and gradients are those of separate rows. Dropout alone differs: the prefix draws one mask per micro-batch rather
than one per row. Each row still sees a mask of the same distribution, so the expected gradient is the same.

Letters: b rows of a batch, p tokens of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from finsa.config import Train
from finsa.data.rows import Row
from finsa.models import masks
from finsa.models.classifier import Classifier, causal
from finsa.models.moe.mixture import Mixture
from finsa.training import packing

# What `auto` asks for: p at least, and tokens saved per token forwarded without it (measured, docs/performance.md).
PREFIX_TOKENS, PREFIX_SAVED = 16, 0.25


@dataclass(frozen=True)
class Prefix:
    """What rows share, and what is done about it.

    Args:
        tokens: how many the training rows share.
        saved: share of the real tokens that need not be forwarded.
        used: how many are forwarded once per micro-batch; 0: each row by itself.
        reason: why that.
    """

    tokens: int
    saved: float
    used: int
    reason: str


class Common:
    """Finds out what rows share while they pass, chunk by chunk.

    The prefix ends one token early, so that no row is empty and what it predicts last is the same for all; a text that
    a head or a router reads is not part of it.
    """

    def __init__(self) -> None:
        self.rows, self.total, self.longest = 0, 0, 0  # seen, their tokens, and those of the longest
        self._bounds: dict[str, tuple[list[int], list[int]]] = {}
        self._text: int | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """See further rows."""
        for field in ("input_ids", "labels"):
            seen = [row[field] for row in rows]  # type: ignore[literal-required]
            seen += self._bounds.get(field, ())
            self._bounds[field] = min(seen), max(seen)
        self.rows, self.total = self.rows + len(rows), self.total + sum(len(row["input_ids"]) for row in rows)
        self.longest = max(self.longest, *(len(row["input_ids"]) for row in rows))
        starts = [row["text_span"][0] for row in rows if "text_span" in row]
        if starts:
            self._text = min(starts) if self._text is None else min(self._text, *starts)

    @property
    def tokens(self) -> int:
        """How many tokens all rows begin with."""
        # Of lists in order, what the first and the last share, all share.
        shared = min(_agree(*bounds) for bounds in self._bounds.values()) - 1
        return max(0, shared if self._text is None else min(shared, self._text))


def _agree(first: Sequence[int], last: Sequence[int]) -> int:
    pairs = zip(first, last, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def plan(common: Common, model: torch.nn.Module, train: Train, suffix: int = 0) -> Prefix:
    """Decide about the prefix of training rows.

    Args:
        common: has seen all of them.
        model: the one that learns.
        train: its ``shared_prefix`` says auto, true or false.
        suffix: tokens that a batch has behind each row.
    """
    mean, tokens = common.total / common.rows, common.tokens
    rows = train.micro_batch_size if train.batch_tokens is None else train.batch_tokens / mean
    saved = tokens / mean * max(0.0, 1 - 1 / min(rows, train.batch_size))
    wanted = f"train.shared_prefix={str(train.shared_prefix).lower()}"
    refused = wanted if train.shared_prefix is False else obstacle(model, train, common.longest + suffix)
    if refused is None and train.shared_prefix == "auto" and (tokens < PREFIX_TOKENS or saved < PREFIX_SAVED):
        refused = f"{wanted}: pays from {PREFIX_TOKENS} tokens and {PREFIX_SAVED:.0%} saved"
    if refused is None and tokens == 0:
        refused = "the rows share no tokens"
    return Prefix(tokens, round(saved, 4), 0 if refused else tokens, refused or wanted)


def obstacle(model: torch.nn.Module, train: Train, longest: int) -> str | None:
    """Why a prefix cannot be shared by rows of at most `longest` tokens, or would not mean the same; None: it can."""
    if isinstance(model, Mixture):
        return "a mixture's experts are chosen by the text, for the prefix too"
    if train.packing is True and not packing.row_by_row(model, train):
        return "rows are packed, behind one another's masks"
    if train.gradient_checkpointing is True:
        return "gradient checkpointing keeps no keys and values"
    if train.strategy in ("fsdp", "deepspeed"):
        return "FSDP and DeepSpeed gather weights per forward pass of the whole model"
    if masks.is_remote(model):
        return "the model's code is remote"
    return None if masks.keeps_everything(model, longest) else "layers keep something other than all keys and values"


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor | float]:
    """Forward a batch's prefix.

    Args:
        model: a causal language model or a classifier, wrapped by PEFT or DDP or not.
        batch: from the collator.

    Returns:
        Keys and values, seen b-fold without being copied, and the summed loss of one row's prefix; None and 0 for a
        batch without prefix.
    """
    if "prefix" not in batch:
        return None, 0.0
    inner: Any = getattr(model, "module", model)
    net = causal(inner.backbone if isinstance(inner, Classifier) else inner)
    ids, labels = batch["prefix"][None], batch.get("prefix_labels")
    loss: torch.Tensor | float = 0.0
    if labels is None:
        past = net.base_model(input_ids=ids, use_cache=True).past_key_values
    else:
        found = net(input_ids=ids, use_cache=True)
        past, loss = found.past_key_values, functional.cross_entropy(found.logits[0].float(), labels, reduction="sum")
    rows = len(batch["input_ids"])
    for layer in past.layers:
        layer.keys, layer.values = (kept.expand(rows, -1, -1, -1) for kept in (layer.keys, layer.values))
    return past, loss
