"""BERT-style encoders: fine-tuned with a new classification head, or frozen below a logistic regression."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from finsa import config
from finsa.baselines import Evaluate, Fitted, FloatArray, Learner, Record, Targets, Texts, neural
from finsa.baselines.linear import NUMBERS, LinearLearner
from finsa.config import RunConfig, locate
from finsa.data import hub
from finsa.errors import ConfigError, ModelError, Problem, suggest
from finsa.models import base
from finsa.models.batches import batches, padded
from finsa.runs.progress import Moved, ignored

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
PROBE = "利润同比增长 profit rose by 12 %"  # a run stores its embedding to detect a different encoder
DIFFERENCE = 0.01  # between unit vectors; other hardware and libraries differ far less, other weights far more


class Encoder(Learner):
    """A pre-trained encoder (Devlin et al. 2019), or a small one with random weights, fine-tuned with a new head.

    Args:
        section: the settings.
        cfg: the run's configuration: ``data.max_length`` is the maximum number of tokens, besides seed and limits.
        classes: number of classes.

    Raises:
        ModelError: if the weights or the tokenizer are not available.
    """

    def __init__(self, section: config.Encoder, cfg: RunConfig, classes: int) -> None:
        self.section, self.cfg, self.classes = section, cfg, classes
        self.tokenizer: Any = None
        self.network: nn.Module = nn.Module()

    def start(self, texts: Texts) -> None:
        """Load the encoder and its tokenizer, or build both."""
        torch.manual_seed(self.cfg.seed)
        if self.section.weights == "random":
            self.tokenizer = character_tokenizer(texts)
            shape = architecture(self.section, len(self.tokenizer), self.classes)
            self.network = Logits(AutoModelForSequenceClassification.from_config(shape))
            return
        self.tokenizer, model = load_pretrained(
            self.section,
            AutoModelForSequenceClassification,
            num_labels=self.classes,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced
        )
        for child in model.children():  # the encoder's checkpoint head may be for other classes
            if child is not model.base_model:
                for module in child.modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
        self.network = Logits(model)

    def fit(self, texts: Texts, labels: Targets, held: Texts, evaluate: Evaluate, record: Record) -> Fitted:
        """Load or build the encoder, then train all parameters."""
        if self.tokenizer is None:
            self.start(texts)
        rows, held_rows = self._encode(texts), self._encode(held)
        return neural.fit(self.network, rows, labels, held_rows, evaluate, record, self.section, self.cfg)

    def _limit(self) -> int:
        return token_limit(self.network.model, self.tokenizer, self.cfg)

    def _encode(self, texts: Texts) -> list[list[int]]:
        return tokenize(self.tokenizer, texts, self._limit())

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities: (n, c)."""
        return neural.score(self.network, self._encode(texts), self.cfg, moved)

    def count_truncated(self, texts: Texts) -> int:
        """Number of texts with more tokens than the limit."""
        limit = self._limit()
        return sum(len(tokens) > limit for tokens in tokenize(self.tokenizer, texts))

    def plan(self, texts: Texts) -> dict[str, object]:
        """Count the parameters on the meta device; only the encoder's configuration is loaded."""
        steps = neural.count_steps(self.section, len(texts), self.cfg.train.max_steps)
        name, shape = "random weights", None
        if self.section.weights == "random":
            shape = architecture(self.section, len(character_tokenizer(texts)), self.classes)
        else:
            name, revision = source_of(self.section)
            options = {"revision": revision, "local_files_only": True, "num_labels": self.classes}
            with suppress(OSError, ValueError):
                shape = AutoConfig.from_pretrained(name, **options)
        parameters = "unknown: the encoder is not on this machine"
        if shape is not None:
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(shape)
            parameters = f"{sum(p.numel() for p in model.parameters()):,}"
        training = f"{len(texts):,} rows, at most {steps:,} steps of {self.section.batch_size} rows"
        return {"encoder": name, "parameters": parameters, "training": training}

    def save(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer with `save_pretrained`."""
        self.network.model.save_pretrained(folder)  # type: ignore[operator, union-attr]
        self.tokenizer.save_pretrained(folder)

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.network = Logits(
            AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=self.classes, ignore_mismatched_sizes=True, dtype=torch.float32
            )
        )


class LinearProbe(LinearLearner):
    """Logistic regression on the embeddings of a frozen encoder, the second half of SetFit (Tunstall et al. 2022).

    Args:
        section: the settings.
        cfg: the run's configuration; ``data.max_length`` is the maximum number of tokens.
        classes: number of classes.

    Raises:
        ModelError: if the weights or the tokenizer are not available.
    """

    def __init__(self, section: config.LinearProbe, cfg: RunConfig, classes: int) -> None:
        super().__init__(section, classes, cfg.data.task)
        self.section, self.cfg = section, cfg
        self.tokenizer: Any = None
        self.model: Any = None

    def start(self, texts: Texts) -> None:
        """Load the encoder and its tokenizer."""
        if self.model is None:
            self.tokenizer, model = load_pretrained(self.section, AutoModel)
            self.model = model.to(base.device()).eval()

    @torch.inference_mode()
    def features(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Unit-length embeddings of texts: (n, d)."""
        self.start(texts)
        limit = token_limit(self.model, self.tokenizer, self.cfg)
        rows = tokenize(self.tokenizer, self._prefixed(texts), limit)
        embeddings: dict[int, FloatArray] = {}
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
            embeddings |= dict(zip(batch, unit, strict=True))
            moved(len(batch))
        return np.stack([embeddings[row] for row in range(len(rows))])

    def _prefixed(self, texts: Texts) -> list[str]:
        return [self.section.prefix + text for text in texts]

    def count_truncated(self, texts: Texts) -> int:
        """Number of texts with more tokens than the limit."""
        limit = token_limit(self.model, self.tokenizer, self.cfg)
        return sum(len(tokens) > limit for tokens in tokenize(self.tokenizer, self._prefixed(texts)))

    def plan(self, texts: Texts) -> dict[str, object]:
        """Describe the encoder and the fits, without loading anything."""
        strengths = ", ".join(f"{strength:g}" for strength in self.strengths)
        return {
            "encoder": f"{source_of(self.section)[0]}, frozen",
            "training": f"{len(texts):,} rows embedded once, one fit for each C of {strengths}",
        }

    def save(self, folder: Path) -> None:
        """Write the linear layer, and the embedding of one text to identify the encoder, which is not copied."""
        np.savez(folder / NUMBERS, weights=self.weights, bias=self.bias, probe=self.features([PROBE])[0])

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote, and the encoder from the location that the run used.

        Raises:
            ModelError: if there is now a different encoder.
        """
        with np.load(folder / NUMBERS, allow_pickle=False) as numbers:
            self.weights, self.bias, probe = numbers["weights"], numbers["bias"], numbers["probe"]
        embedding = self.features([PROBE])[0]
        if embedding.shape != probe.shape or float(np.abs(embedding - probe).max()) > DIFFERENCE:
            raise ModelError(
                f"run: the encoder at {source_of(self.section)[0]} is not the one that this run was trained with; "
                "restore its files, or train again"
            )


class Logits(nn.Module):
    """A transformers sequence classifier with the call signature that `neural.fit` expects."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits (b, c) of ids (b, s) with lengths (b,)."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return logits


def load_pretrained(section: config.Encoder | config.LinearProbe, kind: Any, **options: Any) -> tuple[Any, Any]:
    """Load a tokenizer and an encoder in float32.

    Args:
        section: the settings.
        kind: an ``Auto...`` class of transformers.
        options: for its ``from_pretrained``.

    Raises:
        ModelError: if the weights or the tokenizer are not available, with the command that downloads them.
    """
    source, revision = source_of(section)
    refusal = hub.refusal(source)
    try:
        with hub.cache_alone(refusal):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            return tokenizer, kind.from_pretrained(source, revision=revision, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        reason = str(refusal or error).splitlines()[0][:160].rstrip(".")
    if section.path:
        raise ModelError(f"method.baseline.path: no encoder at {source}: {reason}")
    without = ", or method.baseline.weights=random" if isinstance(section, config.Encoder) else ""
    raise ModelError(
        f"method.baseline.hub_id: {source} is not available ({reason}). With network: hf download {source} --revision "
        f"{section.revision}. Without: method.baseline.path=<folder>{without}"
    )


def source_of(section: config.Encoder | config.LinearProbe) -> tuple[str, str | None]:
    """The source to load from: a folder, or a hub id and its revision."""
    if section.path:
        return str(locate(section.path)), None
    return str(section.hub_id), section.revision


def token_limit(model: Any, tokenizer: Any, cfg: RunConfig) -> int:
    """Maximum number of tokens read per text."""
    positions = getattr(model.config, "max_position_embeddings", None) or cfg.data.max_length
    return min(cfg.data.max_length, tokenizer.model_max_length, positions)


def tokenize(tokenizer: Any, texts: Texts, limit: int | None = None) -> list[list[int]]:
    """Token ids of each text, truncated to a limit; special tokens such as "[SEP]" in a text are plain text."""
    options = {} if limit is None else {"truncation": True, "max_length": limit}
    return list(tokenizer(list(texts), split_special_tokens=True, **options)["input_ids"])


def character_tokenizer(texts: Texts) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per lower-cased character of the texts, without spaces."""
    known = sorted({character for text in texts for character in text.lower() if not character.isspace()})
    vocabulary = {token: number for number, token in enumerate([*SPECIAL.values(), *known])}
    built = Tokenizer(models.WordLevel(vocabulary, SPECIAL["unk_token"]))
    built.normalizer = normalizers.Lowercase()
    single = pre_tokenizers.Split(Regex("."), behavior="isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), single])
    ends = [(SPECIAL[name], vocabulary[SPECIAL[name]]) for name in ("cls_token", "sep_token")]
    built.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=built, **SPECIAL)


def architecture(section: config.Encoder, vocabulary: int, classes: int) -> PretrainedConfig:
    """Configuration of an encoder with random weights.

    Raises:
        ConfigError: for unknown architecture keys, which transformers would silently accept.
    """
    block, path = dict(section.architecture), "method.baseline.architecture"
    try:
        known = set(AutoConfig.for_model(block["model_type"]).to_dict())
    except ValueError:
        raise ConfigError([Problem(f"{path}.model_type", f"transformers knows no '{block['model_type']}'")]) from None
    if set(block) - known:
        unknown = sorted(set(block) - known)
        raise ConfigError(Problem(f"{path}.{key}", f"unknown key. {suggest(key, known)}") for key in unknown)
    return AutoConfig.for_model(**{**block, "vocab_size": vocabulary, "pad_token_id": 0, "num_labels": classes})
