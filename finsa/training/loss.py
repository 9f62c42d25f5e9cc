"""The loss at labelled positions only: hidden states first, then the vocabulary projection where a label is.

With a prompt of a hundred tokens and an answer of one, the projection of all positions is most of a small model's work.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from finsa.data.rows import IGNORE


def labelled_loss(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropy over labelled positions.

    Args:
        model: a causal language model of transformers, wrapped by PEFT or DDP or not.
        input_ids: (b, s), padded on the right.
        labels: (b, s), -100 where nothing is learnt; column 0 is never learnt.

    Returns:
        A scalar in float32, not divided by anything.
    """
    targets = labels[:, 1:]
    keep = functional.pad(targets != IGNORE, (0, 1))  # position t predicts token t + 1
    logits = model(input_ids=input_ids, logits_to_keep=keep, use_cache=False).logits  # (labelled, v)
    return functional.cross_entropy(logits.float(), targets[targets != IGNORE], reduction="sum")
