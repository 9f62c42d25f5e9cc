"""A BERT-style encoder, its tokenizer and a fresh classification head, all fine-tuned (Devlin et al. 2019)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from finsa import config
from finsa.baselines import Classes, Fitted, FloatArray, Judge, Record, Texts, training_loop
from finsa.config import RunConfig, locate
from finsa.data import hub
from finsa.errors import ConfigError, ModelError, Problem, suggest
from finsa.runs.progress import Moved, ignored

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


class Encoder:
    """A pre-trained encoder, or a small one from random weights.

    Args:
        section: the settings.
        cfg: its ``data.max_length`` is the most tokens read; seed and limits of the run.
        classes: how many there are.

    Raises:
        ModelError: where weights or tokenizer cannot be had.
    """

    def __init__(self, section: config.Encoder, cfg: RunConfig, classes: int) -> None:
        self.section, self.cfg, self.classes = section, cfg, classes
        self.tokenizer: Any = None
        self.network: nn.Module = nn.Module()

    def fit(self, texts: Texts, labels: Classes, held: Texts, judge: Judge, record: Record) -> Fitted:
        """Load or build, then train all parameters."""
        if self.tokenizer is None:
            self.start(texts)
        run = (self.section, self.cfg.seed, self.cfg.train)
        rows, held_rows = self._encode(texts), self._encode(held)
        return training_loop.fit(self.network, rows, labels, held_rows, judge, record, *run)

    def start(self, texts: Texts) -> None:
        """Load the encoder and its tokenizer, or build both."""
        torch.manual_seed(self.cfg.seed)
        if self.section.weights == "random":
            self.tokenizer = character_tokenizer(texts)
            shape = architecture(self.section, len(self.tokenizer), self.classes)
            self.network = Logits(AutoModelForSequenceClassification.from_config(shape))
            return
        source, revision = source_of(self.section)
        refusal = hub.refusal(source)
        try:
            with hub.cache_alone(refusal):
                self._load(source, revision)
        except (OSError, ValueError) as error:
            raise unavailable(self.section, source, refusal or error) from None
        self.network.fresh_head()  # type: ignore[operator]

    def _load(self, source: str, revision: str | None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            revision=revision,
            num_labels=self.classes,
            ignore_mismatched_sizes=True,  # a head for other classes; a fresh one takes its place
            dtype=torch.float32,
        )
        self.network = Logits(model)

    def _encode(self, texts: Texts) -> list[list[int]]:
        return self._tokens(texts, truncation=True, max_length=self._room())

    def _tokens(self, texts: Texts, **settings: Any) -> list[list[int]]:
        """Tokens of each text; "[SEP]" in one is text and no markup."""
        return list(self.tokenizer(list(texts), split_special_tokens=True, **settings)["input_ids"])

    def _room(self) -> int:
        places = getattr(self.network.model.config, "max_position_embeddings", None)  # type: ignore[union-attr]
        return min(self.cfg.data.max_length, self.tokenizer.model_max_length, places or self.cfg.data.max_length)

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities: (n, c)."""
        return training_loop.score(self.network, self._encode(texts), self.cfg.train.score_tokens, moved)

    def cut(self, texts: Texts) -> int:
        """How many texts have more tokens than are read."""
        room = self._room()
        return sum(len(tokens) > room for tokens in self._tokens(texts))

    def plan(self, texts: Texts) -> dict[str, object]:
        """Shapes are built without memory; nothing is loaded but the encoder's own configuration."""
        steps = training_loop.steps_of(self.section, len(texts), self.cfg.train.max_steps)
        named = source_of(self.section)[0] if self.section.weights == "pretrained" else "random weights"
        return {
            "encoder": named,
            "parameters": self._size(texts),
            "training": f"{len(texts):,} rows, at most {steps:,} steps of {self.section.batch_size} rows",
        }

    def _size(self, texts: Texts) -> str:
        if self.section.weights == "random":
            shape = architecture(self.section, len(character_tokenizer(texts)), self.classes)
        else:
            source, revision = source_of(self.section)
            try:
                shape = AutoConfig.from_pretrained(
                    source, revision=revision, local_files_only=True, num_labels=self.classes
                )
            except (OSError, ValueError):
                return "unknown: the encoder is not on this machine"
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(shape)
        return f"{sum(p.numel() for p in model.parameters()):,}"

    def save(self, folder: Path) -> None:
        """Write an ordinary folder of transformers: weights, configuration, tokenizer."""
        self.network.model.save_pretrained(folder)  # type: ignore[operator, union-attr]
        self.tokenizer.save_pretrained(folder)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self._load(str(folder), None)


class Logits(nn.Module):
    """A model of transformers, asked in the loop's way."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits (b, c) of ids (b, s) with lengths (b,)."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return logits

    def fresh_head(self) -> None:
        """Draw what stands outside the encoder anew: a head that came with it may mean other classes."""
        for child in self.model.children():
            if child is not self.model.base_model:
                for module in child.modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()


def character_tokenizer(texts: Texts) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character of the texts, lower-cased, without spaces."""
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
    """The configuration of an encoder with random weights.

    Raises:
        ConfigError: for keys the architecture does not know; transformers itself would keep them silently.
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


def source_of(section: config.Encoder | config.LinearProbe) -> tuple[str, str | None]:
    """Where to load from: a folder, or a hub id with its revision."""
    if section.path:
        return str(locate(section.path)), None
    return str(section.hub_id), section.revision


def unavailable(section: config.Encoder | config.LinearProbe, source: str, error: Exception | str) -> ModelError:
    """What to do about an encoder that cannot be had."""
    reason = str(error).splitlines()[0][:160].rstrip(".")
    if section.path:
        return ModelError(f"method.baseline.path: no encoder at {source}: {reason}")
    without = ", or method.baseline.weights=random" if isinstance(section, config.Encoder) else ""
    return ModelError(
        f"method.baseline.hub_id: {source} cannot be had ({reason}). With network: hf download {source} --revision "
        f"{section.revision}. Without: method.baseline.path=<folder>{without}"
    )
