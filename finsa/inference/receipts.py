"""What an export costs: its answers on the run's validation rows beside the run's own, its size and its speed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finsa.config import ExportStage
from finsa.data.task import Labelled
from finsa.evaluation import metrics
from finsa.inference.answering import Answerer, Answers

SPLIT = "validation"


@dataclass(frozen=True)
class Measured:
    """One of the two sides.

    Args:
        macro_f1, accuracy: on the rows that are compared.
        bytes: of the files that hold the model.
        milliseconds: median for one text at a time.
    """

    macro_f1: float
    accuracy: float
    bytes: int
    milliseconds: float


@dataclass(frozen=True)
class Receipt:
    """The run and its export on the same rows.

    Args:
        rows: compared validation rows.
        agreement: share of rows with the same answer.
        largest_difference: of a label's probability.
        run, export: the two sides.
    """

    rows: int
    agreement: float
    largest_difference: float
    run: Measured
    export: Measured

    def faults(self, stage: ExportStage) -> list[str]:
        """What is worse than was asked for."""
        found = []
        if self.agreement < stage.agreement:
            found.append(f"agreement {self.agreement:.4f} is below stage.agreement={stage.agreement}")
        if stage.difference is not None and self.largest_difference > stage.difference:
            found.append(
                f"the largest difference {self.largest_difference:.3g} is above stage.difference={stage.difference}"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``receipt.json``."""
        return asdict(self)


def answers_of(answerer: Answerer, job: Labelled, stage: ExportStage) -> tuple[Answers, float]:
    """Answers to the rows that are compared, and the median time of one text alone, in milliseconds."""
    texts = job.texts(SPLIT)[: stage.rows]
    answers = answerer(texts)
    spent = []
    answerer(texts[:1])  # the first call of a runtime makes its plans
    for text in texts[: stage.timed]:
        started = time.perf_counter()
        answerer([text])
        spent.append(1000 * (time.perf_counter() - started))
    return answers, float(np.median(spent))


def compare(
    job: Labelled, before: tuple[Answers, float], after: tuple[Answers, float], sizes: tuple[int, int]
) -> Receipt:
    """Compare two sides.

    Args:
        job: knows the true classes.
        before, after: from `answers_of`, of the run and of its export.
        sizes: bytes of the two.
    """
    gold = job.gold(SPLIT)[: len(before[0].cut)]
    one, other = before[0].probabilities, after[0].probabilities
    sides = []
    for (answers, spent), size in zip((before, after), sizes, strict=True):
        found = metrics.report(gold, answers.probabilities.argmax(axis=1).tolist(), answers.labels)
        sides.append(Measured(found["macro_f1"], found["accuracy"], size, round(spent, 3)))
    return Receipt(
        rows=len(gold),
        agreement=float((one.argmax(axis=1) == other.argmax(axis=1)).mean()),
        largest_difference=float(np.abs(one - other).max()),
        run=sides[0],
        export=sides[1],
    )


def size_of(folder: Path) -> int:
    """Bytes of the weights in a folder; its tokenizers and records are left out."""
    kept = (".safetensors", ".onnx", ".data", ".xml", ".bin", ".npz")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in kept)
