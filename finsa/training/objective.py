"""What the trainer makes small: a weighted sum of losses over the weights of the whole optimiser step.

An objective gives both parts, so that the trainer can divide one by the other over all micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional

from finsa.config import Loss, Method
from finsa.data.rows import IGNORE, Renderer
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.inference.scoring import label_log_probs
from finsa.models import masks, packed_attention
from finsa.models.moe.mixture import Mixture
from finsa.models.moe.routing import balance_loss
from finsa.training import prefix
from finsa.training.collate import HEAD
from finsa.training.loss import choice_loss, labelled_loss

Batch = dict[str, torch.Tensor]
Scores = Callable[[torch.nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, and the sum of its weights.

    Args:
        total: of a model and a batch; a scalar with gradients, or (p,) for several parts that are added once each is
            divided by its own weight.
        weight: of a batch; a scalar on the batch's device, or (p,).
        suffix: ids that a batch needs behind every row.
        packs: whether a batch may be a pack.
    """

    total: Callable[[torch.nn.Module, Batch], torch.Tensor]
    weight: Callable[[Batch], torch.Tensor]
    suffix: tuple[int, ...] = ()
    packs: bool = False


def tokens() -> Objective:
    """Cross-entropy per labelled token; a row's weight counts for each of its tokens."""

    def total(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        past, shared = prefix.forward(model, batch)
        ids, weights = batch["input_ids"], batch.get("weights")
        with _rows_apart(model, batch) as given:
            given |= _routed(batch)
            loss = labelled_loss(model, ids, batch["labels"], weights, batch["read"], past, **given)
        return loss + shared * _weighed(torch.ones_like(batch["labels"][:, 0]), batch) if past is not None else loss

    def weight(batch: Batch) -> torch.Tensor:
        if "segments" in batch:  # weights of a pack are its positions'
            return _weighed(batch["labels"].gather(1, batch["read"] + 1) != IGNORE, batch)
        learnt = (batch["labels"][:, 1:] != IGNORE).sum(dim=1)
        if "prefix_labels" in batch:
            learnt = learnt + (batch["prefix_labels"] != IGNORE).sum()
        return _weighed(learnt, batch)

    return Objective(total, weight, packs=True)


def choice(
    scores: Scores,
    loss: Loss,
    counts: Sequence[int] | None,
    suffix: tuple[int, ...] = (),
) -> Objective:
    """One choice among the classes per row.

    Args:
        scores: gives (b, c) scores of a model and a batch.
        loss: what a row costs.
        counts: training rows per class, for logit adjustment.
        suffix: ids that the scores need behind every row.
    """
    shares = None if counts is None else torch.tensor(counts, dtype=torch.float32).log()

    def total(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return _weighed(choice_loss(scores(model, batch), batch["targets"], loss, shares), batch)

    def weight(batch: Batch) -> torch.Tensor:
        return _weighed(torch.ones_like(batch["targets"]), batch)

    return Objective(total, weight, suffix)


def _weighed(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum a value per row, (b,), times the rows' weights; or per position, (b, k)."""
    return (values * batch["weights"]).sum() if "weights" in batch else values.sum()


def of(method: Method, renderer: Renderer, counts: Sequence[int]) -> Objective:
    """The objective that a method names.

    Args:
        method: its ``loss_on``, ``head`` and ``loss``.
        renderer: knows the labels' tokens.
        counts: training rows per class, of the rows that are used.
    """
    if method.loss_on != "label":
        return tokens()
    needed = counts if method.loss.logit_adjustment > 0 else None
    if method.head == "classifier":
        return choice(classified, method.loss, needed)
    tree = LabelTree.of(scored_answers(renderer)[0])
    return choice(answered(tree), method.loss, needed, tree.tokens)


def answered(tree: LabelTree) -> Scores:
    """Scores of label words, by the LM head."""

    def scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        past, _ = prefix.forward(model, batch)
        return label_log_probs(model, batch["input_ids"], batch["lengths"], tree, past, **_routed(batch))

    return scores


def classified(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Scores of classes, by a classification head: (b, c)."""
    past, _ = prefix.forward(model, batch)
    given = {} if past is None else {"past": past}
    logits: torch.Tensor = model(batch["input_ids"], batch["text_span"], **given)
    return logits


def joint(task: Objective, mixture: Mixture, domain_weight: float, balance_weight: float) -> Objective:
    """A mixture's objective: the task's, the router's cross-entropy against the domains, and balance.

    Each part is a mean over the whole optimiser step: the task's over its own weights, the router's over the rows that
    are of an expert's domain, balance over rows, where a micro-batch's value counts for each of its rows: a mean gate
    cannot be had of rows that are not there at the same time, so this part alone depends on the micro-batch.

    Args:
        task: what the method makes small.
        mixture: whose last pass has the router's logits.
        domain_weight: lambda of the router's cross-entropy.
        balance_weight: lambda of balance.
    """

    def total(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        loss, logits = task.total(model, batch), mixture.route.logits
        assert logits is not None
        routed = functional.cross_entropy(logits, batch["domains"], ignore_index=-1, reduction="sum")
        balance = balance_loss(logits.softmax(dim=1)) * len(logits)
        return torch.stack([loss, domain_weight * routed, balance_weight * balance])

    def weight(batch: Batch) -> torch.Tensor:
        known = (batch["domains"] >= 0).sum().clamp(min=1e-6)  # a step without any costs 0
        return torch.stack([task.weight(batch), known, torch.ones_like(batch["domains"]).sum()]).float()

    return Objective(total, weight, task.suffix)


def _routed(batch: Batch) -> Batch:
    """What a mixture's router needs of a batch; nothing for other models."""
    return {"text_span": batch["text_span"]} if "domains" in batch else {}


@contextmanager
def _rows_apart(model: torch.nn.Module, batch: Batch) -> Iterator[Batch]:
    """Keep packed rows from seeing each other: by attention itself, by a kernel that reads it off the positions, or by
    a mask; gives what the model takes for it."""
    if "segments" not in batch:
        yield {}
    elif "lengths" in batch and packed_attention.possible(model):
        with packed_attention.apart(model, batch["lengths"], batch["input_ids"].shape[1]):
            yield {"position_ids": batch["position_ids"]}
    elif masks.maskless(model):
        yield {"position_ids": batch["position_ids"]}
    else:
        yield {"position_ids": batch["position_ids"], "attention_mask": _mask(model, batch["segments"])}


def _mask(model: torch.nn.Module, segments: torch.Tensor) -> torch.Tensor:
    """What each position of lines sees, added to the scores of attention: (l, 1, s, s)."""
    order = torch.arange(segments.shape[1], device=segments.device)
    sees = (segments[:, :, None] == segments[:, None, :]) | (segments == HEAD)[:, None, :]
    sees &= order[:, None] >= order
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]
