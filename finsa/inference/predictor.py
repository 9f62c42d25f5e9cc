"""A run folder becomes what answers texts: the one place for evaluation, prediction, export and serving.

`read` looks at a folder without loading weights, `load` loads them, `restore` does both. Prompt, labels, scoring rule
and calibration are those of the run, so that no stage can read its model differently from another.

torch, transformers and peft take seconds to import, so they are imported where a model is loaded: what is wrong with a
command is reported before, and a classical baseline never waits for them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finsa import baselines
from finsa.config import MoeJointStage, RunConfig
from finsa.data import tokenized
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import LEAST, Encoded, Renderer
from finsa.data.texts import normalize
from finsa.errors import ModelError, RunError
from finsa.evaluation import metrics
from finsa.inference import export_manifest
from finsa.models import folders, quantization, tokenizers
from finsa.runs import processes, provenance, run_folder
from finsa.runs.progress import Moved, ignored
from finsa.session import Session

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float64]
NO_LABELS = ("evaluate", "inspect", "pretrain", "report", "serve")  # stages whose folders hold no model of labels


@dataclass(frozen=True)
class Record:
    """What a folder says about its model.

    Args:
        path: the folder of a run or of an export.
        cfg: the run's configuration.
        facts: the run's ``run.json``.
        labels: its classes.
        manifest: of an export; empty for a run.
    """

    path: Path
    cfg: RunConfig
    facts: dict[str, Any]
    labels: LabelSpace
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def temperature(self) -> float:
        """By which the run divides log-probabilities before they become probabilities; 1: it fitted none."""
        return float((self.facts.get("calibration") or {}).get("temperature", 1.0))

    @property
    def uses_torch(self) -> bool:
        """Whether torch computes its answers."""
        return self.cfg.method.uses_torch

    @property
    def name(self) -> str:
        """Method, model and data of the run, and the export's format."""
        own = [] if self.cfg.method.baseline is not None else [self.cfg.model.name]
        return ", ".join([self.cfg.method.name, *own, self.cfg.data.title, *export_manifest.title(self.manifest)])


@dataclass(frozen=True)
class Answers:
    """Answers to n texts, c labels, E experts.

    Args:
        labels: names in their fixed order, (c,).
        log_probs: log-probability of each whole label, uncalibrated, (n, c).
        probabilities: softmax over the labels of the log-probabilities over the run's temperature, (n, c).
        cut: whether a text was too long and was cut, (n,).
        gates: a mixture's weights, (n, E); None elsewhere.
        experts: their names, (E,).
    """

    labels: tuple[str, ...]
    log_probs: FloatArray
    probabilities: FloatArray
    cut: list[bool]
    gates: FloatArray | None = None
    experts: tuple[str, ...] = ()

    @property
    def chosen(self) -> list[str]:
        """The label of each text."""
        return [self.labels[number] for number in self.log_probs.argmax(axis=1)]

    @property
    def routes(self) -> list[str] | None:
        """The expert that counts most for each text; None without experts."""
        if self.gates is None or not self.experts:
            return None
        return [self.experts[number] for number in self.gates.argmax(axis=1)]


class Reader(Protocol):
    """Scores what has been made of texts, prompts or the texts themselves: (n, c) log-probabilities."""

    def score(self, inputs: Any, moved: Moved = ignored) -> FloatArray:
        """Score inputs, in their order; `moved` is told how many more are scored."""


