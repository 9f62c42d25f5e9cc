"""Published tables: the row that matches a run group, and significance tests between rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finsa.config import Published, PublishedRow
from finsa.evaluation import metrics, statistics
from finsa.evaluation.comparison import SCORES, Record
from finsa.evaluation.finished_runs import RunGroup
from finsa.evaluation.statistics import LEVEL

UNPAIRED = "pairs unknown"


def confusion(row: PublishedRow) -> NDArray[np.int64] | None:
    """A row's confusion matrix; unparsable answers are one more predicted class, without true rows."""
    if row.confusion is None:
        return None
    counts = np.array(row.confusion)
    if row.unparsable is None:
        return counts
    wide = np.column_stack([counts, row.unparsable])
    return np.vstack([wide, np.zeros(wide.shape[1], dtype=np.int64)])


def recomputed(row: PublishedRow) -> dict[str, float] | None:
    """Scores from a row's confusion matrix, averaged over the real classes; None if no matrix is published."""
    counts, classes = confusion(row), len(row.confusion or ())
    if counts is None:
        return None
    f1, support = metrics.f1_scores(counts)[:classes], counts.sum(axis=1)[:classes]
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float((f1 * support).sum() / support.sum()),
    }


def score(row: PublishedRow, name: str) -> float | None:
    """A row's score: from its confusion matrix if there is one, which avoids rounding; otherwise as printed."""
    return (recomputed(row) or printed(row)).get(name)


def printed(row: PublishedRow) -> dict[str, float]:
    """A row's scores as printed."""
    return {str(name): value for name, value in row.scores.items()}


def correct_rows(row: PublishedRow, n: int | None) -> int | None:
    """Number of correct rows: as published, from the confusion matrix, or from the accuracy; None if unknown."""
    accuracy = score(row, "accuracy")
    if row.correct is not None or accuracy is None or n is None:
        return row.correct
    return round(accuracy * n)


# ------------------------------------------------------------------------------------------------ compared with runs


def matching_row(published: Published, group: RunGroup) -> str | None:
    """The row with a group's method and model; if no row has the model, the only row with the method."""
    candidates = [name for name, row in published.rows.items() if group.method in row.methods]
    exact = [name for name in candidates if published.rows[name].model == group.model]
    return exact[0] if exact else candidates[0] if len(candidates) == 1 else None


def published_scores(published: Published, group: RunGroup, record: Record) -> Record:
    """The published scores for a group, and the differences of the group's scores from them."""
    name = matching_row(published, group)
    scores: Record = {"published_row": name}
    for key in SCORES:
        theirs = score(published.rows[name], key) if name else None
        scores[f"published_{key}"] = theirs
        scores[f"{key}_minus_published"] = None if theirs is None else record[key] - theirs
    return scores


def mismatches(published: Published, groups: Sequence[RunGroup]) -> list[str]:
    """Differences between the setup of the runs and the published one; different scores are then to be expected."""
    run = groups[0].runs[0]
    differences = []
    if run.data != published.data:
        differences.append(f"data {run.data} instead of {published.data}")
    if published.n is not None and len(run.rows) != published.n:
        differences.append(f"{len(run.rows):,} test rows instead of {published.n:,}")
    theirs = {published.rows[name].model for group in groups if (name := matching_row(published, group))}
    ours = {group.model for group in groups}
    if theirs - {None} and not ours & theirs:
        differences.append(
            f"model {', '.join(sorted(ours))} instead of {', '.join(sorted(str(one) for one in theirs))}"
        )
    if not theirs:
        differences.append("no configuration whose method and model have a row in the table")
    return differences


