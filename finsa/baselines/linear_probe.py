"""Logistic regression on the embeddings of a frozen encoder, which is what SetFit (Tunstall et al. 2022) ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from finsa import config
from finsa.baselines import Classes, Fitted, FloatArray, Judge, Record, Texts, encoder, linear
from finsa.config import RunConfig
from finsa.data import hub
from finsa.errors import ModelError
from finsa.models import base
from finsa.models.batches import batches, padded
from finsa.runs.progress import Moved, ignored

NUMBERS = "weights.npz"
PROBE = "利润同比增长 profit rose by 12 %"  # its embedding tells whether a run's encoder is the one it was trained with
DIFFERENCE = 0.01  # of unit vectors; other hardware and libraries stay far below, other weights far above


class LinearProbe:
    """A frozen encoder and a linear layer.

    Args:
        section: the settings.
        cfg: its ``data.max_length`` is the most tokens read.
        classes: how many there are.

    Raises:
        ModelError: where weights or tokenizer cannot be had.
    """

    def __init__(self, section: config.LinearProbe, cfg: RunConfig, classes: int) -> None:
        self.section, self.cfg, self.classes = section, cfg, classes
        self.tokenizer: Any = None
        self.model: Any = None
        self.weights, self.bias = np.zeros((classes, 0)), np.zeros(classes)

    def start(self, texts: Texts) -> None:
        """Load the encoder and its tokenizer."""
        if self.model is not None:
            return
        source, revision = encoder.source_of(self.section)
        refusal = hub.refusal(source)
        try:
            with hub.cache_alone(refusal):
                self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
                self.model = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise encoder.unavailable(self.section, source, refusal or error) from None
        self.model.to(base.device()).eval()

    def fit(self, texts: Texts, labels: Classes, held: Texts, judge: Judge, record: Record) -> Fitted:
        """Embed all texts once, then fit once per penalty; the validation rows choose.

        Raises:
            DataError: where the training rows have one class alone.
        """
        self.start(texts)
        (self.weights, self.bias), fitted = linear.fit(
            self.embed(texts),
            labels,
            self.classes,
            self.section.strengths,
            self.section.class_weight,
            self.embed(held),
            judge,
            record,
        )
        return fitted

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities: (n, c)."""
        self.start(texts)
        return linear.score(self.embed(texts, moved), (self.weights, self.bias))

    @torch.inference_mode()
    def embed(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Embeddings of texts, of unit length: (n, d)."""
        rows = self._tokens(texts, truncation=True, max_length=self._room())
        found: dict[int, FloatArray] = {}
        for batch in batches([len(row) for row in rows], self.cfg.train.score_tokens):
            lengths = torch.tensor([len(rows[row]) for row in batch], device=base.device())
            ids = padded([rows[row] for row in batch]).to(base.device())
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.double()  # (b, s, d)
            if self.section.pooling == "first":
                pooled = states[:, 0]
            else:
                pooled = (states * mask[..., None]).sum(1) / lengths[:, None]
            unit = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
            found |= dict(zip(batch, unit, strict=True))
            moved(len(batch))
        return np.stack([found[row] for row in range(len(rows))])

    def _tokens(self, texts: Texts, **settings: Any) -> list[list[int]]:
        """Tokens of each text behind the encoder's prefix; "[SEP]" in a text is text and no markup."""
        whole = [self.section.prefix + text for text in texts]
        return list(self.tokenizer(whole, split_special_tokens=True, **settings)["input_ids"])

    def _room(self) -> int:
        places = getattr(self.model.config, "max_position_embeddings", None) or self.cfg.data.max_length
        return min(self.cfg.data.max_length, self.tokenizer.model_max_length, places)

    def cut(self, texts: Texts) -> int:
        """How many texts have more tokens than are read."""
        room = self._room()
        return sum(len(tokens) > room for tokens in self._tokens(texts))

    def plan(self, texts: Texts) -> dict[str, object]:
        """Nothing is loaded."""
        strengths = ", ".join(f"{strength:g}" for strength in sorted(self.section.strengths))
        return {
            "encoder": f"{encoder.source_of(self.section)[0]}, frozen",
            "training": f"{len(texts):,} rows embedded once, one fit for each C of {strengths}",
        }

    def save(self, folder: Path) -> None:
        """Write the linear layer; of the encoder, which is not copied, the embedding of one text."""
        np.savez(folder / NUMBERS, weights=self.weights, bias=self.bias, probe=self.embed([PROBE])[0])

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote, and load the encoder from where the run had it.

        Raises:
            ModelError: where that is another encoder by now.
        """
        with np.load(folder / NUMBERS, allow_pickle=False) as numbers:
            self.weights, self.bias, probe = numbers["weights"], numbers["bias"], numbers["probe"]
        self.start(())
        found = self.embed([PROBE])[0]
        if found.shape != probe.shape or float(np.abs(found - probe).max()) > DIFFERENCE:
            source = encoder.source_of(self.section)[0]
            raise ModelError(
                f"run: the encoder at {source} is not the one that this run was trained with; restore its files, or "
                "train again"
            )