class Answerer:
    """Answers texts as a run does.

    Args:
        record: of the run or export.
        reader: scores inputs.
        rule: by which labels are scored.
        renderer: makes inputs of texts; None: the reader takes texts as they are.
        cut: counts the texts of a list that are not read whole, for a reader of texts.
        model: whose experts are named, and which `close` gives back.
    """

    def __init__(
        self,
        record: Record,
        reader: Reader,
        rule: str,
        renderer: Renderer | None = None,
        cut: Callable[[Sequence[str]], int | None] | None = None,
        model: torch.nn.Module | None = None,
    ) -> None:
        self.record, self.reader, self.rule, self.renderer, self.model, self._cut = (
            *(record, reader, rule, renderer, model, cut),
        )
        self.cfg, self.facts, self.path, self.name = record.cfg, record.facts, record.path, record.name
        self.labels: tuple[str, ...] = record.labels.names
        self.temperature = record.temperature
        self.experts: tuple[str, ...] = tuple(getattr(model or reader, "experts", ()))

    def __call__(self, texts: Sequence[str], moved: Moved = ignored) -> Answers:
        """Answer texts, in their order; `moved` is told how many more are answered."""
        texts = [normalize(text) for text in texts]
        if self.renderer is not None:
            encoded = self.renderer.encode(texts)
            return self._answers(encoded, [bool(cut) for cut in encoded.cut], moved)
        counts = [self._cut([text]) for text in texts] if self._cut is not None else [None] * len(texts)
        return self._answers(texts, [bool(count) for count in counts], moved)

    def fitting(self, texts: Sequence[tuple[str, int, str | None]]) -> list[tuple[str, str | None]]:
        """Refuse texts whose fixed part leaves no room for the rest, as training does.

        Args:
            texts: of each text itself, the length of its fixed part, and why it cannot be answered; see `Reading`.

        Returns:
            Each text, and why it cannot be answered.
        """
        read, fixed = [text for text, _, _ in texts], [count for _, count, _ in texts]
        if self.renderer is None:
            reasons = dict.fromkeys(self._crowded(read, fixed), "the instruction or the earlier turns fill the text")
        else:
            room = self.renderer.room
            reasons = {
                number: f"what comes first takes {tokens:,} tokens, and the text may have {room:,}"
                for number, tokens in self.renderer.crowded(read, fixed).items()
            }
        return [
            (text, f"no room for the input: {reasons[number]}" if number in reasons else fault)
            for number, (text, _, fault) in enumerate(texts)
        ]

    def _crowded(self, texts: Sequence[str], fixed: Sequence[int]) -> list[int]:
        probes = {number: texts[number][: count + LEAST] for number, count in enumerate(fixed) if count}
        return [number for number, probe in probes.items() if self._cut is not None and self._cut([probe])]

    def _answers(self, inputs: Encoded | list[str], cut: list[bool], moved: Moved) -> Answers:
        log_probs = self.reader.score(inputs, moved) if cut else np.zeros((0, len(self.labels)))
        gates = self.gates if cut else None  # they are of what was scored last
        probs = metrics.probabilities(log_probs, self.temperature)
        return Answers(self.labels, log_probs, probs, cut, gates, self.experts)

    @property
    def gates(self) -> FloatArray | None:
        """A mixture's gates for what was scored last, (n, E)."""
        return getattr(self.reader, "gates", None)

    def score(self, job: tokenized.Labelled, split: str, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities (n, c) of a split; a task's kept prompts are used.

        Args:
            job: has the split.
            split: its name.
            moved: is told how many more rows are scored.

        Raises:
            ModelError: where the rows have other classes.
        """
        if job.dataset.labels.names != self.labels:
            raise ModelError(
                f"run: {self.path} tells {', '.join(self.labels)} apart; these rows have "
                f"{', '.join(job.dataset.labels.names)}"
            )
        if isinstance(job, tokenized.TokenizedDataset) and self.renderer is not None:
            return self.reader.score(job.prompts(split), moved)
        if self.cfg.method.baseline is not None and self._cut is not None:
            counts = {name: self._cut(job.texts(name)) for name in job.dataset.splits}
            job.cut.update({name: count for name, count in counts.items() if count is not None})
        return self.reader.score(job.texts(split), moved)

    def close(self) -> None:
        """Give a shared base back as it was."""
        if self.model is not None:
            from finsa.models import factory

            factory.release(self.model)


def read(folder: str) -> Record:
    """Read a run's or an export's folder; no weights are loaded.

    Raises:
        RunError: for a folder that holds no finished training run, or whose base is gone.
    """
    path, cfg, facts = run_folder.read(folder)
    if facts.get("stage") in NO_LABELS:
        raise RunError(f"run: {path} is of stage={facts['stage']}; name the folder of a run that trained on labels")
    manifest = export_manifest.manifest(path)
    _require_base(path, cfg, manifest)
    return Record(path, cfg, facts, _labels(path, cfg, facts), manifest)


def _require_base(path: Path, cfg: RunConfig, manifest: dict[str, Any]) -> None:
    """Check that the base is where it was when the run was made, as far as folders are concerned.

    Raises:
        RunError: where it is not.
    """
    if cfg.method.baseline is not None:
        return
    whole = (path / "model" / folders.CONFIG).is_file() or manifest.get("format", "adapter") != "adapter"
    found = [] if whole else list(folders.weights_problems(cfg.model))
    found += [] if manifest or found else list(folders.tokenizer_problems(cfg.model))
    if found:
        raise RunError(f"run: {path} needs the model that it was trained on. {found[0]}")


def _labels(path: Path, cfg: RunConfig, facts: dict[str, Any]) -> LabelSpace:
    """Names and words of a run's classes; a run that did not note them has them in its metrics."""
    known = facts.get("labels")
    if known is None:
        file = path / "metrics.json"
        kept = json.loads(file.read_text(encoding="utf-8"))["test"]["per_class"] if file.is_file() else {}
        words = cfg.data.labels if isinstance(cfg.data.labels, dict) else {}
        known = {name: words.get(name, name) for name in kept or cfg.data.labels or ()}
    if not known:
        raise RunError(f"run: {path} names no labels; its metrics.json is missing")
    return LabelSpace(tuple(known), tuple(known.values()))


def announce(name: str) -> None:
    """Report on standard error that a model is being loaded: its libraries alone take seconds to import."""
    if processes.first():
        print(f"loading {name}", file=sys.stderr, flush=True)


def restore(
    run: str, batch_tokens: int, threads: int | None = None, merge: bool = False, session: Session | None = None
) -> Answerer:
    """Rebuild what answers texts from a run's or an export's folder.

    Args:
        run: the folder.
        batch_tokens: most padded tokens of a batch.
        threads: for the products; None: as torch chooses.
        merge: put an unquantised adapter into the weights, which answers faster and to rounding the same.
        session: whose base model is used, if it is the same; `Answerer.close` must give it back.

    Raises:
        RunError: for a folder that holds no finished training run.
        ModelError: where weights or files are missing or do not fit.
    """
    return load(read(run), batch_tokens, threads, merge, session)


def load(
    record: Record, batch_tokens: int, threads: int | None = None, merge: bool = False, session: Session | None = None
) -> Answerer:
    """Load what a record names; the arguments are those of `restore`.

    Raises:
        RunError: where weights are not those that the run wrote, or the rule of scoring is another than the run's.
        ModelError: where weights or files are missing or do not fit.
    """
    answerer = _load(record, batch_tokens, threads, merge, session)
    noted = record.facts.get("scoring") or record.manifest.get("rule")
    if noted not in (None, answerer.rule):  # a run of an older version did not note it
        answerer.close()
        raise RunError(
            f"run: {record.path} scored its labels by the rule '{noted}', and here it would be '{answerer.rule}': "
            "not the probabilities that its metrics and its temperature are for. Give it the tokenizer and the labels "
            "that it was trained with and the version of finsa that it notes, or repeat the run's command"
        )
    return answerer


def _load(record: Record, batch_tokens: int, threads: int | None, merge: bool, session: Session | None) -> Answerer:
    provenance.require_weights(record.path, record.facts)
    method, form = record.cfg.method, record.manifest.get("format", "adapter")
    if form == "adapter" and method.learn != "all" and method.baseline is None:
        provenance.require_base(record.path, record.cfg, record.facts)
    if record.uses_torch and threads is not None:
        import torch

        torch.set_num_threads(threads)
    if record.cfg.method.baseline is not None:
        known = baselines.restore(record.cfg, record.labels.names, record.path)
        return Answerer(record, known, f"baseline: {record.cfg.method.baseline.kind}", cut=known.cut)
    if record.manifest.get("format") in export_manifest.RUNTIMES:
        from finsa.inference.label_tree import scored_answers

        renderer = renderer_of(record)
        reader = export_manifest.open_reader(record.path, record.manifest, renderer, batch_tokens, threads)
        rule = "classification head" if record.manifest["pooled"] else scored_answers(renderer)[1]
        if record.manifest["format"] == "classifier":  # its own tokenizer puts the prompt around a text
            return Answerer(record, reader, rule, cut=lambda texts: renderer.encode(texts).truncated)
        return Answerer(record, reader, rule, renderer)
    quantization.require_library(record.cfg.method)
    from finsa.inference import hard_routing, loading
    from finsa.inference.scoring import scorer

    renderer = renderer_of(record)
    if record.manifest.get("format") == "merged" and isinstance(record.cfg.stage, MoeJointStage):
        bundle = hard_routing.open_reader(record.cfg, record.path, renderer, batch_tokens)
        return Answerer(record, bundle, bundle.rule, renderer)
    model = loading.model_of(record.cfg, record.path, record.manifest, renderer, merge, session)
    language_reader = scorer(model, renderer, batch_tokens)
    return Answerer(record, language_reader, language_reader.rule, renderer, model=model)


def bare(
    cfg: RunConfig, job: tokenized.TokenizedDataset, batch_tokens: int, session: Session | None = None
) -> Answerer:
    """The base as it is, with the prompt and labels of a configuration."""
    quantization.require_library(cfg.method)
    from finsa.inference.scoring import scorer
    from finsa.models import base

    model: Any = base.load_base(cfg.model, cfg.seed, cfg.method.quantization, session)
    reader = scorer(model, job.renderer, batch_tokens)
    record = Record(Path(), cfg, {}, job.dataset.labels)
    return Answerer(record, reader, reader.rule, job.renderer, model=model)


def renderer_of(record: Record) -> Renderer:
    """The run's renderer, from its labels and the tokenizer of its model, or the one that an export carries."""
    cfg, tokenizer = record.cfg, tokenizer_of(record)
    prompt = Prompt.of(cfg.data.prompt, record.labels, cfg.model.prompt, cfg.model.think, tokenizer)
    return Renderer(tokenizer, prompt, record.labels, cfg.data.max_length)


def tokenizer_of(record: Record) -> Any:
    """The tokenizer of a run's model, or the one that an export carries."""
    own = {"tokenizer": str(record.path / record.manifest["tokenizer"])} if record.manifest else {}
    return tokenizers.load_tokenizer(record.cfg.model.model_copy(update=own))
