"""Small neural networks trained from scratch, and the training loop of all neural baselines.

TextCNN (Kim 2014) and BiLSTM (Graves & Schmidhuber 2005) learn their embeddings from the training rows. A network takes
ids (b, s), zeros on the right, and lengths (b,); its logits (b, c) do not depend on the zeros.

Letters: b rows of a batch, s units, e width of an embedding, f filters or states, c classes.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, huber_loss, pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from finsa import config
from finsa.baselines import Evaluate, Fitted, FloatArray, Learner, Record, Targets, Texts, rank
from finsa.config import Network, RunConfig
from finsa.config.base import headline
from finsa.data.values import TASKS
from finsa.errors import FinsaError
from finsa.models import base, tokenizers
from finsa.models.batches import batches, padded
from finsa.runs.progress import Display, Moved, ignored

Rows = Sequence[Sequence[int]]
UNITS, WEIGHTS = "units.json", "model.safetensors"
UNKNOWN, KNOWN = 1, 2  # ids: 0 is padding, 1 is any unknown unit, known units follow
WORD = re.compile(r"[^\W\d_\u0250-\U0010ffff]+|\S")  # a run of Latin letters, or any other non-space character
SORTED = 50  # batches whose rows are sorted by length: little padding, but still a random order


class FromScratch(Learner):
    """A small network over the units of a text.

    Args:
        section: the settings.
        cfg: the run's configuration: ``data.max_length`` is the maximum number of units, besides seed, model (for its
            tokenizer) and limits.
        classes: number of classes.
    """

    def __init__(self, section: config.TextCnn | config.BiLstm, cfg: RunConfig, classes: int) -> None:
        self.section, self.cfg, self.classes = section, cfg, classes
        self.tokenizer: Any = tokenizers.load_tokenizer(cfg.model) if section.units == "model" else None
        self.numbers: dict[str, int] = {}
        self.network = nn.Module()

    def fit(self, texts: Texts, labels: Targets, held: Texts, evaluate: Evaluate, record: Record) -> Fitted:
        """Build the vocabulary from the training rows, then train."""
        units = [self._units(text) for text in texts]
        self._number(units)
        rows = [self._ids(text) for text in units]
        return fit(self.network, rows, labels, self._encode(held), evaluate, record, self.section, self.cfg)

    def _number(self, units: Sequence[Sequence[str]]) -> None:
        """Build the vocabulary of the frequent units, and a network of that size."""
        counts = Counter(unit for text in units for unit in set(text))
        frequent = sorted(unit for unit, rows in counts.items() if rows >= self.section.min_rows)
        self._build(frequent)

    def _build(self, units: Sequence[str]) -> None:
        self.numbers = {unit: number for number, unit in enumerate(units, start=KNOWN)}
        torch.manual_seed(self.cfg.seed)
        kind = TextCnn if isinstance(self.section, config.TextCnn) else BiLstm
        self.network = kind(self.section, len(units) + KNOWN, self.classes)  # type: ignore[arg-type]

    def _units(self, text: str) -> list[str]:
        if self.section.units == "model":
            return [str(token) for token in self._tokens(text)]
        return list(text) if self.section.units == "characters" else WORD.findall(text.lower())

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _ids(self, units: Sequence[str]) -> list[int]:
        return [self.numbers.get(unit, UNKNOWN) for unit in units[: self.cfg.data.max_length]] or [UNKNOWN]

    def _encode(self, texts: Texts) -> list[list[int]]:
        return [self._ids(self._units(text)) for text in texts]

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities: (n, c)."""
        return score(self.network, self._encode(texts), self.cfg, moved)

    def count_truncated(self, texts: Texts) -> int:
        """Number of texts with more units than the limit."""
        return sum(len(self._units(text)) > self.cfg.data.max_length for text in texts)

    def plan(self, texts: Texts) -> dict[str, object]:
        """Count the units and build the network without training it."""
        self._number([self._units(text) for text in texts])
        steps = count_steps(self.section, len(texts), self.cfg.train.max_steps)
        return {
            "units": f"{len(self.numbers):,} ({self.section.units}), each in {self.section.min_rows} rows or more",
            "truncated": f"{self.count_truncated(texts):,} of the training rows, at {self.cfg.data.max_length} units",
            "parameters": f"{sum(p.numel() for p in self.network.parameters()):,}",
            "training": f"{len(texts):,} rows, at most {steps:,} steps of {self.section.batch_size} rows",
        }

    def save(self, folder: Path) -> None:
        """Write vocabulary and weights."""
        (folder / UNITS).write_text(json.dumps(list(self.numbers)), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}, folder / WEIGHTS)

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote."""
        self._build(json.loads((folder / UNITS).read_text(encoding="utf-8")))
        try:
            self.network.load_state_dict(load_file(folder / WEIGHTS))
        except RuntimeError as error:
            raise ValueError(f"{WEIGHTS} does not fit: {error}") from None


class TextCnn(nn.Module):
    """Convolutions of several widths over the embeddings, max pooling, one linear layer.

    Args:
        section: the layer sizes.
        units: size of the vocabulary, including padding and unknown.
        classes: number of classes.
    """

    def __init__(self, section: config.TextCnn, units: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(units, section.embedding, padding_idx=0)
        self.filters = nn.ModuleList(nn.Conv1d(section.embedding, section.filters, width) for width in section.widths)
        self.dropout = nn.Dropout(section.dropout)
        self.out = nn.Linear(section.filters * len(section.widths), classes)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits (b, c) of ids (b, s) with lengths (b,)."""
        widths = [width for module in self.filters for width in module.kernel_size]  # type: ignore[union-attr]
        states = self.embedding(pad(ids, (0, max(0, max(widths) - ids.shape[1])))).transpose(1, 2)  # (b, e, s)
        pooled = []
        for width, module in zip(widths, self.filters, strict=True):
            features = module(states)  # (b, f, s - width + 1)
            last = (lengths.to(ids.device) - width).clamp(min=0)  # a text shorter than the filter has one position
            beyond = torch.arange(features.shape[2], device=ids.device) > last[:, None]
            pooled.append(features.masked_fill(beyond[:, None], -torch.inf).amax(dim=2).relu())
        logits: torch.Tensor = self.out(self.dropout(torch.cat(pooled, dim=1)))
        return logits


