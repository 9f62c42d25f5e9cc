"""What a batch costs: the cross-entropy of labelled tokens, or of one choice among the classes per row.

Tokens: hidden states first, then the vocabulary projection where a label is. With a prompt of a hundred tokens and an
answer of one, the projection of all positions is most of a small model's work.

Letters: b rows of a batch, s tokens, c classes, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from finsa.config import Loss
from finsa.data.rows import IGNORE
from finsa.models import hardware, last_positions
from finsa.training.collate import read_positions


def labelled_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
    past: Any = None,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """Sum the cross-entropy over labelled positions.

    Args:
        model: a causal language model of transformers, wrapped by PEFT or DDP or not.
        input_ids: (b, s), padded on the right.
        labels: (b, s), -100 where nothing is learnt; column 0 is never learnt.
        weights: how much each row's tokens count, (b,), or each of the positions that are read, (b, k); None: 1.
        read: positions that predict labelled tokens, (b, k), as the collator has them; None: found out here, for
            which the device is waited for.
        past: keys and values of what stands before `input_ids`, (b, ...) per layer.
        inputs: what the model takes besides: a mixture's ``text_span``, a pack's mask and positions.

    Returns:
        A scalar in float32, not divided by anything.
    """
    read = read_positions(labels) if read is None else read
    if past is not None:
        inputs["past_key_values"] = past
    with last_positions.reading(model, read, input_ids.shape[1]):
        found = model(input_ids=input_ids, logits_to_keep=read, use_cache=past is not None, **inputs)
    logits = found.logits  # (b, k, v)
    targets = labels.gather(1, read + 1).flatten()
    logits = logits.flatten(0, 1).float()
    if weights is None:
        return functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    losses = functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").view_as(read)
    return (losses * (weights if weights.dim() == 2 else weights[:, None])).sum()


def choice_loss(
    scores: torch.Tensor, targets: torch.Tensor, loss: Loss, log_shares: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss of each row as one choice among the classes.

    With smoothing s over c classes the target q is 1 - s + s/c at the true class and s/c elsewhere, and ce = -q log p.
    ``focal`` (Lin et al. 2017) is (1 - p_y)^gamma * ce. ``adaptive_balanced`` (FinSA-MoE) takes exp(-ce), the
    *smoothed* ce, in place of p_y: with its smoothing of 0.1 and 3 classes that is never above 0.7474, so that the
    factor never falls below 0.064 and the loss never below 0.018575, however certain and right the model is. Its class
    weights, (1 - beta) / (1 - beta^n) with beta 0.99, are all the same from about 1,000 rows per class. It divides by
    the number of rows; here weighted losses are divided by their weights, as all of them are.

    Args:
        scores: of the classes, (b, c): logits, or log-probabilities that need not sum to 1.
        targets: true classes, (b,).
        loss: name, gamma, smoothing, and the tau of logit adjustment.
        log_shares: log of each class's share of the training rows, (c,), for logit adjustment (Menon et al. 2021).

    Returns:
        (b,), not weighted.
    """
    if log_shares is not None and loss.logit_adjustment > 0:
        scores = scores + loss.logit_adjustment * hardware.onto(log_shares, scores.device).to(scores.dtype)
    log_p = torch.log_softmax(scores.float(), dim=1)
    right = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(1 - loss.smoothing) * right - loss.smoothing * log_p.mean(dim=1)
    if loss.name == "cross_entropy":
        return entropy
    log_sure = right if loss.name == "focal" else -entropy
    # The lower bound keeps the gradient of small powers finite where a row is certain.
    unsure = (-torch.expm1(log_sure)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return unsure**loss.gamma * entropy
