"""Comparison of run groups on the same test rows: scores with intervals, paired tests, costs, and a summary.

A record is one group's row of ``report.csv``: numbers by name; None for a missing number. The column of names is
called ``arm``, because scripts that read the file expect it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.config import LOWER_IS_BETTER, ReportStage
from finsa.config.base import MEASURES, headline
from finsa.errors import ConfigError, Problem, suggest
from finsa.evaluation import calibration, finished_runs, metrics, selective, statistics, value_metrics
from finsa.evaluation.finished_runs import Run, RunGroup
from finsa.evaluation.tables import TITLES

Record = dict[str, Any]
SCORES = ("accuracy", "macro_f1", "weighted_f1")
SAMPLES_PER_TEST = 200
COVERAGES = (1.0, 0.9, 0.7, 0.5)  # shares of answered rows for which the error rate is reported
FEW_ROWS, FEW_OF_CLASS = (
    300,
    10,
)  # below, the summary states the weight of one row, and that F1 intervals are too narrow
TEST_COLUMNS = (
    *("difference", "difference_low", "difference_high", "bootstrap_p", "bootstrap_p_holm"),
    *("fixed", "broken", "mcnemar_p", "mcnemar_p_holm", "verdict"),
)


@dataclass(frozen=True)
class Comparison:
    """A comparison of run groups on the same test rows.

    Args:
        groups: sorted by macro-F1, of numbers by RMSE, the best first.
        records: one per group.
        baseline: name of the group that the others are tested against, besides the tests against the best.
        best: name of the first group if it is significantly better than every other; None otherwise.
        remarks: the summary, one sentence each; the first is about the best group.
    """

    groups: list[RunGroup]
    records: list[Record]
    baseline: str
    best: str | None
    remarks: list[str]


def compare(groups: Sequence[RunGroup], options: ReportStage) -> Comparison:
    """Compare run groups on the same test rows.

    Raises:
        ConfigError: if ``stage.baseline`` is not one of them.
    """
    task = groups[0].runs[0].task
    measure, scores_of = headline(task), _value_scores if task in MEASURES else _scores
    sign = -1 if measure in LOWER_IS_BETTER else 1
    scored = [(group, {**_identity(group), **scores_of(group, options), **_costs(group)}) for group in groups]
    scored.sort(key=lambda pair: -sign * pair[1][measure])
    ranked, records = [group for group, _ in scored], [record for _, record in scored]
    baseline = _baseline(ranked, options.baseline)
    # Holm's first step needs quantiles that much further in the tails than a single test.
    samples = max(options.samples, SAMPLES_PER_TEST * len(ranked))

    @cache
    def draws(first: int, second: int) -> tuple[float, NDArray[np.float64]]:
        """Difference in the measure, first minus second, and its bootstrap draws, computed once per pair."""
        if first > second:
            value, drawn = draws(second, first)
            return -value, -drawn
        one, other = ranked[first], ranked[second]
        run = one.runs[0]
        if task in MEASURES:
            runs = [*one.predicted, *other.predicted]
            scores = value_metrics.resampled(task, run.truth, runs, samples, options.seed)[measure]
            means = [
                np.mean([value_metrics.values(task, run.truth, each)[measure] for each in group.predicted])
                for group in (one, other)
            ]
            return float(means[0] - means[1]), statistics.between(scores, len(one.runs), options.seed)
        return statistics.paired_draws(run.gold, one.predicted, other.predicted, len(run.labels), samples, options.seed)

    for reference, prefix in ((ranked.index(baseline), ""), (0, "vs_best_")):
        others = [place for place in range(len(ranked)) if place != reference]
        differences = statistics.differences([draws(place, reference) for place in others], sign)
        pairs: list[tuple[Any, Any, Any]] = [(None, None, None)] * len(others)
        corrected: Sequence[float | None] = [None] * len(others)
        if task not in MEASURES:
            pairs = [_mcnemar(ranked[place], ranked[reference]) for place in others]
            corrected = statistics.holm([p for *_, p in pairs])
        tests: dict[int, Sequence[Any]] = {
            place: (one.value, one.low, one.high, one.p, one.corrected, *pair, p_holm, one.verdict)
            for place, one, pair, p_holm in zip(others, differences, pairs, corrected, strict=True)
        }
        for place, record in enumerate(records):
            if not prefix:
                record["baseline"] = baseline.name
            values = tests.get(place, [None] * len(TEST_COLUMNS))
            record |= {f"{prefix}{name}": value for name, value in zip(TEST_COLUMNS, values, strict=True)}
    best, about_best = _best(records, measure)
    for record in records:
        record["best"] = record["arm"] == best
    remarks = [about_best, *_remarks_on_rows(groups[0].runs[0]), *_remarks_on_runs(groups)]
    return Comparison(ranked, records, baseline.name, best, remarks)


def on_mixed_texts(groups: Sequence[RunGroup], options: ReportStage) -> list[Record]:
    """Compare groups on the rows whose text has several targets with different true labels.

    A method that does not read the target gives all rows of such a text the same label, so it is wrong on some.

    Returns:
        One record per group, in order: accuracy and macro-F1 with 95 % intervals, and the paired difference of macro-F1
        from the first group; empty without such rows.
    """
    run = groups[0].runs[0]
    if not run.mixed.any():
        return []
    gold, classes = run.gold[run.mixed], len(run.labels)
    records, best = [], groups[0].predicted[:, run.mixed]
    pairs = []
    for group in groups:
        predicted = group.predicted[:, run.mixed]
        drawn = statistics.resampled(gold, predicted, classes, options.samples, options.seed)
        values = metrics.averages(statistics.confusions(gold, predicted, classes))
        record: Record = {"arm": group.name, "n": len(gold)}
        for name in ("accuracy", "macro_f1"):
            low, high = metrics.percentiles(statistics.over_seeds(drawn[name], options.seed + 1))
            record |= {name: float(values[name].mean()), f"{name}_low": low, f"{name}_high": high}
        records.append(record)
        pairs.append(statistics.paired_draws(gold, predicted, best, classes, options.samples, options.seed))
    for record, one in zip(records[1:], statistics.differences(pairs[1:]), strict=True):
        record |= {"difference": one.value, "difference_low": one.low, "difference_high": one.high}
        record |= {"bootstrap_p_holm": one.corrected, "verdict": one.verdict}
    return records


def forward_gaps(runs: Sequence[Run], options: ReportStage) -> tuple[list[Record], list[Run]]:
    """Compare the scores of runs that were split by time with those of the same configurations split otherwise.

    The test rows differ, so each group of runs has a bootstrap of its own, over its rows and runs.

    Returns:
        One record per configuration: both macro-F1 scores, and how much lower that of the later rows is (``gap``), with
        its interval; and the runs that were split by time. No record, and all runs, without such pairs.
    """
    groups, records, forward = finished_runs.group(runs)[0], list[Record](), list[Run]()
    kinds = {True: dict[str, RunGroup](), False: dict[str, RunGroup]()}
    for one in groups:
        if one.runs[0].task not in MEASURES:
            rule = one.runs[0].config["data"]["split"]["rule"]
            kinds[rule == "time"].setdefault(finished_runs.without_split(one.runs[0]), one)
    for key, later in kinds[True].items():
        other = kinds[False].get(key)
        if other is None or other.runs[0].labels != later.runs[0].labels:
            continue
        scores, drawn = [], []
        for number, one in enumerate((other, later)):
            gold, classes = one.runs[0].gold, len(one.runs[0].labels)
            confusions = statistics.confusions(gold, one.predicted, classes)
            scores.append(float(metrics.averages(confusions)["macro_f1"].mean()))
            found = statistics.resampled(gold, one.predicted, classes, options.samples, options.seed + number)
            drawn.append(statistics.over_seeds(found["macro_f1"], options.seed + number))
        low, high = metrics.percentiles(drawn[0] - drawn[1])
        record = {"arm": later.method, "rule": other.runs[0].config["data"]["split"]["rule"], "macro_f1": scores[0]}
        gap = {"forward_macro_f1": scores[1], "gap": scores[0] - scores[1], "gap_low": low, "gap_high": high}
        records.append(record | gap)
        forward += later.runs
    return records, forward if records else list(runs)


def _baseline(groups: Sequence[RunGroup], name: str | None) -> RunGroup:
    """The named group, or one without training (zero-shot, then majority), or the best."""
    if name is None:
        methods = [group.runs[0].config["method"] for group in groups]
        kinds = [(method.get("baseline") or {}).get("kind") for method in methods]
        untrained = [
            group
            for wanted in (None, "majority")
            for group, method, kind in zip(groups, methods, kinds, strict=True)
            if method["learn"] == "nothing" and kind == wanted
        ]
        return untrained[0] if untrained else groups[0]
    named = {group.name: group for group in groups}
    if name not in named:
        raise ConfigError([Problem("stage.baseline", f"there is no configuration '{name}'. {suggest(name, named)}")])
    return named[name]


def _identity(group: RunGroup) -> Record:
    return {
        "arm": group.name,
        "method": group.method,
        "model": group.model,
        "runs": len(group.runs),
        "seeds": " ".join(map(str, group.seeds)),
        "n": len(group.runs[0].rows),
    }


def _scores(group: RunGroup, options: ReportStage) -> Record:
    """Means over the runs, intervals, and for several runs the standard deviation.

    A single run has the intervals of its ``metrics.json``, so that a score has the same interval everywhere. Several
    runs have percentiles of the bootstrap over rows and runs.
    """
    run, classes = group.runs[0], len(group.runs[0].labels)
    confusions = statistics.confusions(run.gold, group.predicted, classes)
    values = metrics.averages(confusions)
    drawn = statistics.resampled(run.gold, group.predicted, classes, options.samples, options.seed)
    record: Record = {}
    for name in SCORES:
        low, high = metrics.percentiles(statistics.over_seeds(drawn[name], options.seed + 1))
        if len(group.runs) == 1:
            low, high = run.report["intervals"][name]
        spread = float(values[name].std(ddof=1)) if len(group.runs) > 1 else None
        record |= {name: float(values[name].mean()), f"{name}_low": low, f"{name}_high": high, f"{name}_sd": spread}
    for name in ("macro_precision", "macro_recall"):
        record[name] = _mean([one.report[name] for one in group.runs])
    for name in run.report.get("measures") or {}:
        found = [(one.report.get("measures") or {}).get(name) for one in group.runs]
        ends = run.report["intervals"].get(name) if len(found) == 1 else None
        if name == "cost" and len(found) > 1:
            each = np.array(run.config["evaluation"]["costs"])[run.gold, group.predicted]  # (runs, n)
            means = statistics.resampled_means(each, options.samples, options.seed)
            ends = metrics.percentiles(statistics.over_seeds(means, options.seed + 1))
        record |= {name: _mean(found), f"{name}_low": ends and ends[0], f"{name}_high": ends and ends[1]}
    for label in run.labels:
        for name in ("precision", "recall", "f1"):
            record[f"{name}_{label}"] = _mean([one.report["per_class"][label][name] for one in group.runs])
    errors = [calibration.ece(one.confidence, one.correct) for one in group.runs]
    areas = np.array([selective.aurc(one.confidence, one.correct, options.seed) for one in group.runs])
    ends = areas.mean(axis=0)[1:].tolist() if len(areas) == 1 else (None, None)
    record |= {"aurc": float(areas[:, 0].mean()), "aurc_low": ends[0], "aurc_high": ends[1]}
    for share in COVERAGES:
        at = max(1, round(share * len(run.rows))) - 1
        found = [selective.risks(one.confidence, one.correct)[at] for one in group.runs]
        record[f"error_at_{share:.0%}"] = _mean(found)
    return {**record, "calibration_error": _mean(errors)}


def _value_scores(group: RunGroup, options: ReportStage) -> Record:
    """The same for numbers and sets of labels."""
    run, task = group.runs[0], group.runs[0].task
    found = [value_metrics.values(task, run.truth, predicted) for predicted in group.predicted]
    drawn = value_metrics.resampled(task, run.truth, list(group.predicted), options.samples, options.seed)
    record: Record = {}
    for name in MEASURES[task]:
        numbers = np.array([one[name] for one in found])
        low, high = metrics.percentiles(statistics.over_seeds(drawn[name], options.seed + 1))
        if len(group.runs) == 1:
            low, high = run.report["intervals"].get(name, (np.nan, np.nan))
        spread = float(numbers.std(ddof=1)) if len(numbers) > 1 else None
        record |= {name: float(numbers.mean()), f"{name}_low": low, f"{name}_high": high, f"{name}_sd": spread}
    for label in run.labels:
        for name in ("precision", "recall", "f1"):
            record[f"{name}_{label}"] = _mean([one.report["per_class"][label][name] for one in group.runs])
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in record.items()}


def _costs(group: RunGroup) -> Record:
    """Mean costs over the runs; None if a run does not report a cost."""
    facts = [run.facts for run in group.runs]
    means = {
        name: _mean([one.get(name) for one in facts])
        for name in (
            *("rows_per_second", "peak_memory_bytes", "trainable_parameters", "total_parameters"),
            *("training_seconds", "wall_seconds", "scoring_seconds", "prompt_tokens", "thought_tokens", "thoughts_cut"),
        )
    }
    memory, scoring = means["peak_memory_bytes"], means["scoring_seconds"]
    parameters = {name: means[name] for name in ("trainable_parameters", "total_parameters")}
    return {
        "rows_per_second": means["rows_per_second"],
        "peak_memory_gib": None if memory is None else memory / 2**30,
        **{name: None if value is None else round(value) for name, value in parameters.items()},
        "seconds_to_best": _mean([seconds_to_best(run) for run in group.runs]),
        "training_seconds": means["training_seconds"],
        "wall_seconds": means["wall_seconds"],
        "prompt_tokens": means["prompt_tokens"],
        "milliseconds_per_row": None if scoring is None else 1000 * scoring / len(group.runs[0].rows),
        **{name: means[name] for name in ("thought_tokens", "thoughts_cut") if means[name] is not None},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def seconds_to_best(run: Run) -> float | None:
    """Seconds from the start of training to the validation that selected the checkpoint; None if unknown.

    The trainer writes its last record when training ends, with the duration of the training.
    """
    measure = f"eval_{run.config.get('train', {}).get('select_by')}"
    scored = [record for record in run.log if measure in record and "time" in record]
    ends = [record for record in run.log if "train_runtime" in record and "time" in record]
    if not scored or not ends:
        return None
    choose = min if measure.removeprefix("eval_") in LOWER_IS_BETTER else max
    best = choose(scored, key=lambda record: record[measure])  # the first of ties, which the trainer keeps
    return float(best["time"] - (ends[-1]["time"] - ends[-1]["train_runtime"]))


def _mcnemar(first: RunGroup, second: RunGroup) -> tuple[int, int, float]:
    """The least significant pair of runs: rows only the first classifies correctly, only the second, and the p-value.

    Runs with the same seed are paired; groups without a common seed are paired all with all. A difference must hold for
    every pair, so the largest p-value is that of the groups.
    """
    gold = first.runs[0].gold
    pairs = [(a, b) for a, b in product(first.runs, second.runs) if a.config["seed"] == b.config["seed"]]
    tested = []
    for a, b in pairs or product(first.runs, second.runs):
        correct, other = a.predicted == gold, b.predicted == gold
        fixed, broken = int((correct & ~other).sum()), int((other & ~correct).sum())
        tested.append((fixed, broken, statistics.mcnemar(fixed, broken)))
    return max(tested, key=lambda pair: pair[2])


# ------------------------------------------------------------------------------------------------ summary


def _best(records: Sequence[Record], measure: str) -> tuple[str | None, str]:
    """The first group if it is significantly better than every other, and the sentence about it."""
    top, *others = records
    if not others:
        return None, "There is only one configuration, so there is nothing to compare."
    lower, title = measure in LOWER_IS_BETTER, TITLES[measure]
    name, has = top["arm"], f"{top['arm']} has the {'lowest' if lower else 'highest'} {title}, {top[measure]:.4f}"
    how = "paired bootstrap" + f", Holm-corrected for {len(others)} comparisons" * (len(others) > 1)
    worse = "higher" if lower else "lower"
    close = [
        f"{record['arm']} ({abs(record['vs_best_difference']):.4f} {worse}, p = "
        f"{record['vs_best_bootstrap_p_holm']:.4f})"
        for record in others
        if record["vs_best_verdict"] != "worse"
    ]
    if not close:
        return name, f"{has}, significantly better than every other configuration ({how})."
    more = f" and {len(close) - 3} more" if len(close) > 3 else ""
    return None, (
        f"Inconclusive: {has}, but on these test rows it is not significantly better than "
        f"{'; '.join(close[:3])}{more} ({how}). No configuration is marked as the best."
    )


def _remarks_on_rows(run: Run) -> Iterator[str]:
    """Limits set by the number of test rows."""
    n = len(run.rows)
    if n < FEW_ROWS and run.task not in MEASURES:
        yield f"There are only {n} test rows: one row is {100 / n:.2f} points of accuracy."
    if run.task == "regression":
        return
    several = run.task in MEASURES
    found = run.truth.sum(axis=0).astype(int) if several else np.bincount(run.gold, minlength=len(run.labels))
    counts = zip(run.labels, found, strict=True)
    rare = [f"{label} ({count})" for label, count in counts if count < FEW_OF_CLASS]
    if rare:
        yield (
            f"Few test rows of {', '.join(rare)}: the F1 intervals are too narrow. With three rows in a class, "
            "simulated 95 % intervals of macro-F1 contain the true value in 85 % of the cases."
        )


def _remarks_on_runs(groups: Sequence[RunGroup]) -> Iterator[str]:
    """Differences between the runs that make their numbers less comparable than they look."""
    runs = [run for group in groups for run in group.runs]
    for key, what in (("git_commit", "commits of finsa"), ("device", "devices"), ("versions", "library versions")):
        values = {str(run.facts[key]) for run in runs if run.facts.get(key)}
        if key == "device":  # ends in the dtype, which only a language model uses
            values = {device.rpartition(", ")[0] for device in values}
        if len(values) > 1:
            yield f"The runs used {len(values)} different {what}."
    bound = [
        f"{group.name} (seed {run.config['seed']})"
        for group in groups
        for run in group.runs
        if calibration.at_bound((run.facts.get("calibration") or {}).get("temperature", 1.0))
    ]
    if bound:
        names = ", ".join(bound[:5]) + (f" and {len(bound) - 5} more" if len(bound) > 5 else "")
        yield f"The temperature ended at its bound, so the probabilities are not calibrated: {names}."
    models = [run for run in runs if run.config["method"].get("baseline") is None and run.facts.get("device")]
    dtypes = sorted({str(run.facts["device"]).rpartition(", ")[2] for run in models})
    if len(dtypes) > 1:
        yield f"The language models were run in different dtypes: {', '.join(dtypes)}."
    if len({run.facts.get("pid") for run in runs}) < len(runs):
        yield "Runs of a sweep share a process, so a run's peak memory includes that of the runs before it."
    if len({tuple(group.seeds) for group in groups if group.runs[0].config["method"]["learn"] != "nothing"}) > 1:
        yield "The configurations were run with different seeds."
