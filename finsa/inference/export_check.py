"""What an export costs: its answers on the run's validation rows beside the run's own, its size and its speed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finsa.config import ExportStage
from finsa.data.tokenized import Labelled
from finsa.evaluation import metrics
from finsa.inference.predictor import Answerer, Answers
from finsa.runs.progress import Display

SPLIT = "validation"
# Largest differences of a probability with stage.difference=auto. Measured on the embedded default's 596 rows: 2e-6 for
# ONNX in float32, 0.047 for ONNX in 8 bit.
FLOAT32, ROUNDED = 1e-3, 0.1


@dataclass(frozen=True)
class Asked:
    """What one side made of the rows.

    Args:
        answers: to the rows that are compared.
        milliseconds: median for one text at a time.
        type: of its products: ``float32``, ``bfloat16``, ``float16`` or ``int8``.
    """

    answers: Answers
    milliseconds: float
    type: str


@dataclass(frozen=True)
class Measured:
    """One of the two sides.

    Args:
        macro_f1, accuracy: on the rows that are compared.
        bytes: of the files that hold the model.
        milliseconds: median for one text at a time.
        type: of its products.
    """

    macro_f1: float
    accuracy: float
    bytes: int
    milliseconds: float
    type: str


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
        found, most = [], self.tolerance(stage)
        if self.agreement < stage.agreement:
            found.append(f"agreement {self.agreement:.4f} is below stage.agreement={stage.agreement}")
        if most is not None and self.largest_difference > most:
            own = f" ({most:g}: {self.export.type} beside {self.run.type})" if stage.difference == "auto" else ""
            told = f"{self.largest_difference:.3g} is above stage.difference={stage.difference}{own}"
            found.append(f"the largest difference {told}")
        return found

    def tolerance(self, stage: ExportStage) -> float | None:
        """The largest difference of a probability that the export may have; None: any."""
        if stage.difference != "auto":
            return stage.difference
        return FLOAT32 if self.run.type == self.export.type == "float32" else ROUNDED

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``receipt.json``."""
        return asdict(self)


def answers_of(answerer: Answerer, job: Labelled, stage: ExportStage, display: Display, side: str) -> Asked:
    """Answer the rows that are compared, and time single texts.

    Args:
        answerer: of the run or of the export.
        job: has the rows.
        stage: how many of them.
        display: shows how far it is.
        side: names the answerer there.
    """
    texts = job.texts(SPLIT)[: stage.rows]
    with display.work(f"{side}: {SPLIT} rows", len(texts)) as work:
        answers = answerer(texts, work.moved)
    spent = []
    answerer(texts[:1])  # the first call of a runtime makes its plans
    with display.work(f"{side}: single texts", len(texts[: stage.timed])) as work:
        for text in texts[: stage.timed]:
            started = time.perf_counter()
            answerer([text])
            spent.append(1000 * (time.perf_counter() - started))
            work.moved(1)
    return Asked(answers, float(np.median(spent)), _type(answerer))


def _type(answerer: Answerer) -> str:
    from finsa.models import base  # torch, which the checks of a command do not wait for

    precision = answerer.record.manifest.get("precision")  # of a graph alone
    own = str(base.dtype(answerer.cfg.model)).removeprefix("torch.")
    return {None: own, "fp32": "float32"}.get(precision, str(precision))


def compare(job: Labelled, before: Asked, after: Asked, sizes: tuple[int, int]) -> Receipt:
    """Compare two sides.

    Args:
        job: knows the true classes.
        before, after: from `answers_of`, of the run and of its export.
        sizes: bytes of the two.
    """
    gold = job.gold(SPLIT)[: len(before.answers.cut)]
    one, other = before.answers.probabilities, after.answers.probabilities
    sides = []
    for asked, size in zip((before, after), sizes, strict=True):
        found = metrics.report(gold, asked.answers.probabilities.argmax(axis=1).tolist(), asked.answers.labels)
        sides.append(Measured(found["macro_f1"], found["accuracy"], size, round(asked.milliseconds, 3), asked.type))
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
