"""Selective prediction: a run abstains where it is not sure enough, and label sets that contain the true label.

Both are chosen on labeled rows, the calibration rows, and hold for new rows that are exchangeable with these: drawn
from the same source, and not used for training. The validation rows of a run also selected its checkpoint and its
temperature, so that probabilities may look slightly better on them than on new rows.

The confidence of a prediction is the probability of the predicted label, rounded as in prediction files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.config import CalibratedSelection, EvaluateStage, Selection
from finsa.data.labels import LabelSpace
from finsa.data.values import TASKS
from finsa.errors import ConfigError, Problem, RunError
from finsa.evaluation import finished_runs, metrics
from finsa.evaluation.tables import Table, percent
from finsa.runs import run_folder

FloatArray = NDArray[np.float64]
FILE = "validation_predictions.jsonl"
STARTS = (0.125, 0.25, 0.5)  # shares of the calibration rows at which the tests start
DIGITS = 6  # of probabilities in prediction files
SAMPLES = 1000  # of the bootstrap of an AURC


@dataclass(frozen=True)
class Rows:
    """Predictions of labeled rows.

    Args:
        ids: of the rows, (n,).
        probs: calibrated probabilities, (n, c).
        gold: true classes, (n,).
        origin: fingerprint of the data, and the split.
    """

    ids: list[str]
    probs: FloatArray
    gold: NDArray[np.int64]
    origin: tuple[Any, str]

    def first(self, n: int) -> Rows:
        """The first n rows."""
        return Rows(self.ids[:n], self.probs[:n], self.gold[:n], self.origin)


@dataclass(frozen=True)
class Rule:
    """When a run abstains, and its label sets.

    Args:
        labels: names, (c,).
        options: the limits.
        rows: number of calibration rows.
        threshold: a text is answered if the confidence is higher; infinite: none is; None: no limit of the risk is set.
        floors: a label is in the set if its probability is at least this, (c,); None: no coverage is set.
    """

    labels: tuple[str, ...]
    options: Selection
    rows: int
    threshold: float | None
    floors: FloatArray | None

    def answered(self, probs: FloatArray) -> NDArray[np.bool_]:
        """Whether each text is answered, (n,), given the probabilities, (n, c)."""
        assert self.threshold is not None
        return probs.round(DIGITS).max(axis=1, initial=0) > self.threshold

    def in_set(self, probs: FloatArray) -> NDArray[np.bool_]:
        """Whether each label is in the label set, (n, c); the predicted label always is, so that no set is empty."""
        assert self.floors is not None
        probs = probs.round(DIGITS)
        return (probs >= self.floors) | (np.arange(len(self.labels)) == probs.argmax(axis=1)[:, None])

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that `cells` returns."""
        return ("abstain",) * (self.threshold is not None) + ("label_set",) * (self.floors is not None)

    def cells(self, probs: FloatArray) -> dict[str, list[Any]]:
        """``abstain`` and ``label_set`` of each text, as far as limits are set."""
        cells: dict[str, list[Any]] = {}
        if self.threshold is not None:
            cells["abstain"] = (~self.answered(probs)).tolist()
        if self.floors is not None:
            names = np.array(self.labels, dtype=object)
            cells["label_set"] = [names[row].tolist() for row in self.in_set(probs)]
        return cells


# ------------------------------------------------------------------------------------------------ on labeled rows


def threshold(confidence: FloatArray, wrong: NDArray[np.bool_], limit: float, level: float) -> float:
    """The lowest threshold whose error rate is below a limit with probability 1 - level (learn then test).

    Each confidence of a row is a candidate; the rows above it are a sample of what it would answer. From a fixed number
    of rows on, the candidates are tested from the highest to the lowest by the exact binomial test of the hypothesis
    that their error rate is above the limit, which is equivalent to the Clopper-Pearson bound; the sequence ends at the
    first hypothesis that is not rejected (fixed-sequence testing, Angelopoulos et al. 2021, "Learn then test"). A
    mistake among the surest rows would end it at once, so there are several sequences, from `STARTS`, which share the
    level. A sequence accepts a wrong threshold only if it rejects the first hypothesis that is true: the rows above
    that candidate are independent, and each is wrong with at least the limit. For a sequence that starts below it, this
    needs an error rate that does not rise with the confidence.

    Args:
        confidence: (n,).
        wrong: whether the predicted label is not the true one, (n,).

    Returns:
        The threshold; infinite if none is accepted, 0 if all rows are answered.
    """
    from scipy.stats import binom  # imported here because it takes half a second

    n, order = len(confidence), np.argsort(-confidence, kind="stable")
    values = confidence[order]
    above = np.flatnonzero(np.append(values[1:] < values[:-1], True)) + 1  # rows above each candidate
    candidates = np.append(values[above[:-1]], 0.0)
    p = binom.cdf(np.cumsum(wrong[order])[above - 1], above, limit)
    least = math.ceil(math.log(level / len(STARTS)) / math.log1p(-limit))  # with fewer rows, no test can reject
    starts = {max(least, math.ceil(share * n)) for share in STARTS}
    lowest = math.inf
    for start in starts:
        first = int(np.searchsorted(above, start))
        accepted = np.append(p[first:], 1.0) <= level / len(starts)
        if count := int(accepted.argmin()):
            lowest = min(lowest, float(candidates[first + count - 1]))
    return lowest