def across(published: Published, runs: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Runs and published rows side by side over several data sets; scores of different measures are never mixed.

    Args:
        published: a table over several data sets.
        runs: by data set, the records of a comparison, and ``base``, ``billions`` and ``training`` of each group.

    Returns:
        One record per system and measure: ``system``, ``measure``, the score by data set; for runs also its interval,
        as ``<data>_low`` and ``<data>_high``, and ``<data>_n`` test rows; ``base``, ``billions`` and ``training``.
    """
    described, records = ("base", "billions", "training"), list[Record]()
    for measure in ("weighted_f1", "accuracy", "macro_f1"):
        known = [name for name, row in published.rows.items() if any(measure in one for one in row.by_data.values())]
        systems: dict[str, Record] = {}
        for data, of_data in runs.items() if known else ():
            for one in of_data:
                start = {"system": one["arm"], "measure": measure, "run": True, **{key: one[key] for key in described}}
                record = systems.setdefault(one["arm"], start)
                record |= {data: one[measure], f"{data}_n": one["n"]}
                record |= {f"{data}_{end}": one[f"{measure}_{end}"] for end in ("low", "high")}
        records += systems.values()
        for name in known:
            row = published.rows[name]
            found = {data: scores.get(measure) for data, scores in row.by_data.items()}
            described_row = {key: getattr(row, key) for key in described}
            records.append({"system": name, "measure": measure, "run": False, **described_row, **found})
    return records


# ------------------------------------------------------------------------------------------------ the table itself


@dataclass(frozen=True)
class Analysis:
    """Intervals and tests of a published table.

    Args:
        records: one per row.
        remarks: the summary, one sentence each; the first is about the best row.
    """

    records: list[Record]
    remarks: list[str]


def analyze(published: Published) -> Analysis:
    """Compute intervals and exact McNemar tests of a published table's rows, each against its untrained model.

    If the pairs are not published, the p-value is a range: the smallest and largest over all pairs with these totals. A
    verdict is given if it holds for the whole range, corrected for the number of tests (Holm).
    """
    bases = {name: base for name in published.rows if (base := _base(published, name))}
    tests = _against(published, bases)
    records = []
    for name, row in published.rows.items():
        hits, again = correct_rows(row, published.n), recomputed(row) or {}
        low, high = (None, None) if hits is None or published.n is None else metrics.wilson(hits, published.n)
        record: Record = {"row": name, **{key: printed(row).get(key) for key in SCORES}}
        record |= {"accuracy_low": low, "accuracy_high": high, "right": hits, "n": published.n}
        record |= {"macro_f1_recomputed": again.get("macro_f1"), "against": bases.get(name)}
        records.append({**record, **tests.get(name, dict.fromkeys(_TEST)), "note": row.note})
    return Analysis(records, [_about_best(published), *published.notes])


_TEST = ("fixed", "broken", "p_low", "p_high", "p_high_holm", "verdict")


def _base(published: Published, name: str) -> str | None:
    row = published.rows[name]
    if row.pairs is not None:
        return row.pairs.row
    same = [
        other
        for other, its in published.rows.items()
        if its.model == row.model and its.method == "zero_shot" != row.method
    ]
    return same[0] if row.model is not None and same else None


def _against(published: Published, others: dict[str, str]) -> dict[str, Record]:
    """Test rows against other rows of their table; rows without a count are skipped."""
    ranges, more, pairs = {}, {}, {}
    for name, other in others.items():
        first, second = (correct_rows(published.rows[one], published.n) for one in (name, other))
        if first is None or second is None:
            continue
        known = published.rows[name].pairs
        pairs[name] = known if known is not None and known.row == other else None
        ranges[name] = statistics.mcnemar_range(first, second, published.n or 0)  # counted only if n is known
        if (pair := pairs[name]) is not None:
            ranges[name] = (statistics.mcnemar(pair.fixed, pair.broken),) * 2
        more[name] = first - second
    lowest, highest = (statistics.holm([one[end] for one in ranges.values()]) for end in (0, 1))
    return {
        name: {
            "fixed": pair and pair.fixed,
            "broken": pair and pair.broken,
            "p_low": ranges[name][0],
            "p_high": ranges[name][1],
            "p_high_holm": high,
            "verdict": _verdict(more[name], low, high),
        }
        for (name, pair), low, high in zip(pairs.items(), lowest, highest, strict=True)
    }


def _verdict(more: int, lowest: float, highest: float) -> str:
    if highest < LEVEL:
        return "better" if more > 0 else "worse"
    return "inconclusive" if lowest >= LEVEL else UNPAIRED


def _about_best(published: Published) -> str:
    """The sentence about the best row, and the rows from which it does not differ significantly."""
    counted = {
        name: count for name, row in published.rows.items() if (count := correct_rows(row, published.n)) is not None
    }
    if len(counted) < 2:
        known = f"only {next(iter(counted))} has" if counted else "no row has"
        return f"Rows cannot be tested against each other: {known} an accuracy, a confusion matrix or a count."
    top = max(counted, key=lambda name: counted[name])
    tests = _against(published, {name: top for name in counted if name != top})
    verdicts = {name: test["verdict"] for name, test in tests.items()}
    left = ", ".join(name for name in published.rows if name not in counted)
    unknown = f"; no accuracy or counts are published for {left}" if left else ""
    best = f"{top} classifies the most rows correctly ({counted[top]:,} of {published.n:,}{unknown})"
    close = [name for name, verdict in verdicts.items() if verdict == "inconclusive"]
    if close:
        return (
            f"Inconclusive: {best}, but its difference from {', '.join(close)} is not significant for any possible "
            "pairs (exact McNemar test, Holm-corrected)."
        )
    unpaired = [name for name, verdict in verdicts.items() if verdict == UNPAIRED]
    if unpaired:
        return f"{best}; without the pairs, its difference from {', '.join(unpaired)} cannot be tested."
    return f"{best}, significantly more than any other row for all possible pairs."