class BiLstm(nn.Module):
    """A bidirectional LSTM, its states pooled over the text, one linear layer.

    Args:
        section: the layer sizes.
        units: size of the vocabulary, including padding and unknown.
        classes: number of classes.
    """

    def __init__(self, section: config.BiLstm, units: int, classes: int) -> None:
        super().__init__()
        self.pooling = section.pooling
        self.embedding = nn.Embedding(units, section.embedding, padding_idx=0)
        self.lstm = nn.LSTM(section.embedding, section.hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(section.dropout)
        self.out = nn.Linear(2 * section.hidden, classes)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits (b, c) of ids (b, s) with lengths (b,)."""
        packed = pack_padded_sequence(self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        filling = -torch.inf if self.pooling == "max" else 0.0
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=filling)  # (b, s, 2f)
        mean = states.sum(dim=1) / lengths.to(ids.device)[:, None]
        pooled = states.amax(dim=1) if self.pooling == "max" else mean
        logits: torch.Tensor = self.out(self.dropout(pooled))
        return logits


# ------------------------------------------------------------------------------------------------ training loop


def fit(
    network: torch.nn.Module,
    rows: Rows,
    labels: Targets,
    held: Rows,
    evaluate: Evaluate,
    record: Record,
    section: Network,
    cfg: RunConfig,
) -> Fitted:
    """Train a network and leave it at the epoch with the best macro-F1, of numbers the best RMSE, on validation.

    Args:
        network: the network to train.
        rows, labels: training rows and their classes, (n,), or values, (n, k).
        held: validation rows.
        evaluate: computes metrics from their log-probabilities.
        record: called with the metrics of each epoch.
        section: learning rate, schedule and batch size.
        cfg: its task and seed, of the row order and dropout; ``train.max_steps`` may end training before the epochs do,
            ``train.score_tokens`` is the maximum number of padded units per validation batch, and
            ``train.progress_seconds`` the interval of progress reports.

    Raises:
        FinsaError: for an infinite or NaN loss or gradient, before any weight changes.
    """
    task, train, seed = cfg.data.task, cfg.train, cfg.seed
    network.to(base.device()).train()
    total = count_steps(section, len(rows), train.max_steps)
    optimizer = torch.optim.AdamW(network.parameters(), section.learning_rate, weight_decay=section.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, section.warmup))
    torch.manual_seed(seed)
    order = random.Random(seed)
    step, seen, best, highest, waited, kept = 0, 0, 0.0, -math.inf, 0, dict[str, torch.Tensor]()
    display = Display(train.progress_seconds)
    with display.work("training", total, at_once=True) as bar:
        while step < total and waited < section.patience:
            losses = []
            for batch in _epoch(rows, section.batch_size, order)[: total - step]:
                loss, norm = _backward(network, rows, labels, batch, cfg)
                # a GPU is synchronized anyway when it gets the rows of a step
                if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
                    raise _not_finite(network, rows, labels, batch, step + 1, cfg)
                losses.append(loss)
                optimizer.step()
                schedule.step()
                step, seen = step + 1, seen + len(batch)
                bar.move(step)
            with display.work("scoring validation", len(held)) as scored:
                values = evaluate(score(network, held, cfg, scored.moved))
            mean = float(torch.stack(losses).mean())
            record(step, {"loss": mean, **{f"eval_{name}": value for name, value in values.items()}})
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            line = f"  step {step}/{total}  validation: {numbers}"
            display.console.print(line, highlight=False, soft_wrap=True)
            waited += 1
            if rank(values, task) > highest:
                best, highest, waited = values[headline(task)], rank(values, task), 0
                kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(kept)
    return Fitted(sum(p.numel() for p in network.parameters()), best, seen, step)


def count_steps(section: Network, rows: int, max_steps: int | None) -> int:
    """Maximum number of optimizer steps."""
    return min(max_steps or 10**12, section.epochs * -(-rows // section.batch_size))


def _rate(step: int, total: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up from 0 to 1, then linear decay to 0."""
    rising = warmup * total
    return min(1.0, (step + 1) / rising if step + 1 < rising else (total - step) / max(1.0, total - rising))


def _epoch(rows: Rows, size: int, order: random.Random) -> list[list[int]]:
    """Batches of row numbers: shuffled rows, sorted by length within groups of batches, then shuffled batches."""
    numbers = list(range(len(rows)))
    order.shuffle(numbers)
    grouped = []
    for start in range(0, len(numbers), SORTED * size):
        part = sorted(numbers[start : start + SORTED * size], key=lambda row: len(rows[row]))
        grouped += [part[at : at + size] for at in range(0, len(part), size)]
    order.shuffle(grouped)
    return grouped


def _backward(
    network: torch.nn.Module, rows: Rows, labels: Targets, batch: Sequence[int], cfg: RunConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backpropagate the loss of a batch and clip the gradient norm to 1; returns the loss and the unclipped norm."""
    logits, targets = _logits(network, [rows[row] for row in batch]), np.asarray(labels)[list(batch)]
    expected = torch.from_numpy(targets).to(base.device())
    if cfg.data.task == "regression":
        loss = huber_loss(logits, expected.float(), delta=cfg.method.loss.delta)
    elif cfg.data.task == "multi_label":
        loss = binary_cross_entropy_with_logits(logits, expected.float())
    else:
        loss = cross_entropy(logits, expected)
    network.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)


def _not_finite(
    network: torch.nn.Module, rows: Rows, labels: Targets, batch: Sequence[int], number: int, cfg: RunConfig
) -> FinsaError:
    """The error for a non-finite loss or gradient, naming the rows that cause one individually."""
    alone = {row: torch.stack(_backward(network, rows, labels, [row], cfg)) for row in batch}
    bad = sorted(row for row, values in alone.items() if not bool(torch.isfinite(values).all()))
    shown = ", ".join(map(str, bad[:5])) or "no single row, only the whole batch"
    return FinsaError(
        f"training: loss or gradient of step {number} is infinite or NaN. Rows: {shown} ({len(bad)} of "
        f"{len(batch)}; indices of training rows, from 0). Check these rows, or lower method.baseline.learning_rate"
    )


def _logits(network: torch.nn.Module, rows: Rows) -> torch.Tensor:
    logits: torch.Tensor = network(padded(rows).to(base.device()), torch.tensor([len(row) for row in rows]))
    return logits


@torch.inference_mode()
def score(network: torch.nn.Module, rows: Rows, cfg: RunConfig, moved: Moved = ignored) -> FloatArray:
    """Log-probabilities of rows, in their order, (n, c); of tasks with values, the outputs."""
    training = network.training
    network.to(base.device()).eval()
    log_probs: dict[int, FloatArray] = {}
    for batch in batches([len(row) for row in rows], cfg.train.score_tokens):
        logits = _logits(network, [rows[row] for row in batch])
        scores = logits.double() if cfg.data.task in TASKS else logits.double().log_softmax(dim=1)
        log_probs |= dict(zip(batch, scores.cpu().numpy(), strict=True))
        moved(len(batch))
    network.train(training)
    return np.stack([log_probs[row] for row in range(len(rows))])
