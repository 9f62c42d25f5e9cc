"""From scores to what a run folder keeps: a report, predictions, a figure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.config import RunConfig
from finsa.data.tokenized import Labelled
from finsa.evaluation import calibration as calibrating
from finsa.evaluation import metrics
from finsa.runs import files
from finsa.runs.run_folder import RunFolder


def report(task: Labelled, split: str, scores: NDArray[np.float64]) -> dict[str, Any]:
    """Compare a split's scores (n, c) with its labels."""
    return metrics.report(task.gold(split), scores.argmax(axis=1).tolist(), task.dataset.labels.names)


def predictions(
    task: Labelled,
    split: str,
    log_probs: NDArray[np.float64],
    temperature: float,
    gates: NDArray[np.float64] | None = None,
    experts: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield one record per row.

    Args:
        task: has the rows of the split.
        log_probs: of the labels, (n, c).
        temperature: of the run; see `finsa.evaluation.calibration`.
        gates: of a mixture, (n, E), whose experts are named by `experts`.

    Yields:
        ``id``, ``text``, ``gold`` and ``label``; ``probs``, the calibrated probability of each label, as prediction,
        service and exports give it; ``log_probs``, the log-probability of each whole label, uncalibrated; of a mixture
        also ``domain`` and ``gates``.
    """
    names = task.dataset.labels.names
    probs = metrics.probabilities(log_probs, temperature)
    rows = task.dataset.splits[split]
    for place, (identity, text, gold) in enumerate(rows.select("id", "text", "label").iter_rows()):
        record = {
            "id": identity,
            "text": text,
            "gold": names[gold],
            "label": names[int(log_probs[place].argmax())],
            "probs": {name: round(float(value), 6) for name, value in zip(names, probs[place], strict=True)},
            "log_probs": {name: round(float(value), 6) for name, value in zip(names, log_probs[place], strict=True)},
        }
        if gates is not None:
            record["domain"] = rows["domain"][place]
            record["gates"] = {name: round(float(value), 6) for name, value in zip(experts, gates[place], strict=True)}
        yield record


def answers(task: Labelled, split: str, texts: Sequence[str], parsed: Sequence[int | None]) -> Iterator[dict[str, Any]]:
    """Yield one record per generated answer: id, text, gold, the answer, and the label it names, null for none."""
    names, rows = task.dataset.labels.names, task.dataset.splits[split]
    for (identity, text, gold), answer, label in zip(
        rows.select("id", "text", "label").iter_rows(), texts, parsed, strict=True
    ):
        known = None if label is None else names[label]
        yield {"id": identity, "text": text, "gold": names[gold], "answer": answer, "label": known}


def calibration(
    task: Labelled, log_probs: dict[str, NDArray[np.float64]], temperature: float | None = None
) -> dict[str, Any]:
    """Report the calibration error and the log loss, with and without the temperature.

    Args:
        task: knows the true classes.
        log_probs: (n, c) by split, of its first n rows.
        temperature: None: it is fitted on the ``validation`` rows.
    """
    gold = {split: task.gold(split)[: len(values)] for split, values in log_probs.items()}
    if temperature is None:
        temperature = calibrating.temperature(log_probs["validation"], gold["validation"])
    reports = {split: calibrating.report(values, gold[split], temperature) for split, values in log_probs.items()}
    return {"temperature": temperature, "bins": calibrating.BINS, **reports}


def validation(task: Labelled, scores: NDArray[np.float64]) -> dict[str, float]:
    """The numbers that choose a checkpoint, from the validation split's scores (n, c).

    The loss is the mean negative log-probability of the right label, on the response for every method, so that arms
    with different training losses can be compared.
    """
    gold = np.array(task.gold("validation")[: len(scores)])
    result = metrics.report(gold.tolist(), scores.argmax(axis=1).tolist(), task.dataset.labels.names)
    loss = -float(scores[np.arange(len(gold)), gold].mean())
    return {"loss": loss, **{name: result[name] for name in ("macro_f1", "weighted_f1", "accuracy")}}


def write_ledger(task: Labelled, folder: RunFolder, splits: Collection[str]) -> dict[str, int]:
    """Write ``ledger.json``, and the rows that are not used with their reasons as ``dropped.jsonl``.

    Args:
        task: of the run; another run of this process may have read further splits of it.
        folder: of the run.
        splits: those that this run has read.

    Returns:
        Rows of these splits whose text was cut.
    """
    cut = {split: number for split, number in task.truncated().items() if split in splits}
    folder.write_json("ledger.json", task.dataset.ledger.as_dict(cut))
    folder.write_lines("dropped.jsonl", task.dataset.dropped.iter_rows(named=True))
    return cut


def draw(result: dict[str, Any], title: str, folder: Path) -> Path:
    """Draw the confusion matrix into a run folder."""
    from finsa.evaluation import figures

    file = folder / "confusion_matrix.png"
    with files.replacing(file) as temporary:
        figures.confusion_matrix(result, title, temporary)
    return file


def page(cfg: RunConfig, folder: RunFolder, name: str, split: str | None) -> list[Path]:
    """Write a run's page and the figures beside the confusion matrix: see `run_page.write`."""
    from finsa.evaluation import run_page  # matplotlib and jinja2 take a second, for which no run waits at its start

    return run_page.write(cfg, folder, name, split)


def flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested numbers to ``test/macro_f1``; lists are left out."""
    values: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            values[prefix + name] = value
    return values
