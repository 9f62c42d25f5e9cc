"""What the trainer makes small: a weighted sum of losses over the weights of the whole optimiser step.

An objective gives both parts, so that the trainer can divide one by the other over all micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from finsa.config import Loss, Method
from finsa.data.rows import IGNORE, Renderer
from finsa.inference.scoring import LabelTree, label_log_probs, scored_answers
from finsa.training.loss import choice_loss, labelled_loss

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, and the sum of its weights.

    Args:
        total: of a model and a batch; a scalar with gradients.
        weight: of a batch; a scalar on the batch's device.
        suffix: ids that a batch needs behind every row.
    """

    total: Callable[[torch.nn.Module, Batch], torch.Tensor]
    weight: Callable[[Batch], torch.Tensor]
    suffix: tuple[int, ...] = ()


def tokens() -> Objective:
    """Cross-entropy per labelled token; a row's weight counts for each of its tokens."""

    def total(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return labelled_loss(model, batch["input_ids"], batch["labels"], batch.get("weights"))

    def weight(batch: Batch) -> torch.Tensor:
        return _weighed((batch["labels"][:, 1:] != IGNORE).sum(dim=1), batch)

    return Objective(total, weight)


def choice(
    scores: Callable[[torch.nn.Module, Batch], torch.Tensor],
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
    """Sum a value per row, (b,), times the rows' weights."""
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
        return choice(lambda model, batch: model(batch["input_ids"], batch["text_span"]), method.loss, needed)
    tree = LabelTree.of(scored_answers(renderer)[0])

    def scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return label_log_probs(model, batch["input_ids"], batch["lengths"], tree)

    return choice(scores, method.loss, needed, tree.tokens)
