"""TextCNN (Kim 2014) and BiLSTM (Graves & Schmidhuber 2005), embeddings learnt from the training rows alone.

Letters: b rows of a batch, s units, e width of an embedding, f filters or states, c classes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from finsa import config
from finsa.baselines import Classes, Fitted, FloatArray, Judge, Record, Texts, training_loop
from finsa.config import RunConfig
from finsa.models import tokenizers
from finsa.runs.progress import Moved, ignored

UNITS, WEIGHTS = "units.json", "model.safetensors"
UNKNOWN, KNOWN = 1, 2  # ids: 0 pads, 1 is any rare unit, known ones follow
WORD = re.compile(r"[^\W\d_\u0250-\U0010ffff]+|\S")  # a run of Latin letters, or any other character but a space


class FromScratch:
    """A small network over the units of a text.

    Args:
        section: the settings.
        cfg: its ``data.max_length`` is the most units read; seed, model (for its tokenizer) and limits of the run.
        classes: how many there are.
    """

    def __init__(self, section: config.TextCnn | config.BiLstm, cfg: RunConfig, classes: int) -> None:
        self.section, self.cfg, self.classes = section, cfg, classes
        self.tokenizer: Any = tokenizers.load_tokenizer(cfg.model) if section.units == "model" else None
        self.numbers: dict[str, int] = {}
        self.network = nn.Module()

    def start(self, texts: Texts) -> None:
        """Nothing is needed."""

    def fit(self, texts: Texts, labels: Classes, held: Texts, judge: Judge, record: Record) -> Fitted:
        """Number the units of the training rows, then train."""
        units = [self._units(text) for text in texts]
        self._number(units)
        rows = [self._ids(text) for text in units]
        run = (self.section, self.cfg.seed, self.cfg.train)
        return training_loop.fit(self.network, rows, labels, self._encode(held), judge, record, *run)

    def _number(self, units: Sequence[Sequence[str]]) -> None:
        """Number the units that are frequent enough, and build the network for as many."""
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
        return training_loop.score(self.network, self._encode(texts), self.cfg.train.score_tokens, moved)

    def cut(self, texts: Texts) -> int:
        """How many texts have more units than are read."""
        return sum(len(self._units(text)) > self.cfg.data.max_length for text in texts)

    def plan(self, texts: Texts) -> dict[str, object]:
        """Units are counted and the network is built; nothing is trained."""
        self._number([self._units(text) for text in texts])
        steps = training_loop.steps_of(self.section, len(texts), self.cfg.train.max_steps)
        return {
            "units": f"{len(self.numbers):,} ({self.section.units}), each in {self.section.min_rows} rows or more",
            "texts cut": f"{self.cut(texts):,} of the training rows, at {self.cfg.data.max_length} units",
            "parameters": f"{sum(p.numel() for p in self.network.parameters()):,}",
            "training": f"{len(texts):,} rows, at most {steps:,} steps of {self.section.batch_size} rows",
        }

    def save(self, folder: Path) -> None:
        """Write units and weights."""
        (folder / UNITS).write_text(json.dumps(list(self.numbers)), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}, folder / WEIGHTS)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self._build(json.loads((folder / UNITS).read_text(encoding="utf-8")))
        try:
            self.network.load_state_dict(load_file(folder / WEIGHTS))
        except RuntimeError as error:
            raise ValueError(f"{WEIGHTS} does not fit: {error}") from None


class TextCnn(nn.Module):
    """Filters of several widths over the embeddings, the largest value of each, one linear layer.

    Args:
        section: its sizes.
        units: entries of the vocabulary, padding and unknown included.
        classes: how many there are.
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
            found = module(states)  # (b, f, s - width + 1)
            last = (lengths.to(ids.device) - width).clamp(min=0)  # a text shorter than the filter has one place
            beyond = torch.arange(found.shape[2], device=ids.device) > last[:, None]
            pooled.append(found.masked_fill(beyond[:, None], -torch.inf).amax(dim=2).relu())
        logits: torch.Tensor = self.out(self.dropout(torch.cat(pooled, dim=1)))
        return logits


class BiLstm(nn.Module):
    """A recurrent network in both directions, its states pooled over the text, one linear layer.

    Args:
        section: its sizes.
        units: entries of the vocabulary, padding and unknown included.
        classes: how many there are.
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
