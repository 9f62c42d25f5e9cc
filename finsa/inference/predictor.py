"""Loading a run or export folder as a predictor of texts, for evaluation, prediction, export and serving.

`read` reads a folder without loading weights, `load` loads the weights, `restore` does both. Prompt, labels, scoring
rule and calibration are those of the run, so that all stages use its model in the same way.

torch, transformers and peft take seconds to import, so they are imported only to load a model: errors in a command are
reported before that, and a classical baseline never imports them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finsa import baselines
from finsa.config import Data, MoeJointStage, RunConfig, Scoring, Train, compose
from finsa.data import few_shot, tokenized
from finsa.data.cleaning import normalize
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import LEAST, Renderer
from finsa.data.values import TASKS
from finsa.errors import ConfigError, ModelError, Problem, RunError
from finsa.evaluation import metrics, selective, value_metrics
from finsa.inference import graphs
from finsa.models import folders, quantization, tokenizers
from finsa.runs import processes, provenance, run_folder
from finsa.runs.progress import Moved, ignored
from finsa.session import Session

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float64]
NO_LABELS = ("evaluate", "inspect", "pretrain", "report", "serve")  # stages whose folders contain no label model
MANIFEST = "manifest.json"  # of an export
FORMATS = ("adapter", "merged", "classifier", "onnx", "gguf")
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "gguf": ("llama_cpp",)}  # of a format
EXTRAS = {"onnx": "export", "gguf": "gguf"}


@dataclass(frozen=True)
class Record:
    """The records of a run or export folder about its model.

    Args:
        path: the folder of a run or of an export.
        cfg: the run's configuration.
        facts: the run's ``run.json``.
        labels: the label space.
        manifest: the manifest of an export; empty for a run.
        members: the runs that a cascade consists of; empty for others.
    """

    path: Path
    cfg: RunConfig
    facts: dict[str, Any]
    labels: LabelSpace
    manifest: dict[str, Any] = field(default_factory=dict)
    members: tuple[Record, ...] = ()

    @property
    def format(self) -> str | None:
        """Format of an export; None for a run."""
        return self.manifest.get("format")

    @property
    def temperature(self) -> float:
        """The fitted temperature that divides log-probabilities before the softmax; 1 if none was fitted."""
        return float((self.facts.get("calibration") or {}).get("temperature", 1.0))

    @property
    def uses_torch(self) -> bool:
        """Whether the model runs on torch."""
        return self.format not in ("onnx", "gguf") and any(one.cfg.method.uses_torch for one in self.members or (self,))

    @property
    def name(self) -> str:
        """Method, model and data of the run, and the format of an export."""
        parts = [self.cfg.method.name, self.cfg.model.name, self.cfg.data.title]
        if self.cfg.method.baseline is not None:
            del parts[1]
        if self.format is not None:
            precision = self.manifest.get("precision")
            parts.append(f"{self.format} {precision}" if precision else self.format)
        if self.cfg.model.inference == "int8":
            parts.append("int8")
        return ", ".join(parts)


def significant(numbers: Any) -> list[float]:
    """Numbers with seven significant digits."""
    return [float(f"{number:.7g}") for number in numbers]


@dataclass(frozen=True)
class Predictions:
    """Predictions for n texts, c labels, E experts.

    Args:
        labels: names in fixed order, (c,); none for the output of a regression head.
        log_probs: log-probability of each whole label, uncalibrated, (n, c); see `value_metrics` for other tasks.
        probs: calibrated probabilities: ``softmax(log_probs / temperature)`` over the labels, (n, c).
        truncated: whether a text was truncated, (n,).
        gates: a mixture's expert weights, (n, E); None for other models.
        experts: names of the experts, (E,).
        task: of the data set.
        values: predicted numbers, (n, 1), or sets of labels, (n, c); None for one class per text.
        thoughts: texts of the thoughts before the answer, (n, k); None if the model does not think.
        decisions: ``abstain`` and ``label_set`` of each text, as far as limits are set.
    """

    labels: tuple[str, ...]
    log_probs: FloatArray
    probs: FloatArray
    truncated: list[bool]
    gates: FloatArray | None = None
    experts: tuple[str, ...] = ()
    task: str = "classification"
    values: FloatArray | None = None
    thoughts: list[list[str]] | None = None
    decisions: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, list[float]]:
        """``level``, the expected level of ordered labels, or ``number``, the predicted number, of each text."""
        if self.task == "ordinal":
            return {"level": metrics.expected_level(self.probs).round(6).tolist()}
        if self.task == "regression" and self.values is not None:
            return {"number": significant(self.values[:, 0])}
        return {}

    @property
    def sets(self) -> list[list[str]] | None:
        """The labels that apply to each text; None for tasks with one class or number per text."""
        if self.task != "multi_label" or self.values is None:
            return None
        return [[name for name, has in zip(self.labels, row, strict=True) if has] for row in self.values]

    @property
    def predicted(self) -> list[str]:
        """The most probable label of each text; its number; or its labels, separated by ``; ``."""
        if self.sets is not None:
            return ["; ".join(names) for names in self.sets]
        if self.values is not None:
            return [f"{number:.4g}" for number in self.values[:, 0]]
        return [self.labels[number] for number in self.log_probs.argmax(axis=1)]

    @property
    def routes(self) -> list[str] | None:
        """The expert with the largest weight for each text; None without experts."""
        if self.gates is None or not self.experts:
            return None
        return [self.experts[number] for number in self.gates.argmax(axis=1)]


class Scorer(Protocol):
    """Scores prompts or texts: (n, c) log-probabilities."""

    def score(self, inputs: Any, moved: Moved = ignored) -> FloatArray:
        """Score inputs in order; `moved` is called with the number of newly scored inputs."""


class Predictor:
    """Predicts labels with the model of a run.

    Args:
        record: of the run or export.
        scorer: scores inputs.
        rule: name of the scoring rule.
        renderer: renders prompts; None: the scorer takes texts.
        count_truncated: counts the texts that a scorer of texts truncates.
        model: provides the experts' names; released by `close`.
    """

    def __init__(
        self,
        record: Record,
        scorer: Scorer,
        rule: str,
        renderer: Renderer | None = None,
        count_truncated: Callable[[Sequence[str]], int | None] | None = None,
        model: torch.nn.Module | None = None,
    ) -> None:
        self.record, self.scorer, self.rule, self.renderer, self.model = record, scorer, rule, renderer, model
        self.cfg, self.facts, self.path, self.name = record.cfg, record.facts, record.path, record.name
        self.labels: tuple[str, ...] = record.labels.names
        self.task, self.temperature = record.labels.task, record.temperature
        self.thresholds = list((record.facts.get("calibration") or {}).get("thresholds", {}).values()) or None
        one_output = self.task == "regression" and (record.cfg.method.head == "classifier" or renderer is None)
        self.probable = () if one_output else self.labels  # the labels that have a probability
        self.experts: tuple[str, ...] = tuple(getattr(model or scorer, "experts", ()))
        self._count_truncated = count_truncated
        self.selection: selective.Rule | None = None  # set by stages with limits of risk or coverage
        bias = record.facts.get("contextual_bias")
        self.bias = None if bias is None else np.array(bias)

    def __call__(
        self, texts: Sequence[str], moved: Moved = ignored, models: Sequence[str] | None = None
    ) -> Predictions:
        """Predict the labels of texts in order.

        Args:
            texts: n texts.
            moved: called with the number of newly scored texts.
            models: the served model that scores each text, if a server has several.
        """
        inputs: Any = [normalize(text) for text in texts]
        if self.renderer is not None:
            inputs = self.renderer.encode(inputs)
            truncated = [bool(tokens) for tokens in inputs.cut]
        else:
            truncated = [self._is_truncated(text) for text in inputs]
        # Without texts, the scorer's gates would be those of an earlier call.
        log_probs = self._score(inputs, moved, models) if truncated else np.zeros((0, len(self.probable) or 1))
        gates, labels, values = self.gates if truncated else None, self.record.labels, None
        thoughts = self.thoughts if truncated else None
        if self.task in TASKS:
            probs = value_metrics.probabilities(labels, log_probs, self.temperature)
            values = value_metrics.decide(labels, log_probs, self.temperature, self.thresholds)
        else:
            probs = metrics.probabilities(log_probs, self.temperature)
        decisions = self.selection.cells(probs) if self.selection else {}
        return Predictions(
            self.probable, log_probs, probs, truncated, gates, self.experts, self.task, values, thoughts, decisions
        )

    def check_room(self, texts: Sequence[tuple[str, int, str | None]]) -> list[tuple[str, str | None]]:
        """Reject texts whose fixed part leaves no room for the rest, as training does.

        Args:
            texts: from `Reading.text_of`: text, length of its fixed part, and the reason why it cannot be used.

        Returns:
            Each text, and the reason why it cannot be used.
        """
        whole, fixed = [text for text, _, _ in texts], [count for _, count, _ in texts]
        if self.renderer is not None:
            room = self.renderer.room
            reasons = {
                number: f"the fixed part needs {tokens:,} tokens, but only {room:,} are available"
                for number, tokens in self.renderer.crowded(whole, fixed).items()
            }
        else:
            starts = {number: whole[number][: count + LEAST] for number, count in enumerate(fixed) if count}
            reasons = {
                number: "the instruction or the earlier turns fill the text"
                for number, start in starts.items()
                if self._is_truncated(start)
            }
        return [
            (text, f"no room for the input: {reasons[number]}" if number in reasons else fault)
            for number, (text, _, fault) in enumerate(texts)
        ]

    def _is_truncated(self, text: str) -> bool:
        return self._count_truncated is not None and bool(self._count_truncated([text]))

    @property
    def gates(self) -> FloatArray | None:
        """A mixture's gates for the last scored inputs, (n, E)."""
        return getattr(self.scorer, "gates", None)

    @property
    def thinks(self) -> bool:
        """Whether the model writes thoughts."""
        return self.cfg.model.think == "open" and self.cfg.method.baseline is None

    @property
    def thoughts(self) -> list[list[str]] | None:
        """Texts of the thoughts on the last scored inputs, (n, k); None if the model does not think."""
        written = getattr(self.scorer, "thoughts", None)
        return None if written is None else [[thought.text for thought in row] for row in written]

    @property
    def costs(self) -> dict[str, float]:
        """Generated tokens per answer and share of cut thoughts, of the last scored inputs."""
        from finsa.inference.scoring import thought_costs  # imports torch

        return thought_costs(self.scorer)

    def score(self, job: tokenized.Labeled, split: str, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities (n, c) of a split; the prompts of a tokenized data set are reused.

        Args:
            job: contains the split.
            split: name of the split.
            moved: called with the number of newly scored rows.

        Raises:
            ModelError: if the labels of the rows differ from those of the run.
        """
        if job.dataset.labels.names != self.labels:
            raise ModelError(
                f"run: the labels of {self.path} are {', '.join(self.labels)}; these rows have "
                f"{', '.join(job.dataset.labels.names)}"
            )
        if isinstance(job, tokenized.TokenizedDataset) and self.renderer is not None:
            return self._score(job.prompts(split), moved)
        if self.cfg.method.baseline is not None and self._count_truncated is not None:
            counts = {name: self._count_truncated(job.texts(name)) for name in job.dataset.splits}
            job.cut.update({name: count for name, count in counts.items() if count is not None})
        return self._score(job.texts(split), moved)

    def choose(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The served model that scores a row, and the reason why there is none; both are None without a choice."""
        scorer: Any = self.scorer
        if getattr(scorer, "adapters", None) is None:
            return None, None
        model = scorer.choose(row)
        return model, None if model else f"stage.adapters has no model for {scorer.column}={row.get(scorer.column)}"

    def _score(self, inputs: Any, moved: Moved, models: Sequence[str] | None = None) -> FloatArray:
        scorer: Any = self.scorer
        log_probs: FloatArray = scorer.score(inputs, moved, models) if models else scorer.score(inputs, moved)
        return log_probs if self.bias is None else log_probs - self.bias

    def quantize(self) -> None:
        """Replace the linear layers of the model by those of int8, in place."""
        from finsa.models import int8  # imports torch

        int8.quantize(self.model)
        scorer: Any = self.scorer
        scorer.batch_tokens = min(scorer.batch_tokens, int8.BATCH_TOKENS)

    def close(self) -> None:
        """Release a shared base model, unchanged."""
        if self.model is not None:
            from finsa.models import factory  # imports torch

            factory.detach(self.model)


class Cascade(Predictor):
    """Predicts each text with the first of several runs that is sure of it; the last one answers the others.

    Args:
        record: of the run of stage=cascade.
        predictors: of its runs, in order.
    """

    RULE = "cascade"

    def __init__(self, record: Record, predictors: Sequence[Predictor]) -> None:
        super().__init__(record, predictors[-1].scorer, self.RULE)
        self.predictors, self.surer_than = predictors, record.facts["cascade"]["thresholds"]
        names = [one.cfg.method.name for one in predictors]
        self.experts = tuple(
            name if names.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(names, start=1)
        )
        self._gates: FloatArray | None = None

    def __call__(
        self, texts: Sequence[str], moved: Moved = ignored, models: Sequence[str] | None = None
    ) -> Predictions:
        """Predict texts in order; later runs see only the texts that the earlier ones leave."""
        probs, truncated = np.zeros((len(texts), len(self.labels))), [False] * len(texts)
        gates, left = np.zeros((len(texts), len(self.predictors))), np.arange(len(texts))
        for number, predictor in enumerate(self.predictors):
            answers = predictor([texts[row] for row in left.tolist()])
            rounded = answers.probs.round(selective.DIGITS)
            bar = self.surer_than[number] if number < len(self.surer_than) else -1.0
            sure = rounded.max(axis=1, initial=0) > bar
            probs[left[sure]], gates[left[sure], number] = rounded[sure], 1.0
            for row, cut in zip(left, answers.truncated, strict=True):
                truncated[row] = cut
            left = left[~sure]
            moved(int(sure.sum()))
        self._gates = gates
        log_probs = np.log(np.maximum(probs, 10.0**-selective.DIGITS))
        decisions = self.selection.cells(probs) if self.selection else {}
        return Predictions(
            self.labels, log_probs, probs, truncated, gates, self.experts, self.task, decisions=decisions
        )

    def score(self, job: tokenized.Labeled, split: str, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities (n, c) of a split."""
        if job.dataset.labels.names != self.labels:
            raise ModelError(f"run: the labels of {self.path} are {', '.join(self.labels)}; these rows have others")
        return self(job.texts(split), moved).log_probs

    def check_room(self, texts: Sequence[tuple[str, int, str | None]]) -> list[tuple[str, str | None]]:
        """Reject texts without room in any of the runs."""
        checked = [predictor.check_room(texts) for predictor in self.predictors]
        return [next((one for one in found if one[1]), found[0]) for found in zip(*checked, strict=True)]

    @property
    def gates(self) -> FloatArray | None:
        """Which run answered each of the last texts, (n, m): a 1 for that run."""
        return self._gates

    @property
    def thinks(self) -> bool:
        """Whether thoughts are among the predictions: those of the runs are left out."""
        return False

    @property
    def thoughts(self) -> None:
        """None."""

    def close(self) -> None:
        """Release the models of all runs."""
        for predictor in self.predictors:
            predictor.close()


# ------------------------------------------------------------------------------------------------ folders


def read(folder: str) -> Record:
    """Read a run or export folder without loading weights.

    Raises:
        RunError: if the folder is not a finished training run, or its base model no longer exists.
    """
    path, cfg, facts = run_folder.read(folder)
    if facts.get("stage") in NO_LABELS:
        raise RunError(
            f"run: {path} was written by stage={facts['stage']}; name the folder of a run that was trained on labels"
        )
    manifest = read_manifest(path)
    if cfg.method.baseline is None:
        whole = (path / "model" / folders.CONFIG).is_file() or manifest.get("format", "adapter") != "adapter"
        problems = [] if whole else list(folders.weights_problems(cfg.model))
        problems += [] if manifest or problems else list(folders.tokenizer_problems(cfg.model))
        if problems:
            raise RunError(f"run: {path} needs the model that it was trained on. {problems[0]}")
    members: tuple[Record, ...] = ()
    if facts.get("stage") == "cascade":
        try:
            members = tuple(read(run) for run in facts["cascade"]["runs"])
        except RunError as error:
            raise RunError(f"run: {path} is a cascade, which reads the folders of its runs. {error}") from None
    labels = facts.get("labels")
    if labels is None:  # runs of older versions have them only in metrics.json
        file = path / "metrics.json"
        kept = json.loads(file.read_text(encoding="utf-8"))["test"]["per_class"] if file.is_file() else {}
        words = cfg.data.labels if isinstance(cfg.data.labels, dict) else {}
        labels = {name: words.get(name, name) for name in kept or cfg.data.labels or ()}
    if not labels:
        raise RunError(f"run: {path} records no labels; its metrics.json is missing")
    space = LabelSpace(tuple(labels), tuple(labels.values()), cfg.data.task, cfg.data.answers or ())
    return Record(path, cfg, facts, space, manifest, members)


def data_of(cfg: RunConfig, session: Session) -> Data:
    """The data that an evaluation scores: the run's, or that of the command."""
    return cfg.data if cfg.run is None else with_named_data(cfg, read(cfg.run), session).data


def with_named_data(cfg: RunConfig, record: Record, session: Session) -> RunConfig:
    """The configuration of a run with the data of the command, or the run's data with the command's changes.

    Raises:
        ConfigError: for a key that belongs to the trained model.
    """
    trained, of_the_model = record.cfg, ("labels", "prompt", "max_length", "task", "answers")
    if session.job is None and not session.own_data:
        return trained
    keys = [word.lstrip("+~").partition("=")[0] for word in session.overrides]
    changed = [key for key in keys if key.startswith("data.")]
    # In a chain, all links share the command.
    chained = session.job is not None and session.job.choices.get("stage") != "evaluate"
    if session.own_data or "data" in keys or (changed and chained):
        merged: Data = cfg.data.model_copy(update={key: getattr(trained.data, key) for key in of_the_model})
        return trained.model_copy(update={"data": merged})
    if fixed := [key for key in changed if key.split(".")[1] in of_the_model]:
        text = f"is fixed by the model, which was trained with the value of its run ({record.path}); leave it out"
        raise ConfigError([Problem(key, text) for key in fixed])
    values, named = trained.model_dump(mode="json"), cfg.model_dump(mode="json")
    for key in changed:
        *sections, last = key.split(".")
        target, source = values, named
        for section in sections:
            target, source = target[section], source[section]
        if last in source:
            target[last] = source[last]
        else:  # ~data.hub.splits.validation
            target.pop(last, None)
    return compose.build(values, {}, []) if changed else trained


def for_inference(record: Record, inference: str) -> Record:
    """A record whose model is loaded in another number type; for int8 in float32, until `Predictor.quantize`.

    Raises:
        ConfigError: if it cannot be.
    """
    cfg = record.cfg
    if inference == "auto":
        return record
    reason = None
    if record.members or cfg.method.baseline is not None:
        reason = "is for language models; leave it out"
    elif record.format in ("onnx", "classifier", "gguf"):
        reason = "is for run folders and the formats merged and adapter; export again with stage.precision"
    elif cfg.method.quantization != "none":
        reason = f"does not apply to the weights of method={cfg.method.name}, which are quantized; leave it out"
    elif inference == "int8" and isinstance(cfg.stage, MoeJointStage):
        reason = "does not apply to a mixture, whose experts are separate adapters; leave it out"
    elif inference == "int8" and cfg.model.think == "open":
        reason = "scores labels, and this run writes thoughts before it (model.think=open); leave it out"
    elif inference == "int8" and processes.world_size() > 1:
        reason = "runs in one process; start it without torchrun"
    if reason is not None:
        raise ConfigError([Problem("model.inference", f"{inference} {reason}")])
    dtype = "float32" if inference == "int8" else inference
    model = cfg.model.model_copy(update={"inference": inference, "dtype": dtype})
    return replace(record, cfg=cfg.model_copy(update={"model": model}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The ``manifest.json`` of an export; {} for a run's folder.

    Raises:
        RunError: if it is damaged, or in a format that this version cannot read.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        manifest = {**values, "format": str(values["format"]), "tokenizer": str(values["tokenizer"])}
    except OSError as error:
        raise RunError(f"run: {file} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise RunError(f"run: {file} is damaged; export again") from None
    if manifest["format"] not in FORMATS:
        raise RunError(
            f"run: {folder} is an export in the format '{manifest['format']}', which this version cannot read; "
            "export again with format=onnx"
        )
    if not (folder / manifest["tokenizer"]).resolve().is_relative_to(folder.resolve()):
        raise RunError(f"run: {file} refers to files outside its folder ({manifest['tokenizer']}); export again")
    return manifest


def require_packages(form: str, reason: str) -> None:
    """Check that the packages of a format are installed, before anything is loaded.

    Raises:
        ModelError: naming the extra that installs them.
    """
    missing = [name for name in PACKAGES.get(form, ()) if find_spec(name) is None]
    if missing:
        raise ModelError(f"{reason} needs {', '.join(missing)}: pip install 'finsa[{EXTRAS[form]}]'")


def renderer_of(record: Record) -> Renderer:
    """The run's renderer, from its labels and the tokenizer of its model or export."""
    cfg = record.cfg
    if record.format == "onnx" and "rendering" in record.manifest:  # not in exports of older versions
        file = record.path / record.manifest["tokenizer"] / "tokenizer.json"
        return Renderer.restored(file, record.labels, record.manifest["rendering"])
    tokenizer = tokenizer_of(record)
    examples = few_shot.read(cfg.method.examples, record.path, cfg.seed)
    think, marks = cfg.model.think, cfg.model.thought.marks
    prompt = Prompt.of(cfg.data.prompt, record.labels, cfg.model.prompt, think, tokenizer, examples, marks)
    return Renderer(tokenizer, prompt, record.labels, cfg.data.max_length)


def tokenizer_of(record: Record) -> Any:
    """The tokenizer of a run's model or of an export."""
    exported = {"tokenizer": str(record.path / record.manifest["tokenizer"])} if record.manifest else {}
    return tokenizers.load_tokenizer(record.cfg.model.model_copy(update=exported))


# ------------------------------------------------------------------------------------------------ loading


def announce(name: str) -> None:
    """Print to standard error that a model is being loaded, because importing its libraries takes seconds."""
    if processes.is_main():
        print(f"loading {name}", file=sys.stderr, flush=True)


def restore(
    run: str, batch_tokens: int, threads: int | None = None, merge: bool = False, session: Session | None = None
) -> Predictor:
    """Load the predictor of a run or export folder.

    Args:
        run: the folder.
        batch_tokens: maximum number of padded tokens per batch.
        threads: number of threads; None: the default of torch.
        merge: merge the adapter of a float32 model into the weights, which is faster and equal up to rounding.
        session: its base model is reused if it is the same; `Predictor.close` must release it.

    Raises:
        RunError: if the folder is not a finished training run.
        ModelError: if weights or files are missing or do not match.
    """
    return load(read(run), batch_tokens, threads, merge, session)


def for_files(record: Record, train: Train, rule: selective.Rule | None) -> Predictor:
    """Load the model of a record as the stage `predict` uses it.

    Args:
        record: of a run or export.
        train: precision, threads and batch size of scoring.
        rule: with limits of risk and coverage.
    """
    announce(record.name)
    if record.uses_torch:
        from finsa.models import hardware  # torch takes seconds to import: after the checks

        hardware.prepare(train)
    model = load(record, train.score_tokens, train.threads, merge=True)
    model.selection = rule
    return model


def load(
    record: Record, batch_tokens: int, threads: int | None = None, merge: bool = False, session: Session | None = None
) -> Predictor:
    """Load the model of a record; the arguments are those of `restore`.

    Raises:
        RunError: if the weights have changed since the run wrote them, or labels would be scored by a different rule.
        ModelError: if weights or files are missing or do not match.
    """
    if record.members:
        return Cascade(record, [load(member, batch_tokens, threads, merge) for member in record.members])
    provenance.require_weights(record.path, record.facts)
    baseline = record.cfg.method.baseline
    if record.format in (None, "adapter") and record.cfg.method.learn != "all" and baseline is None:
        provenance.require_base(record.path, record.cfg, record.facts)
    if record.uses_torch and threads is not None:
        import torch

        torch.set_num_threads(threads)
    if baseline is not None:
        fitted = baselines.restore(record.cfg, record.labels.names, record.path)
        predictor = Predictor(record, fitted, f"baseline: {baseline.kind}", count_truncated=fitted.count_truncated)
    else:
        if record.format not in ("onnx", "classifier", "gguf"):
            quantization.require_library(record.cfg.method)
        require_packages(str(record.format), f"run: {record.path}")
        renderer, model = renderer_of(record), None
        scorer: Any = None
        try:
            if record.format == "onnx":
                # int8 activations share a scale per batch, so texts in a batch would affect each other
                most = 1 if record.manifest["precision"] == "int8" else batch_tokens
                graph = graphs.open_graph(record.path, threads)
                scorer = graphs.GraphScorer(graph, renderer, most, bool(record.manifest["pooled"]))
            elif record.format == "gguf":
                file, half = record.path / graphs.LLAMA_FILE, record.manifest["precision"] != "fp32"
                scorer = graphs.LlamaScorer(file, renderer, threads, half)
            else:
                from finsa.inference import loading  # imports torch

                scorer, model = loading.open_scorer(record, renderer, batch_tokens, threads, merge, session)
        except Exception as error:  # every library raises different errors
            if record.format not in ("onnx", "classifier", "gguf"):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"run: {record.path} cannot be opened as {record.format}: {reason}") from None
        if record.format == "classifier":  # its tokenizer adds the prompt
            predictor = Predictor(
                record, scorer, scorer.rule, count_truncated=lambda texts: renderer.encode(texts).truncated
            )
        else:
            predictor = Predictor(record, scorer, scorer.rule, renderer, model=model)
    _require_rule(predictor)
    return predictor


def require_served(record: Record) -> None:
    """Check that labels of a run can be scored by a server with OpenAI's completions.

    Raises:
        ConfigError: if they cannot.
    """
    method, reason = record.cfg.method, None
    if record.members or method.baseline is not None or record.format in ("onnx", "classifier"):
        reason = "is not a causal language model"
    elif method.head == "classifier" or isinstance(record.cfg.stage, MoeJointStage):
        reason = "has a classification head or a router, which no server has"
    elif record.cfg.model.think == "open":
        reason = "writes a thought before its answer"
    elif record.cfg.model.inference != "auto":
        reason = f"cannot be computed in {record.cfg.model.inference} by a server, which has its own number type"
    if reason is not None:
        raise ConfigError([Problem("stage.backend", f"{record.path} {reason}; score it with backend=local")])


def served(
    record: Record, stage: Scoring, column: str | None = None, adapters: Mapping[str, str] | None = None
) -> Predictor:
    """A predictor whose labels are scored by a server; no weights are loaded.

    Args:
        record: of the run that the server serves: prompt, labels, calibration.
        stage: with the address.
        column, adapters: choose the served model of a row.

    Raises:
        RunError: if the server does not answer as it has to.
    """
    from finsa.inference.served import ServedScorer  # imports torch

    renderer = renderer_of(record)
    scorer = ServedScorer(stage, renderer, column, adapters)
    predictor = Predictor(record, scorer, scorer.rule, renderer)
    _require_rule(predictor)
    return predictor


def _require_rule(predictor: Predictor) -> None:
    """Check that labels are scored by the rule that the run recorded.

    Raises:
        RunError: if they are not.
    """
    record = predictor.record
    recorded = record.facts.get("scoring") or record.manifest.get("rule")
    if recorded not in (None, predictor.rule):  # runs of older versions did not record it
        predictor.close()
        raise RunError(
            f"run: {record.path} scored its labels by the rule '{recorded}', but here the rule would be "
            f"'{predictor.rule}', to which its metrics and temperature do not apply. Use the tokenizer, the labels and "
            "the version of finsa that it was trained with, or repeat the run's command"
        )


def zero_shot(
    cfg: RunConfig, job: tokenized.TokenizedDataset, batch_tokens: int, session: Session | None = None
) -> Predictor:
    """A predictor of the base model without training, with the prompt and labels of a configuration."""
    quantization.require_library(cfg.method)
    from finsa.inference.scoring import contextual_bias, scorer  # imports torch
    from finsa.models import base, int8

    cfg = for_inference(Record(Path(), cfg, {}, job.dataset.labels), cfg.model.inference).cfg
    if cfg.model.inference == "int8":
        int8.require_cpu()
        session = None  # the layers will be replaced
    model: Any = base.load_base(cfg.model, cfg.seed, cfg.method.quantization, session)
    scores = scorer(model, job.renderer, batch_tokens, cfg)
    facts = {}
    if cfg.method.examples is not None and cfg.method.examples.calibrate:
        facts["contextual_bias"] = contextual_bias(scores, job.targets).tolist()
    return Predictor(Record(Path(), cfg, facts, job.dataset.labels), scores, scores.rule, job.renderer, model=model)
