"""Classical classifiers, with the same data, metrics and reports as the language models."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from finsa import config
from finsa.config import LOWER_IS_BETTER, RunConfig
from finsa.config.base import headline
from finsa.data.rows import LEAST
from finsa.data.tokenized import Labeled
from finsa.data.values import TASKS
from finsa.errors import DataError, ModelError
from finsa.runs.progress import Moved, ignored

FloatArray = NDArray[np.float64]
Texts = Sequence[str]
Targets = Sequence[int] | NDArray[np.float64]  # classes, (n,); or numbers or sets of labels, see `Labeled.truth`
Evaluate = Callable[[FloatArray], dict[str, float]]  # log-probabilities (n, c) of the validation rows -> metrics
Record = Callable[[int, dict[str, float]], None]  # step, values
LABELS = "labels.json"
NEVER = -50.0  # log-probability of a class without training rows: finite, so that a mean over rows stays a number


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

    Args:
        parameters: number of learned parameters.
        best: macro-F1 of the selected model on the validation rows; of numbers, the RMSE.
        rows: number of rows read during training, counted once per epoch or fit.
        steps: number of optimizer steps; None if there are none.
        chosen: settings selected on the validation rows, by name.
    """

    parameters: int
    best: float
    rows: int
    steps: int | None = None
    chosen: dict[str, Any] = field(default_factory=dict)

    def facts(self, seconds: float) -> dict[str, Any]:
        """Entries for ``run.json``, under the names that all methods use."""
        return {
            "trainable_parameters": self.parameters,
            "total_parameters": self.parameters,
            "steps": self.steps,
            "best_validation": self.best,
            "training_seconds": round(seconds, 2),
            "rows_per_second": round(self.rows / max(seconds, 1e-9), 2),
            **self.chosen,
        }


def rank(metrics: dict[str, float], task: str) -> float:
    """The measure of a task by which models are selected, higher for better ones."""
    measure = headline(task)
    return -metrics[measure] if measure in LOWER_IS_BETTER else metrics[measure]