def floors(probs: FloatArray, gold: NDArray[np.int64], coverage: float, by_class: bool) -> FloatArray:
    """The least probability with which a label is in the label set (split conformal prediction).

    A label set contains the labels whose probability is at least the k-th largest probability of a true label, where
    k = ceil((n + 1) coverage), and all labels if k > n (Vovk et al. 2005; Sadinle et al. 2019). By class, the rows of
    each label determine its floor (Mondrian conformal prediction).

    Args:
        probs: (n, c).
        gold: true classes, (n,).

    Returns:
        One per label, (c,).
    """

    def floor(true: FloatArray) -> float:
        k = math.ceil((len(true) + 1) * coverage - 1e-9)
        return float(np.sort(true)[::-1][k - 1]) if k <= len(true) else 0.0

    true = probs[np.arange(len(gold)), gold]
    return np.array([floor(true[gold == label] if by_class else true) for label in range(probs.shape[1])])


def choose(options: Selection, labels: Sequence[str], rows: Rows) -> Rule:
    """Choose the threshold and the label sets of a run on labeled rows."""
    bar, low = None, None
    if options.risk is not None:
        wrong = rows.probs.argmax(axis=1) != rows.gold
        bar = threshold(rows.probs.max(axis=1, initial=0), wrong, options.risk, 1 - options.confidence)
    if options.coverage is not None:
        low = floors(rows.probs, rows.gold, options.coverage, options.coverage_by == "class")
    return Rule(tuple(labels), options, len(rows.ids), bar, low)


def of_run(options: CalibratedSelection, path: Path, labels: LabelSpace) -> tuple[Rule, Rows] | None:
    """Choose the rule of a run or export in a folder, and report it; None if no limit is set.

    Raises:
        ConfigError: for a task without one probability per class, or rows that are not of this run.
        RunError: if the run has no validation predictions.
    """
    if options.risk is None and options.coverage is None:
        return None
    if labels.task in TASKS:
        text = f"need one class per row, with probabilities, and this run has task={labels.task}; leave them out"
        raise ConfigError([Problem("stage.risk and stage.coverage", text)])
    rows = validation(path, labels.names)
    if options.calibration is not None:
        try:
            place, evaluation, facts = run_folder.read(options.calibration)
        except RunError as error:
            raise RunError(str(error).replace("run:", "stage.calibration:", 1)) from None
        if (facts.get("stage"), facts.get("run"), facts.get("protocol")) != ("evaluate", str(path), "label"):
            text = f"{place} is not a folder that python run.py stage=evaluate run={path} has written"
            raise ConfigError([Problem("stage.calibration", text)])
        assert isinstance(evaluation.stage, EvaluateStage)
        rows = read(place / "predictions.jsonl", labels.names, (facts["data_fingerprint"], evaluation.stage.split))
    if rows is None:
        raise RunError(
            f"run: {path} has no {FILE}, on which limits are met: an older version wrote it, or its method uses no "
            f"validation rows. Run python run.py stage=evaluate run={path} stage.split=validation and add "
            "stage.calibration=<the folder that it writes>"
        )
    rule = choose(options, labels.names, rows)
    print("\n".join(_messages(rule, rows)))
    return rule, rows


def validation(path: Path, labels: Sequence[str]) -> Rows | None:
    """The validation predictions in the folder of a run or of an export; None if there are none."""
    facts = [path / name for name in (run_folder.EXPORTED, "run.json") if (path / name).is_file()]
    fingerprint = finished_runs.read_json(facts[0]).get("data_fingerprint") if facts else None
    return read(path / FILE, labels, (fingerprint, "validation"))


def read(file: Path, labels: Sequence[str], origin: tuple[Any, str]) -> Rows | None:
    """Read a prediction file; None if there is none.

    Raises:
        RunError: if it is damaged, has no probabilities, or other labels.
    """
    if not file.is_file():
        return None
    records, number = finished_runs.read_lines(file), {name: place for place, name in enumerate(labels)}
    if not records:
        raise RunError(f"{file} is empty; repeat its run, or leave it out")
    try:
        probs = np.array([[record["probs"][name] for name in labels] for record in records], dtype=np.float64)
        gold = np.array([number[record["gold"]] for record in records], dtype=np.int64)
    except KeyError as error:
        raise RunError(f"{file} has no probabilities of the labels {', '.join(labels)}: {error} is missing") from None
    return Rows([record["id"] for record in records], probs.reshape(len(records), len(labels)), gold, origin)


