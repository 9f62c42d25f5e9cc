"""What the arms of a report come to: scores with intervals, paired tests, costs, and what can be said.

A record is one arm's row of ``report.csv``: numbers by name; None where a number does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.config import ReportStage
from finsa.errors import ConfigError, Problem, suggest
from finsa.evaluation import calibration, metrics, statistics
from finsa.evaluation.finished_runs import Run
from finsa.evaluation.run_groups import Arm

Record = dict[str, Any]
SCORES = ("accuracy", "macro_f1", "weighted_f1")
SAMPLES_PER_TEST = 200
FEW_ROWS, FEW_OF_CLASS = 300, 10  # below, the report says what one row weighs, and that F1 intervals are too narrow


@dataclass(frozen=True)
class Comparison:
    """A comparison of arms on the same test rows.

    Args:
        arms: sorted by macro-F1, the highest first.
        records: one per arm.
        baseline: name of the arm that the others are tested against, beside the tests against the first.
        best: name of the first arm where it is better than every other one beyond the noise; None otherwise.
        remarks: what can be said, one sentence each; the first is about the best.
    """

    arms: list[Arm]
    records: list[Record]
    baseline: str
    best: str | None
    remarks: list[str]


def compare(arms: Sequence[Arm], options: ReportStage) -> Comparison:
    """Compare arms on the same test rows.

    Raises:
        ConfigError: where the baseline is none of them.
    """
    scored = [(arm, {**_identity(arm), **_scores(arm, options), **_costs(arm)}) for arm in arms]
    scored.sort(key=lambda pair: -pair[1]["macro_f1"])
    ranked, records = [arm for arm, _ in scored], [record for _, record in scored]
    baseline = _baseline(ranked, options.baseline)
    drawn = _Draws(ranked, options)
    for reference, prefix in ((baseline, ""), (ranked[0], "vs_best_")):
        tests = _tests(reference, ranked, drawn)
        for arm, record in zip(ranked, records, strict=True):
            if not prefix:
                record["baseline"] = baseline.name
            record |= {f"{prefix}{key}": value for key, value in tests.get(arm.name, _NO_TEST).items()}
    best, about_best = _best(records)
    for record in records:
        record["best"] = record["arm"] == best
    return Comparison(ranked, records, baseline.name, best, [about_best, *_small(arms[0]), *_shared(arms)])


def _baseline(arms: Sequence[Arm], name: str | None) -> Arm:
    """The arm that is named, or one that learns nothing (zero-shot, then the majority), or the best."""
    if name is None:
        methods = [arm.runs[0].config["method"] for arm in arms]
        kinds = [(method.get("baseline") or {}).get("kind") for method in methods]
        untrained = [
            arm
            for wanted in (None, "majority")
            for arm, method, kind in zip(arms, methods, kinds, strict=True)
            if method["learn"] == "nothing" and kind == wanted
        ]
        return untrained[0] if untrained else arms[0]
    named = {arm.name: arm for arm in arms}
    if name not in named:
        raise ConfigError([Problem("stage.baseline", f"there is no arm '{name}'. {suggest(name, named)}")])
    return named[name]


# ------------------------------------------------------------------------------------------------ one arm


def _identity(arm: Arm) -> Record:
    return {
        "arm": arm.name,
        "method": arm.method,
        "model": arm.model,
        "runs": len(arm.runs),
        "seeds": " ".join(map(str, arm.seeds)),
        "n": len(arm.runs[0].rows),
    }


def _scores(arm: Arm, options: ReportStage) -> Record:
    """Means over the runs, intervals, and for several runs the spread.

    The intervals of one run are those of its record: one number has one interval everywhere. Those of several are
    percentiles of the bootstrap over rows and runs.
    """
    run, classes = arm.runs[0], len(arm.runs[0].labels)
    confusions = statistics.confusions(run.gold, arm.predicted, classes)
    values = metrics.averages(confusions)
    drawn = statistics.resampled(run.gold, arm.predicted, classes, options.samples, options.seed)
    record: Record = {}
    for name in SCORES:
        low, high = metrics.percentiles(statistics.over_seeds(drawn[name], options.seed + 1))
        if len(arm.runs) == 1:
            low, high = run.report["intervals"][name]
        spread = float(values[name].std(ddof=1)) if len(arm.runs) > 1 else None
        record |= {name: float(values[name].mean()), f"{name}_low": low, f"{name}_high": high, f"{name}_sd": spread}
    for name in ("macro_precision", "macro_recall"):
        record[name] = _mean([one.report[name] for one in arm.runs])
    for label in run.labels:
        for name in ("precision", "recall", "f1"):
            record[f"{name}_{label}"] = _mean([one.report["per_class"][label][name] for one in arm.runs])
    errors = [calibration.ece(one.confidence, one.correct) for one in arm.runs]
    return {**record, "calibration_error": _mean(errors)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _costs(arm: Arm) -> Record:
    """What an arm cost, means over its runs; nothing is made up where a run does not say."""
    facts = [run.facts for run in arm.runs]
    record: Record = {"rows_per_second": _mean([fact.get("rows_per_second") for fact in facts])}
    memory = _mean([fact.get("peak_memory_bytes") for fact in facts])
    record["peak_memory_gib"] = None if memory is None else memory / 2**30
    for name in ("trainable_parameters", "total_parameters"):
        value = _mean([fact.get(name) for fact in facts])
        record[name] = None if value is None else round(value)
    record["seconds_to_best"] = _mean([seconds_to_best(run) for run in arm.runs])
    for name in ("training_seconds", "wall_seconds"):
        record[name] = _mean([fact.get(name) for fact in facts])
    return record


def seconds_to_best(run: Run) -> float | None:
    """Seconds from the start of training to the validation that chose the checkpoint; None where it cannot be told.

    The trainer's last record is written when training ends and says how long it took.
    """
    measure = f"eval_{run.config.get('train', {}).get('select_by')}"
    scored = [record for record in run.log if measure in record and "time" in record]
    ends = [record for record in run.log if "train_runtime" in record and "time" in record]
    if not scored or not ends:
        return None
    choose = min if measure == "eval_loss" else max
    best = choose(scored, key=lambda record: record[measure])  # of equal ones the first, as the trainer keeps it
    return float(best["time"] - (ends[-1]["time"] - ends[-1]["train_runtime"]))


# ------------------------------------------------------------------------------------------------ two arms


_NO_TEST: Record = dict.fromkeys(
    (
        "difference",
        "difference_low",
        "difference_high",
        "bootstrap_p",
        "bootstrap_p_holm",
        "fixed",
        "broken",
        "mcnemar_p",
        "mcnemar_p_holm",
        "verdict",
    )
)


class _Draws:
    """Bootstrap differences between arms, drawn once for each pair: one test has one p, whichever way it is asked for.

    Args:
        arms: in their order.
        options: of the report.
    """

    def __init__(self, arms: Sequence[Arm], options: ReportStage) -> None:
        self.place = {arm.name: place for place, arm in enumerate(arms)}
        # Holm's first step looks that much further into the tails than a single test.
        self.samples, self.seed = max(options.samples, SAMPLES_PER_TEST * len(arms)), options.seed
        self._known: dict[tuple[str, str], tuple[float, NDArray[np.float64]]] = {}

    def __call__(self, first: Arm, second: Arm) -> tuple[float, NDArray[np.float64]]:
        """The difference in macro-F1, first minus second, and its draws."""
        if self.place[first.name] > self.place[second.name]:
            value, drawn = self(second, first)
            return -value, -drawn
        key, run = (first.name, second.name), first.runs[0]
        if key not in self._known:
            self._known[key] = statistics.paired_draws(
                run.gold, first.predicted, second.predicted, len(run.labels), self.samples, self.seed
            )
        return self._known[key]


def _tests(reference: Arm, arms: Sequence[Arm], drawn: _Draws) -> dict[str, Record]:
    """Test every other arm against one; each kind of test is corrected for their number."""
    others = [arm for arm in arms if arm is not reference]
    differences = statistics.differences([drawn(arm, reference) for arm in others])
    pairs = [_mcnemar(arm, reference) for arm in others]
    pairs_corrected = statistics.holm([p for *_, p in pairs])
    return {
        arm.name: {
            "difference": one.value,
            "difference_low": one.low,
            "difference_high": one.high,
            "bootstrap_p": one.p,
            "bootstrap_p_holm": one.corrected,
            "fixed": fixed,
            "broken": broken,
            "mcnemar_p": p,
            "mcnemar_p_holm": p_holm,
            "verdict": one.verdict,
        }
        for arm, one, (fixed, broken, p), p_holm in zip(others, differences, pairs, pairs_corrected, strict=True)
    }


def _mcnemar(first: Arm, second: Arm) -> tuple[int, int, float]:
    """The pair of runs that differs least clearly: rows only the first has right, only the second, and the p.

    Runs of the same seed are paired; where the arms share none, all with all. A difference counts where it holds for
    every pair, so the largest p is the arm's.
    """
    gold = first.runs[0].gold
    pairs = [(a, b) for a, b in product(first.runs, second.runs) if a.config["seed"] == b.config["seed"]]
    tested = []
    for a, b in pairs or product(first.runs, second.runs):
        right, other = a.predicted == gold, b.predicted == gold
        fixed, broken = int((right & ~other).sum()), int((other & ~right).sum())
        tested.append((fixed, broken, statistics.mcnemar(fixed, broken)))
    return max(tested, key=lambda pair: pair[2])


# ------------------------------------------------------------------------------------------------ what can be said


def _best(records: Sequence[Record]) -> tuple[str | None, str]:
    """The first arm where it is better than every other one, and the sentence about it."""
    top, *others = records
    if not others:
        return None, "One arm alone: there is nothing to compare it with."
    name, has = top["arm"], f"{top['arm']} has the highest macro-F1, {top['macro_f1']:.4f}"
    how = "paired bootstrap" + f", Holm-corrected for {len(others)} comparisons" * (len(others) > 1)
    close = [
        f"{record['arm']} ({-record['vs_best_difference']:.4f} lower, p = {record['vs_best_bootstrap_p_holm']:.4f})"
        for record in others
        if record["vs_best_verdict"] != "worse"
    ]
    if not close:
        return name, f"{has}, and beats every other arm beyond the noise ({how})."
    more = f" and {len(close) - 3} more" if len(close) > 3 else ""
    return None, (
        f"Inconclusive: {has}, but on these test rows it is not significantly better than "
        f"{'; '.join(close[:3])}{more} ({how}). So no arm is marked as the best."
    )


def _small(arm: Arm) -> Iterator[str]:
    """What the number of test rows allows to say."""
    gold, labels = arm.runs[0].gold, arm.runs[0].labels
    n = len(gold)
    if n < FEW_ROWS:
        yield f"There are only {n} test rows: one row is {100 / n:.2f} points of accuracy."
    counts = zip(labels, np.bincount(gold, minlength=len(labels)), strict=True)
    rare = [f"{label} ({count})" for label, count in counts if count < FEW_OF_CLASS]
    if rare:
        yield (
            f"Few test rows of {', '.join(rare)}: the F1 intervals are too narrow. With three rows in a class, "
            "simulated 95 % intervals of macro-F1 hold the truth in 85 % of the cases."
        )


def _shared(arms: Sequence[Arm]) -> Iterator[str]:
    """What makes numbers of these runs less comparable than they look."""
    runs = [run for arm in arms for run in arm.runs]
    for key, what in (("git_commit", "commits of finsa"), ("device", "devices"), ("versions", "library versions")):
        values = {str(run.facts[key]) for run in runs if run.facts.get(key)}
        if key == "device":  # ends in the dtype, which only a language model uses
            values = {device.rpartition(", ")[0] for device in values}
        if len(values) > 1:
            yield f"The runs were made with {len(values)} different {what}."
    bound = [
        f"{arm.name} (seed {run.config['seed']})"
        for arm in arms
        for run in arm.runs
        if calibration.at_bound((run.facts.get("calibration") or {}).get("temperature", 1.0))
    ]
    if bound:
        shown = ", ".join(bound[:5]) + (f" and {len(bound) - 5} more" if len(bound) > 5 else "")
        yield f"The temperature ended at its bound, so the probabilities are not calibrated: {shown}."
    models = [run for run in runs if run.config["method"].get("baseline") is None and run.facts.get("device")]
    dtypes = sorted({str(run.facts["device"]).rpartition(", ")[2] for run in models})
    if len(dtypes) > 1:
        yield f"The language models were run in different dtypes: {', '.join(dtypes)}."
    if len({run.facts.get("pid") for run in runs}) < len(runs):
        yield "Runs of one sweep share a process: a run's peak memory is that of the sweep until its end."
    if len({tuple(arm.seeds) for arm in arms if arm.runs[0].config["method"]["learn"] != "nothing"}) > 1:
        yield "The arms were run with different seeds."
