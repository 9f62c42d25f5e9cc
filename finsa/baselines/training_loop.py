"""How the baselines that are networks learn and score. Letters: b rows of a batch, s units, c classes.

A network takes ids (b, s), zeros on the right, and lengths (b,); its logits (b, c) do not depend on the zeros.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from finsa.baselines import Fitted, FloatArray, Judge, Record
from finsa.config import Network, Train
from finsa.errors import FinsaError
from finsa.models import base
from finsa.models.batches import batches, padded
from finsa.runs.progress import Display, Moved, ignored

Rows = Sequence[Sequence[int]]
SORTED = 50  # batches among which rows are sorted by length: little padding, and yet a random order


def fit(
    network: torch.nn.Module,
    rows: Rows,
    labels: Sequence[int],
    held: Rows,
    judge: Judge,
    record: Record,
    section: Network,
    seed: int,
    train: Train,
) -> Fitted:
    """Train a network and leave it at the epoch with the best macro-F1 on the validation rows.

    Args:
        rows, labels: to learn from, (n,).
        held: the validation rows.
        judge: tells the numbers of their scores.
        record: takes them.
        section: the schedule.
        seed: of order and dropout.
        train: its ``max_steps`` ends the training before the epochs do, ``score_tokens`` are the padded units per batch
            of validation rows, and ``progress_seconds`` says how often progress is reported.

    Raises:
        FinsaError: for a loss or gradient that is infinite or no number, before it changes a weight.
    """
    network.to(base.device()).train()
    total = steps_of(section, len(rows), train.max_steps)
    optimizer = torch.optim.AdamW(network.parameters(), section.learning_rate, weight_decay=section.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, section.warmup))
    torch.manual_seed(seed)
    order = random.Random(seed)
    step, seen, best, waited, kept = 0, 0, -1.0, 0, dict[str, torch.Tensor]()
    display = Display(train.progress_seconds)
    with display.work("training", total, at_once=True) as shown:
        while step < total and waited < section.patience:
            losses = []
            for batch in _epoch(rows, section.batch_size, order)[: total - step]:
                losses.append(_step(network, rows, labels, batch, optimizer, step + 1))
                schedule.step()
                step, seen = step + 1, seen + len(batch)
                shown.move(step)
            with display.work("scoring validation", len(held)) as scored:
                values = judge(score(network, held, train.score_tokens, scored.moved))
            loss = float(torch.stack(losses).mean())
            record(step, {"loss": loss, **{f"eval_{name}": value for name, value in values.items()}})
            _show(display.console, step, total, values)
            waited += 1
            if values["macro_f1"] > best:
                best, waited = values["macro_f1"], 0
                kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(kept)
    return Fitted(sum(p.numel() for p in network.parameters()), best, seen, step)


def steps_of(section: Network, rows: int, max_steps: int | None) -> int:
    """Optimiser steps, at most."""
    return min(max_steps or 10**12, section.epochs * -(-rows // section.batch_size))


def _rate(step: int, total: int, warmup: float) -> float:
    """The learning rate's factor: up from 0 to 1 in the warm-up, then down to 0."""
    rising = warmup * total
    return min(1.0, (step + 1) / rising if step + 1 < rising else (total - step) / max(1.0, total - rising))


def _epoch(rows: Rows, size: int, order: random.Random) -> list[list[int]]:
    """Row numbers in batches: shuffled, then sorted by length within some batches, then the batches shuffled."""
    numbers = list(range(len(rows)))
    order.shuffle(numbers)
    made = []
    for start in range(0, len(numbers), SORTED * size):
        part = sorted(numbers[start : start + SORTED * size], key=lambda row: len(rows[row]))
        made += [part[at : at + size] for at in range(0, len(part), size)]
    order.shuffle(made)
    return made


def _step(
    network: torch.nn.Module,
    rows: Rows,
    labels: Sequence[int],
    batch: Sequence[int],
    optimizer: torch.optim.Optimizer,
    number: int,
) -> torch.Tensor:
    loss, norm = _backward(network, rows, labels, batch)
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):  # a GPU is waited for anyway, when it gets a step's rows
        raise _not_finite(network, rows, labels, batch, number)
    optimizer.step()
    return loss


def _backward(
    network: torch.nn.Module, rows: Rows, labels: Sequence[int], batch: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and the norm of its gradient, which is cut to 1."""
    loss = cross_entropy(_logits(network, [rows[row] for row in batch]), _on_device([labels[row] for row in batch]))
    network.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)


def _not_finite(
    network: torch.nn.Module, rows: Rows, labels: Sequence[int], batch: Sequence[int], number: int
) -> FinsaError:
    """What is told of a step whose loss or gradient is no number: which of its rows are so alone."""
    alone = {row: torch.stack(_backward(network, rows, labels, [row])) for row in batch}
    bad = sorted(row for row, values in alone.items() if not bool(torch.isfinite(values).all()))
    shown = ", ".join(map(str, bad[:5])) or "none alone; the whole step is too large"
    return FinsaError(
        f"training: loss or gradient of step {number} is infinite or no number. Rows: {shown} ({len(bad)} of "
        f"{len(batch)}; numbers of training rows, from 0). Look at these rows, or lower method.baseline.learning_rate"
    )


def _logits(network: torch.nn.Module, rows: Rows) -> torch.Tensor:
    logits: torch.Tensor = network(padded(rows).to(base.device()), torch.tensor([len(row) for row in rows]))
    return logits


def _on_device(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers).to(base.device())


@torch.inference_mode()
def score(network: torch.nn.Module, rows: Rows, score_tokens: int, moved: Moved = ignored) -> FloatArray:
    """Log-probabilities of rows, in their order: (n, c)."""
    training = network.training
    network.to(base.device()).eval()
    found: dict[int, FloatArray] = {}
    for batch in batches([len(row) for row in rows], score_tokens):
        logits = _logits(network, [rows[row] for row in batch])
        found |= dict(zip(batch, logits.double().log_softmax(dim=1).cpu().numpy(), strict=True))
        moved(len(batch))
    network.train(training)
    return np.stack([found[row] for row in range(len(rows))])


def _show(console: Console, step: int, total: int, values: dict[str, float]) -> None:
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    console.print(f"  step {step}/{total}  validation: {numbers}", highlight=False, soft_wrap=True)
