"""Training objectives: a weighted sum of losses, divided by the sum of the weights of the whole optimizer step.

An objective computes both sums, so that the trainer can divide them after adding up all micro-batches and processes.

Letters: b rows of a batch, s tokens, k positions that predict a labeled token, c classes, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from finsa.config import Loss, Method, Preference, Reward
from finsa.data.rows import IGNORE, Renderer
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.inference.scoring import label_log_probs
from finsa.models import attention, hardware
from finsa.models.moe.mixture import Mixture, balance_loss
from finsa.training.batches import Batch, read_positions
from finsa.training.layout import forward_prefix

Scores = Callable[[torch.nn.Module, Batch], torch.Tensor]
RowLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, and the sum of its weights.

    Args:
        total: of a model and a batch; a scalar with gradients, or (p,) for p parts that are added once each is divided
            by its weight.
        weight: of a batch; a scalar on the batch's device, or (p,).
        suffix: ids that a batch appends to every row.
        packable: whether the rows of a batch may be packed.
    """

    total: Callable[[torch.nn.Module, Batch], torch.Tensor]
    weight: Callable[[Batch], torch.Tensor]
    suffix: tuple[int, ...] = ()
    packable: bool = False


def build(
    method: Method, renderer: Renderer, counts: Sequence[int], costs: Sequence[Sequence[float]] | None = None
) -> Objective:
    """Build the objective of a method.

    Args:
        method: its ``loss_on``, ``head``, ``loss``, ``preference`` and ``reward``.
        renderer: has the tokens of the labels.
        counts: number of used training rows per class, (c,).
        costs: ``evaluation.costs``, for a reward that depends on them, (c, c).
    """
    if method.loss_on != "label":
        return tokens()
    labels, needed = renderer.labels, counts if method.loss.logit_adjustment > 0 else None
    answers = [] if method.head == "classifier" else scored_answers(renderer)[0]
    tree = LabelTree.of(answers)
    scores = classifier_logits if method.head == "classifier" else label_word_log_probs(tree)
    if labels.task == "multi_label":
        return of_values(scores if method.head == "classifier" else log_odds(scores), binary_loss, tree.tokens)
    if labels.task == "regression":
        row_loss = huber_loss(method.loss.delta) if method.head == "classifier" else anchor_loss(labels.numbers)
        return of_values(scores, row_loss, tree.tokens)
    if method.preference is not None:
        return of_pairs(scores, method.preference, list(map(len, answers)), tree.tokens)
    if method.reward is not None:
        return expected_reward(scores, rewards(method.reward, costs, len(labels)), method.reward.beta, tree.tokens)
    return choice(scores, method.loss, needed, tree.tokens)


# ------------------------------------------------------------------------------------------------ labeled tokens


