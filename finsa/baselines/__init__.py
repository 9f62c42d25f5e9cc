"""Classical learners behind the same data, scorer and report as the language models: one module a kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from finsa import config
from finsa.config import RunConfig
from finsa.data.rows import LEAST
from finsa.data.tokenized import Labelled
from finsa.errors import DataError, ModelError
from finsa.runs.progress import Moved, ignored

FloatArray = NDArray[np.float64]
Texts = Sequence[str]
Classes = Sequence[int]
Judge = Callable[[FloatArray], dict[str, float]]  # scores (n, c) of the validation rows -> loss, macro_f1, ...
Record = Callable[[int, dict[str, float]], None]  # step, values
LABELS = "labels.json"
NEVER = -50.0  # log-probability of a class without training rows: finite, so that a mean over rows stays a number


@dataclass(frozen=True)
class Fitted:
    """What came of a fit.

    Args:
        parameters: numbers that were learnt.
        best: macro-F1 on the validation rows of what was kept.
        rows: rows read while learning, a row once per epoch or fit.
        steps: optimiser steps; None where there are none.
        chosen: what the validation rows chose, by name.
    """

    parameters: int
    best: float
    rows: int
    steps: int | None = None
    chosen: dict[str, Any] = field(default_factory=dict)

    def facts(self, seconds: float) -> dict[str, Any]:
        """What the run's record keeps, under the names that all methods use."""
        return {
            "trainable_parameters": self.parameters,
            "total_parameters": self.parameters,
            "steps": self.steps,
            "best_validation": self.best,
            "training_seconds": round(seconds, 2),
            "rows_per_second": round(self.rows / max(seconds, 1e-9), 2),
            **self.chosen,
        }


class Learner(Protocol):
    """A classifier of texts."""

    def start(self, texts: Texts) -> None:
        """Load or make what `cut` needs, from the texts of the training rows; `fit` does it where it was not done."""

    def fit(self, texts: Texts, labels: Classes, held: Texts, judge: Judge, record: Record) -> Fitted:
        """Learn.

        Args:
            texts, labels: training rows, (n,); a row that counts more often stands here more often.
            held: texts of the validation rows, which choose.
            judge: tells the numbers of their scores.
            record: takes numbers as they come up.
        """

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probability of each class: (n, c), natural logarithms; `moved` may be told how many more are scored."""

    def cut(self, texts: Texts) -> int | None:
        """How many of the texts are longer than what is read; None: all are read whole."""

    def plan(self, texts: Texts) -> dict[str, object]:
        """What `fit` would do with these training rows, as lines of a plan; no weights are loaded."""

    def save(self, folder: Path) -> None:
        """Write what was learnt, without pickle."""

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""


def build(cfg: RunConfig, labels: Sequence[str]) -> Learner:
    """The learner that a method names, before it has learnt.

    Args:
        cfg: the run's configuration.
        labels: names of the classes, in their order.

    Raises:
        ConfigError: for a lexicon whose classes are not among them, or that is not installed.
        ModelError: where weights or a tokenizer that it starts from cannot be had.
    """
    classes = len(labels)
    match cfg.method.baseline:
        case config.Majority():
            from finsa.baselines.majority import Majority

            return Majority(classes)
        case config.Lexicon() as section:
            from finsa.baselines.lexicon import Lexicon

            return Lexicon(section, labels)
        case config.TfidfLr() as section:
            from finsa.baselines.tfidf import TfidfLr

            return TfidfLr(section, classes)
        case config.Encoder() as section:
            from finsa.baselines.encoder import Encoder

            return Encoder(section, cfg, classes)
        case config.LinearProbe() as section:
            from finsa.baselines.linear_probe import LinearProbe

            return LinearProbe(section, cfg, classes)
        case config.TextCnn() | config.BiLstm() as section:
            from finsa.baselines.neural import FromScratch

            return FromScratch(section, cfg, classes)
    raise ValueError(f"method={cfg.method.name} is no baseline")


def cut(learner: Learner, job: Labelled) -> dict[str, int]:
    """Texts that a learner does not read whole, per split; empty for one that reads all of them whole."""
    counts = {split: learner.cut(job.texts(split)) for split in job.dataset.splits}
    return {split: count for split, count in counts.items() if count is not None}


def crowded(learner: Learner, texts: Texts, fixed: Sequence[int]) -> list[int]:
    """Find texts whose fixed part leaves less than ``LEAST`` characters of the rest to be read.

    Args:
        learner: that reads the texts; it has been started.
        texts: n texts.
        fixed: number of their leading characters that must not be truncated, (n,).

    Returns:
        Their numbers.
    """
    probes = {number: texts[number][: count + LEAST] for number, count in enumerate(fixed) if count}
    if not probes or not learner.cut(list(probes.values())):
        return []
    return [number for number, probe in probes.items() if learner.cut([probe])]


def require_room(learner: Learner, job: Labelled, data: config.Data) -> None:
    """Check that no instruction, and no earlier part of a chat, pushes the input out of the text.

    Raises:
        DataError: with the number of rows.
    """
    found = {split: len(crowded(learner, job.texts(split), job.fixed(split))) for split in job.dataset.splits}
    if any(found.values()):
        where = ", ".join(f"{split} {count:,}" for split, count in found.items() if count)
        raise DataError(
            f"data.max_length: in {sum(found.values()):,} rows ({where}) the instruction or the earlier turns leave no "
            f"room for the input, of which this method reads {data.max_length} tokens at most. Only the input may be "
            "truncated. Set a larger data.max_length, as far as the encoder has positions, or shorten what comes first"
        )


def save(learner: Learner, labels: Sequence[str], run: Path) -> None:
    """Write a learner and the order of its classes into a run folder, below ``baseline/``."""
    folder = run / "baseline"
    folder.mkdir(exist_ok=True)
    (folder / LABELS).write_text(json.dumps(list(labels), ensure_ascii=False) + "\n", encoding="utf-8")
    learner.save(folder)


def restore(cfg: RunConfig, labels: Sequence[str], run: Path) -> Learner:
    """Rebuild a run's learner.

    Args:
        cfg: the run's configuration.
        labels: classes of the rows to be scored.
        run: its folder.

    Raises:
        ModelError: where files are missing or the rows have other classes.
    """
    folder = run / "baseline"
    try:
        known = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        if known != list(labels):
            raise ModelError(f"run: {run} tells {', '.join(known)} apart; these rows have {', '.join(labels)}")
        learner = build(cfg, known)
        learner.restore(folder)
    except (OSError, EOFError, KeyError, ValueError, BadZipFile, SafetensorError) as error:
        raise ModelError(f"run: {folder} is incomplete or damaged: {str(error).splitlines()[0]}") from None
    return learner