class Learner(ABC):
    """A text classifier."""

    def start(self, texts: Texts) -> None:  # noqa: B027 - most learners need no preparation
        """Load or build what `count_truncated` needs from the training texts; `fit` calls it if needed."""

    @abstractmethod
    def fit(self, texts: Texts, labels: Targets, held: Texts, evaluate: Evaluate, record: Record) -> Fitted:
        """Train.

        Args:
            texts, labels: training rows, (n,); over-sampled rows are repeated.
            held: texts of the validation rows, on which the model is selected.
            evaluate: computes metrics from their log-probabilities.
            record: called with a step and its metrics during training.
        """

    @abstractmethod
    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probability of each class, (n, c), natural log; log-odds of each of several labels, or numbers, (n, 1).

        `moved` is called with the number of scored texts.
        """

    def count_truncated(self, texts: Texts) -> int | None:
        """Number of truncated texts; None for a learner that reads whole texts."""
        return None

    @abstractmethod
    def plan(self, texts: Texts) -> dict[str, object]:
        """Describe what `fit` would do with these training rows, without loading weights."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the learned parameters, without pickle."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Load what `save` wrote."""


class Majority(Learner):
    """Predicts the class shares of the training rows for every text; their mean number, or the share of each label."""

    def __init__(self, classes: int, task: str = "classification") -> None:
        self.classes, self.task = classes, task
        self.counts = np.zeros(classes, np.int64)

    def fit(self, texts: Texts, labels: Targets, held: Texts, evaluate: Evaluate, record: Record) -> Fitted:
        """Count the classes."""
        values = self.task in TASKS
        self.counts = np.mean(labels, axis=0) if values else np.bincount(np.asarray(labels), minlength=self.classes)
        return Fitted(self.classes, evaluate(self.score(held))[headline(self.task)], len(texts))

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-shares, the same for each text: (n, c)."""
        if self.task in TASKS:
            rare = np.clip(self.counts, 1e-9, 1 - 1e-9)
            return np.tile(self.counts if self.task == "regression" else np.log(rare / (1 - rare)), (len(texts), 1))
        shares = np.where(self.counts > 0, self.counts / self.counts.sum(), np.exp(NEVER))
        return np.tile(np.log(shares), (len(texts), 1))

    def plan(self, texts: Texts) -> dict[str, object]:
        """Describe the counts."""
        return {"parameters": f"{self.classes} class shares", "training": f"{len(texts):,} rows are counted"}

    def save(self, folder: Path) -> None:
        """Write the counts."""
        (folder / "shares.json").write_text(json.dumps(self.counts.tolist()) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Read the counts."""
        self.counts = np.array(json.loads((folder / "shares.json").read_text(encoding="utf-8")))


def build(cfg: RunConfig, labels: Sequence[str]) -> Learner:
    """Build the untrained learner of a method.

    Args:
        cfg: the run's configuration.
        labels: class names in order; the task of the data determines the number of outputs.

    Raises:
        ConfigError: if a lexicon is not installed or its classes are not among the labels.
        ModelError: if pretrained weights or their tokenizer are not available.
    """
    task = cfg.data.task
    classes = 1 if task == "regression" else len(labels)
    match cfg.method.baseline:  # imported only if needed: scikit-learn and torch take seconds to import
        case config.Majority():
            return Majority(classes, task)
        case config.Lexicon() as section:
            from finsa.baselines.lexicon import Lexicon

            return Lexicon(section, labels)
        case config.TfidfLr() as section:
            from finsa.baselines.linear import TfidfLr

            return TfidfLr(section, classes, task)
        case config.Encoder() as section:
            from finsa.baselines.encoder import Encoder

            return Encoder(section, cfg, classes)
        case config.LinearProbe() as section:
            from finsa.baselines.encoder import LinearProbe

            return LinearProbe(section, cfg, classes)
        case config.TextCnn() | config.BiLstm() as section:
            from finsa.baselines.neural import FromScratch

            return FromScratch(section, cfg, classes)
    raise ValueError(f"method={cfg.method.name} is not a baseline")


def count_truncated(learner: Learner, data: Labeled) -> dict[str, int]:
    """Number of truncated texts per split; empty for a learner that reads whole texts."""
    counts = {split: learner.count_truncated(data.texts(split)) for split in data.dataset.splits}
    return {split: count for split, count in counts.items() if count is not None}


def crowded(learner: Learner, texts: Texts, fixed: Sequence[int]) -> list[int]:
    """Find texts whose fixed part leaves room for fewer than ``LEAST`` characters of the rest.

    Args:
        learner: reads the texts; `Learner.start` has been called.
        texts: (n,).
        fixed: number of leading characters of each text that must not be truncated, (n,).

    Returns:
        Indices of these texts.
    """
    probes = {number: texts[number][: count + LEAST] for number, count in enumerate(fixed) if count}
    if not probes or not learner.count_truncated(list(probes.values())):
        return []
    return [number for number, probe in probes.items() if learner.count_truncated([probe])]


def require_room(learner: Learner, data: Labeled, settings: config.Data) -> None:
    """Check that instructions and earlier chat turns leave room for the input.

    Raises:
        DataError: with the number of rows without room.
    """
    counts = {split: len(crowded(learner, data.texts(split), data.fixed(split))) for split in data.dataset.splits}
    if any(counts.values()):
        where = ", ".join(f"{split} {count:,}" for split, count in counts.items() if count)
        raise DataError(
            f"data.max_length: in {sum(counts.values()):,} rows ({where}) the instruction or the earlier turns leave "
            f"no room for the input; this method reads at most {settings.max_length} tokens, and only the input may be "
            "truncated. Set a larger data.max_length, up to the number of positions of the encoder, or shorten the "
            "instruction or the earlier turns"
        )


def save(learner: Learner, labels: Sequence[str], run: Path) -> None:
    """Write a learner and its class order to ``baseline/`` in a run folder."""
    folder = run / "baseline"
    folder.mkdir(exist_ok=True)
    (folder / LABELS).write_text(json.dumps(list(labels), ensure_ascii=False) + "\n", encoding="utf-8")
    learner.save(folder)


def restore(cfg: RunConfig, labels: Sequence[str], run: Path) -> Learner:
    """Load the learner of a run.

    Args:
        cfg: the run's configuration.
        labels: classes of the rows to score.
        run: the run folder.

    Raises:
        ModelError: if files are missing or the classes differ.
    """
    folder = run / "baseline"
    try:
        known = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        if known != list(labels):
            raise ModelError(f"run: the classes of {run} are {', '.join(known)}; these rows have {', '.join(labels)}")
        learner = build(cfg, known)
        learner.restore(folder)
    except (OSError, EOFError, KeyError, ValueError, BadZipFile, SafetensorError) as error:
        raise ModelError(f"run: {folder} is incomplete or damaged: {str(error).splitlines()[0]}") from None
    return learner