def _messages(rule: Rule, rows: Rows) -> Iterator[str]:
    options, where = rule.options, f"the {rule.rows:,} {rows.origin[1]} rows"
    if rule.threshold is not None and not math.isinf(rule.threshold):
        share = percent(rule.answered(rows.probs).mean(), 1)
        yield f"stage.risk={options.risk:g}: confidence above {rule.threshold:.6f}, as for {share} of {where}"
    elif options.risk is not None:
        steps = (step / 100 for step in range(int(100 * options.risk) + 1, 100))
        tried = (options.model_copy(update={"risk": step, "coverage": None}) for step in steps)
        found = (one.risk for one in tried if choose(one, rule.labels, rows).threshold != math.inf)
        yield (
            f"warning: stage.risk={options.risk:g} cannot be met, so the run abstains from every text; on {where} the "
            f"smallest limit that can be met is about {next(found, None) or 'none'}. More rows allow smaller limits "
            "(stage.calibration)"
        )
    if rule.floors is not None:
        size = rule.in_set(rows.probs).sum() / max(rule.rows, 1)
        yield f"stage.coverage={options.coverage:g}: {size:.2f} labels per set, on {where}"
        if always := [name for name, floor in zip(rule.labels, rule.floors, strict=True) if floor == 0]:
            yield f"warning: too few of these rows have the label {', '.join(always)}, so it is in every label set"


# ------------------------------------------------------------------------------------------------ on test rows


def realized(rule: Rule, probs: FloatArray, gold: NDArray[np.int64]) -> dict[str, Any]:
    """Risk and coverage on labeled rows, (n, c) and (n,), with exact binomial intervals (Clopper-Pearson, 95 %)."""
    values: dict[str, Any] = {"calibration_rows": rule.rows, "confidence": rule.options.confidence}
    if rule.threshold is not None:
        kept = rule.answered(probs)
        wrong = kept & (probs.round(DIGITS).argmax(axis=1) != gold)
        values["threshold"] = None if math.isinf(rule.threshold) else rule.threshold
        values["answered"] = _share(kept, "")
        values["wrong among the answered"] = _share(wrong[kept], f"at most {rule.options.risk:g}")
    if rule.floors is not None:
        inside = rule.in_set(probs)
        hit, limit = inside[np.arange(len(gold)), gold], f"at least {rule.options.coverage:g}"
        values["labels_per_set"] = float(inside.sum(axis=1).mean())
        values["true label in the label set"] = _share(hit, limit)
        by_class = limit if rule.options.coverage_by == "class" else ""
        for label, name in enumerate(rule.labels):
            values[f"the same, of {name}"] = _share(hit[gold == label], by_class)
    return values


def _share(hits: NDArray[np.bool_], limit: str) -> dict[str, Any]:
    from scipy.stats import binomtest  # imported here because it takes half a second

    k, n = int(hits.sum()), len(hits)
    ends = binomtest(k, n).proportion_ci(method="exact") if n else (0.0, 1.0)
    return {"k": k, "n": n, "share": k / n if n else None, "interval": [float(end) for end in ends], "limit": limit}


def table(found: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """A table of what `realized` returns, by name of the run."""
    rows = []
    for name, values in found.items():
        for what, one in values.items():
            if isinstance(one, dict):
                share, (low, high) = "-" if one["share"] is None else f"{one['share']:.4f}", one["interval"]
                rows.append([name, what, one["limit"], share, f"{one['k']:,}/{one['n']:,}", f"{low:.3f}-{high:.3f}"])
    sizes = [f"{values['labels_per_set']:.2f} ({name})" for name, values in found.items() if "labels_per_set" in values]
    caption = "Thresholds were chosen on other labeled rows. Exact 95 % binomial intervals."
    caption += f" Labels per set: {', '.join(sizes)}." if sizes else ""
    columns = ["configuration", "rows", "limit", "share", "count", "interval"]
    return Table(title, columns, rows, caption, words=("rows", "limit"), optional=(4,))


# ------------------------------------------------------------------------------------------------ risk and coverage


def risks(confidence: FloatArray, correct: NDArray[np.bool_]) -> FloatArray:
    """Error rate among the 1, 2, ..., n rows with the highest confidence, (n,); of equal ones, the expected rate."""
    order = np.argsort(-confidence, kind="stable")
    _, tied, counts = np.unique(-confidence[order], return_inverse=True, return_counts=True)
    wrong = np.bincount(tied, ~correct[order])[tied] / counts[tied]  # the expectation over orders of equal rows
    return np.asarray(np.cumsum(wrong) / np.arange(1, len(order) + 1))


def aurc(confidence: FloatArray, correct: NDArray[np.bool_], seed: int = 0) -> tuple[float, float, float]:
    """Area under the risk-coverage curve (Geifman et al. 2019): the mean of `risks`, with a 95 % bootstrap interval."""
    n, rng = len(confidence), np.random.default_rng(seed)
    draws = []
    for _ in range(SAMPLES if n < 20_000 else SAMPLES // 5):
        chosen = rng.integers(0, n, n)
        draws.append(risks(confidence[chosen], correct[chosen]).mean())
    low, high = metrics.percentiles(np.array(draws))
    return float(risks(confidence, correct).mean()), low, high
