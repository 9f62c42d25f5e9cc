"""The router of a mixture, and how its logits become shares of the experts.

Letters: b rows, d hidden width, E experts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional

from finsa.errors import ModelError

COLDEST = 0.1  # the temperature is not let below it, as published


class Router(torch.nn.Module):
    """FinSA-MoE's router: Linear, LayerNorm, ReLU, Dropout 0.1 and Linear (d, 64, E), over a learnt temperature.

    What it reads is brought to mean 0 and variance 1 first, without parameters: the published router reads last hidden
    states, which a model's final norm has scaled, while embeddings are so small that the first layer's bias would
    drown them.

    Args:
        width: d.
        hidden: width inside.
        experts: their number.
        dropout: inside, while training.
    """

    def __init__(self, width: int, hidden: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.inside = torch.nn.Sequential(
            torch.nn.Linear(width, hidden),
            torch.nn.LayerNorm(hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(hidden, experts),
        )
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits (b, E) of what stands for each text, (b, d)."""
        scaled = functional.layer_norm(text.float(), text.shape[1:])
        logits: torch.Tensor = self.inside(scaled) / self.temperature.clamp(min=COLDEST)
        return logits


def load_router(router: Router, file: Path) -> None:
    """Read a router's weights.

    Raises:
        ModelError: where they are missing or of another size.
    """
    try:
        router.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{file}: no router that fits: {str(error).splitlines()[-1].strip()}") from None


def chosen(logits: torch.Tensor, routing: str, k: int) -> torch.Tensor:
    """Shares of the experts, (b, E), which sum to 1.

    Args:
        logits: (b, E).
        routing: ``soft``: all experts; ``top_k``: the k likeliest, in proportion; ``hard``: the likeliest alone.
        k: of ``top_k``.
    """
    k = {"soft": logits.shape[1], "hard": 1}.get(routing, k)
    if k >= logits.shape[1]:
        return logits.softmax(dim=1)
    places = logits.topk(k, dim=1).indices
    kept = torch.full_like(logits, float("-inf")).scatter(1, places, logits.gather(1, places))
    return kept.softmax(dim=1)


def balance_loss(gates: torch.Tensor) -> torch.Tensor:
    """KL divergence of the mean gate u from uniform, sum u ln(u E): 0 where experts are used alike, ln E for one alone.

    The published term runs the other way and is divided by E twice over, (1/E) sum (1/E) ln((1/E) / u): an expert that
    is never used costs without bound, and the value depends on E through torch's "batchmean" of a vector.

    Args:
        gates: (b, E).
    """
    mean = gates.mean(dim=0)
    return (mean * (mean * len(mean)).clamp(min=1e-8).log()).sum()