def tokens() -> Objective:
    """Cross-entropy per labeled token; a row's weight counts for each of its tokens."""

    def total(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        past, prefix_loss = forward_prefix(model, batch)
        ids, labels, weights, read = batch["input_ids"], batch["labels"], batch.get("weights"), batch["read"]
        given = _router_inputs(batch)
        if "position_ids" not in batch:
            loss = labeled_loss(model, ids, labels, weights, read, past, **given)
            return (
                loss + prefix_loss * _weighted_sum(torch.ones_like(labels[:, 0]), batch) if past is not None else loss
            )
        given["position_ids"] = batch["position_ids"]
        if attention.uses_flash_attention(model):  # it finds the rows of a packed sequence by their positions
            return labeled_loss(model, ids, labels, weights, read, **given)
        with attention.packed_rows(model, batch["lengths"], ids.shape[1]):
            return labeled_loss(model, ids, labels, weights, read, **given)

    def weight(batch: Batch) -> torch.Tensor:
        if "position_ids" in batch:  # packed rows have a weight per position
            return _weighted_sum(batch["labels"].gather(1, batch["read"] + 1) != IGNORE, batch)
        labeled = (batch["labels"][:, 1:] != IGNORE).sum(dim=1)
        if "prefix_labels" in batch:
            labeled = labeled + (batch["prefix_labels"] != IGNORE).sum()
        return _weighted_sum(labeled, batch)

    return Objective(total, weight, packable=True)


def labeled_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
    past: Any = None,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """Sum the cross-entropy over labeled positions.

    Only positions that predict a label are projected to the vocabulary: with a prompt of a hundred tokens and an answer
    of one, projecting all positions is most of the work of a small model.

    Args:
        model: a causal language model of transformers, wrapped by PEFT or DDP or not.
        input_ids: (b, s), padded on the right.
        labels: (b, s), -100 where there is no loss; column 0 is never predicted.
        weights: per row, (b,), or per position in `read`, (b, k); None: 1.
        read: positions that predict labeled tokens, (b, k), as in `Collator`; None: computed here, for which
            the host waits for the device.
        past: keys and values of the tokens before `input_ids`, (b, ...) per layer.
        inputs: further inputs of the model: ``text_span`` of a mixture, positions of packed rows.

    Returns:
        A scalar in float32; not normalized.
    """
    read = read_positions(labels) if read is None else read
    if past is not None:
        inputs["past_key_values"] = past
    with attention.last_mlp_at(model, read, input_ids.shape[1]):
        output = model(input_ids=input_ids, logits_to_keep=read, use_cache=past is not None, **inputs)
    logits = output.logits.flatten(0, 1).float()  # (b * k, v)
    targets = labels.gather(1, read + 1).flatten()
    if weights is None:
        return functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    losses = functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").view_as(read)
    return (losses * (weights if weights.dim() == 2 else weights[:, None])).sum()


# ------------------------------------------------------------------------------------------------ one class per row


def choice(
    scores: Scores,
    loss: Loss,
    counts: Sequence[int] | None,
    suffix: tuple[int, ...] = (),
) -> Objective:
    """A loss over the classes, one per row.

    Args:
        scores: computes the scores (b, c) of a model and a batch.
        loss: of a row.
        counts: training rows per class, (c,), for logit adjustment.
        suffix: token ids that the scores need at the end of every row.
    """
    log_shares = None if counts is None else torch.tensor(counts, dtype=torch.float32).log()
    return per_row(lambda model, batch: choice_loss(scores(model, batch), batch["targets"], loss, log_shares), suffix)


def per_row(losses: Callable[[torch.nn.Module, Batch], torch.Tensor], suffix: tuple[int, ...]) -> Objective:
    """An objective that is a mean over the rows.

    Args:
        losses: of the rows, (b,), given a model and a batch.
        suffix: token ids that they need at the end of every row.
    """

    def total(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return _weighted_sum(losses(model, batch), batch)

    def weight(batch: Batch) -> torch.Tensor:
        return _weighted_sum(torch.ones_like(batch["targets"]), batch)

    return Objective(total, weight, suffix)


def choice_loss(
    scores: torch.Tensor, targets: torch.Tensor, loss: Loss, log_shares: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss of each row over the classes.

    With smoothing s over c classes the target q is 1 - s + s/c at the true class and s/c elsewhere, and ce = -q log p.
    ``focal`` (Lin et al. 2017) is (1 - p_y)^gamma * ce. ``adaptive_balanced`` (FinSA-MoE) takes exp(-ce), the
    *smoothed* ce, in place of p_y: with its smoothing of 0.1 and 3 classes that is never above 0.7474, so that the
    factor never falls below 0.064 and the loss never below 0.018575, however certain and right the model is. Its class
    weights, (1 - beta) / (1 - beta^n) with beta 0.99, are all the same from about 1,000 rows per class. It divides by
    the number of rows; here weighted losses are divided by their weights, as all of them are.

    ``ordinal`` (Diaz and Marathe 2019) is the cross-entropy with the target q_k proportional to exp(-|k - y| / spread).

    Args:
        scores: of the classes, (b, c): logits, or log-probabilities that need not sum to 1.
        targets: true classes, (b,).
        loss: name, gamma, smoothing, spread, and the tau of logit adjustment.
        log_shares: log of each class's share of the training rows, (c,), for logit adjustment (Menon et al. 2021).

    Returns:
        (b,), not weighted.
    """
    if log_shares is not None and loss.logit_adjustment > 0:
        scores = scores + loss.logit_adjustment * hardware.to_device(log_shares, scores.device).to(scores.dtype)
    log_p = torch.log_softmax(scores.float(), dim=1)
    if loss.name == "ordinal":
        levels = torch.arange(log_p.shape[1], device=log_p.device)
        return -((-(levels - targets[:, None]).abs() / loss.spread).softmax(dim=1) * log_p).sum(dim=1)
    log_true = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(1 - loss.smoothing) * log_true - loss.smoothing * log_p.mean(dim=1)
    if loss.name == "cross_entropy":
        return entropy
    log_confidence = log_true if loss.name == "focal" else -entropy
    # The lower bound keeps the gradient of small powers finite if the model is certain of a row.
    doubt = (-torch.expm1(log_confidence)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return doubt**loss.gamma * entropy


# ------------------------------------------------------------------------------------------------ pairs and rewards


def of_pairs(scores: Scores, settings: Preference, lengths: Sequence[int], suffix: tuple[int, ...] = ()) -> Objective:
    """A preference loss on the true label of a row and a wrong one, which one forward pass over the prompt scores.

    Args:
        scores: computes the log-probabilities (b, c) of the labels, given a model and a batch.
        settings: the loss and its beta.
        lengths: number of scored tokens of each label, (c,).
        suffix: token ids that the scores need at the end of every row.
    """

    def losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        log_probs, pair = scores(model, batch), torch.stack([batch["targets"], batch["rejected"]], dim=1)
        tokens = hardware.to_device(torch.tensor(lengths, dtype=torch.float32), log_probs.device)[pair]
        return preference_loss(log_probs, pair, tokens, settings, batch.get("reference"))

    return per_row(losses, suffix)


def preference_loss(
    log_probs: torch.Tensor,
    pair: torch.Tensor,
    tokens: torch.Tensor,
    settings: Preference,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of each pair; but for what is said of ``kto`` and ``orpo``, that of trl's trainers on the answers' tokens.

    With w the chosen and l the rejected label, n their tokens, and r = log p - log p_reference:

    - ``dpo``: -log sigmoid(beta (r_w - r_l))
    - ``ipo``: (r_w / n_w - r_l / n_l - 1 / (2 beta))^2
    - ``kto``: the mean of 1 - sigmoid(beta (r_w - z)) and 1 - sigmoid(beta (z - r_l)), where z is the divergence of the
      label probabilities from the starting model, averaged over the micro-batch, without gradient. trl estimates it
      from answers of other rows; over K labels it is a sum.
    - ``orpo``: -log p_w / n_w - beta log sigmoid(log odds_w - log odds_l), the odds of the geometric mean per token;
      trl adds the cross-entropy of the prompt
    - ``simpo``: -log sigmoid(beta (log p_w / n_w - log p_l / n_l) - margin)

    Args:
        log_probs: of the whole labels, (b, c).
        pair: numbers of the chosen and the rejected label, (b, 2).
        tokens: their lengths, (b, 2).
        settings: loss, beta and margin.
        reference: log-probabilities by the starting model, (b, c); only for losses that compare with it.

    Returns:
        (b,)
    """
    beta, chosen = settings.beta, log_probs.gather(1, pair)  # (b, 2)
    if settings.loss == "simpo":
        mean = chosen / tokens
        return -functional.logsigmoid(beta * (mean[:, 0] - mean[:, 1]) - settings.margin)
    if settings.loss == "orpo":
        mean = (chosen / tokens).clamp(max=-1e-6)  # a label with probability 1 has infinite odds
        log_odds = mean - torch.log(-torch.expm1(mean))
        return -mean[:, 0] - beta * functional.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
    assert reference is not None
    gain = chosen - reference.gather(1, pair)
    if settings.loss == "dpo":
        return -functional.logsigmoid(beta * (gain[:, 0] - gain[:, 1]))
    if settings.loss == "ipo":
        mean = gain / tokens
        return (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)) ** 2
    moved = divergence(log_probs.detach(), reference).mean()
    return ((beta * (moved - gain[:, 0])).sigmoid() + (beta * (gain[:, 1] - moved)).sigmoid()) / 2


def rewards(settings: Reward, costs: Sequence[Sequence[float]] | None, classes: int) -> torch.Tensor:
    """Reward of each predicted label (column) for each true one (row), (c, c)."""
    if settings.kind == "accuracy":
        return torch.eye(classes)
    return -torch.tensor(costs)


def expected_reward(scores: Scores, table: torch.Tensor, beta: float, suffix: tuple[int, ...] = ()) -> Objective:
    """Minus the expected reward of a label drawn from the model, and its divergence from the starting model.

    Args:
        scores: computes the scores (b, c) of the labels, given a model and a batch.
        table: reward of each label for each true label, (c, c).
        beta: weight of the divergence.
        suffix: token ids that the scores need at the end of every row.
    """

    def losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return reward_loss(scores(model, batch), batch["targets"], table, beta, batch.get("reference"))

    return per_row(losses, suffix)


def reward_loss(
    scores: torch.Tensor,
    targets: torch.Tensor,
    table: torch.Tensor,
    beta: float = 0.0,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """-sum_k p_k R(y, k) + beta KL(p || p_reference) of each row, (b,), with p the softmax of the scores.

    Its gradient is what policy-gradient methods such as REINFORCE and GRPO estimate from sampled answers: with respect
    to the score of label k it is -p_k (R(y, k) - sum_j p_j R(y, j)), the advantage of the label.

    Args:
        scores: of the labels, (b, c); they need not be normalized.
        targets: true classes, (b,).
        table: reward of each label for each true label, (c, c).
        beta: weight of the divergence.
        reference: log-probabilities by the starting model, (b, c), for beta > 0.
    """
    received = hardware.to_device(table, scores.device)[targets]  # (b, c)
    loss = -(torch.softmax(scores.float(), dim=1) * received).sum(dim=1)
    if beta == 0:
        return loss
    assert reference is not None
    return loss + beta * divergence(scores, reference)


def divergence(scores: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the label probabilities of two models, KL(p || q), (b,), from scores (b, c)."""
    log_p, log_q = torch.log_softmax(scores.float(), dim=1), torch.log_softmax(reference.float(), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


# ------------------------------------------------------------------------------------------------ numbers and sets


def of_values(scores: Scores, row_loss: RowLoss, suffix: tuple[int, ...]) -> Objective:
    """A loss against the number of a row, or against which labels it has.

    Args:
        scores: computes the scores (b, m) of a model and a batch.
        row_loss: of the scores and the rows' values (b, k), (b,).
        suffix: token ids that the scores need at the end of every row.
    """

    return per_row(lambda model, batch: row_loss(scores(model, batch).float(), batch["values"]), suffix)


def binary_loss(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labels, each on its own: log-odds (b, c) against 0 and 1, (b,)."""
    return functional.binary_cross_entropy_with_logits(scores, values, reduction="none").mean(dim=1)


def log_odds(scores: Scores) -> Scores:
    """Log-odds of the labels, (b, c), from the log-probabilities of the answers yes and no to each, (b, 2c)."""

    def odds(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        log_probs = scores(model, batch)
        return log_probs[:, 0::2] - log_probs[:, 1::2]

    return odds


def huber_loss(delta: float) -> RowLoss:
    """Huber's loss of an output (b, 1): quadratic up to a difference of `delta`, linear beyond."""

    def loss(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return functional.huber_loss(scores, values, reduction="none", delta=delta).sum(dim=1)

    return loss


def anchor_loss(anchors: Sequence[float]) -> RowLoss:
    """Cross-entropy over the anchors: a number between two of them divides its weight, so that it is the expectation.

    Args:
        anchors: their numbers in ascending order, (c,).
    """

    def loss(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        at = hardware.to_device(torch.tensor(anchors), scores.device)
        upper = torch.searchsorted(at, values, right=True).clamp(1, len(anchors) - 1)  # (b, 1)
        share = (values - at[upper - 1]) / (at[upper] - at[upper - 1])
        targets = torch.zeros_like(scores).scatter_(1, upper - 1, 1 - share).scatter_(1, upper, share)
        return -(targets * torch.log_softmax(scores, dim=1)).sum(dim=1)

    return loss


def label_word_log_probs(tree: LabelTree) -> Scores:
    """Scores of the classes by the LM head: log-probabilities of their label words."""

    def scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        past, _ = forward_prefix(model, batch)
        return label_log_probs(model, batch["input_ids"], batch["lengths"], tree, past, **_router_inputs(batch))

    return scores


def classifier_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Scores of the classes by a classification head: (b, c)."""
    past, _ = forward_prefix(model, batch)
    given = {} if past is None else {"past": past}
    logits: torch.Tensor = model(batch["input_ids"], batch["text_span"], **given)
    return logits


# ------------------------------------------------------------------------------------------------ mixture of experts


def joint(task: Objective, mixture: Mixture, domain_weight: float, balance_weight: float) -> Objective:
    """The objective of a mixture: the task, the router's cross-entropy against the domains, and balance of the experts.

    Each part is a mean over the whole optimizer step: the task over its weights, the router over the rows whose
    domain has an expert, balance over rows. Only balance depends on the micro-batch, because a mean gate can only be
    computed over rows that are forwarded at the same time; a micro-batch's value counts for each of its rows.

    Args:
        task: objective of the method.
        mixture: has the router's logits of the last forward pass.
        domain_weight: weight of the router's cross-entropy.
        balance_weight: weight of the balance term.
    """

    def total(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        loss, logits = task.total(model, batch), mixture.route.logits
        assert logits is not None
        routing = functional.cross_entropy(logits, batch["domains"], ignore_index=-1, reduction="sum")
        balance = balance_loss(logits.softmax(dim=1)) * len(logits)
        return torch.stack([loss, domain_weight * routing, balance_weight * balance])

    def weight(batch: Batch) -> torch.Tensor:
        known = (batch["domains"] >= 0).sum().clamp(min=1e-6)  # a step without any has a routing loss of 0
        return torch.stack([task.weight(batch), known, torch.ones_like(batch["domains"]).sum()]).float()

    return Objective(total, weight, task.suffix)


def _router_inputs(batch: Batch) -> Batch:
    """Inputs of a mixture's router; empty for other models."""
    return {"text_span": batch["text_span"]} if "domains" in batch else {}


def _weighted_sum(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum values per row, (b,), or per position, (b, k), multiplied by their weights."""
    return (values * batch["weights"]).sum() if "weights" in batch else values.sum()
