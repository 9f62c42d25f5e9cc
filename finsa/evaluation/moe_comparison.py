"""A mixture beside what it is made of, on the same test rows: its experts, in and out of domain, and their union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.evaluation import metrics, statistics

Classes = NDArray[np.int64]
MIXTURE, UNION, ORACLE, WRONG = "mixture", "union", "true domain's expert", "another domain's expert"
SAMPLES, SEED = 2000, 0  # of the bootstrap


def arms(alone: Mapping[str, Classes], domains: Sequence[str | None]) -> dict[str, Classes]:
    """What the experts answer alone, with the true domain and with a wrong one.

    Args:
        alone: each expert's answers to all rows, (n,).
        domains: of the rows; the last two arms need every one of them to be an expert's.

    Returns:
        Answers by arm, (n,). Of more than two experts, the next one of another domain is the wrong one.
    """
    found = {f"{name} alone": answers for name, answers in alone.items()}
    if not set(domains) <= set(alone):
        return found
    names = list(alone)
    own = np.array([names.index(str(domain)) for domain in domains])
    table, rows = np.array([alone[name] for name in names]), np.arange(len(own))
    return {**found, ORACLE: table[own, rows], WRONG: table[(own + 1) % len(names), rows]}


def compare(
    arms: Mapping[str, Classes], gold: Classes, domains: Sequence[str | None], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Score arms and test the mixture against every other one, row by row.

    Args:
        arms: answers by arm, (n,); one is the mixture.
        gold: true classes, (n,).
        domains: of the rows.
        labels: names of the classes.

    Returns:
        One record per arm: accuracy, macro_f1 with its interval, macro_f1 by domain; and for all but the mixture how
        it differs from them: rows that only the mixture has right (``fixed``) and only the other (``broken``), the
        exact McNemar p, and the difference in macro-F1 with the interval, the p and the verdict of Holm's procedure.
    """
    tests = _tests(arms, gold, len(labels))
    named = np.array([domain or "(none)" for domain in domains])
    records = []
    for name, answers in arms.items():
        report = metrics.report(gold.tolist(), answers.tolist(), labels)
        low, high = report["intervals"]["macro_f1"]
        record: dict[str, Any] = {"arm": name, "n": len(gold), "accuracy": report["accuracy"]}
        record |= {"macro_f1": report["macro_f1"], "macro_f1_low": low, "macro_f1_high": high}
        for domain in sorted(set(named.tolist())):
            rows = named == domain
            part = metrics.report(gold[rows].tolist(), answers[rows].tolist(), labels)
            record[f"macro_f1 {domain}"] = part["macro_f1"]
        records.append(record | tests.get(name, {}))
    return records


def _tests(arms: Mapping[str, Classes], gold: Classes, classes: int) -> dict[str, dict[str, Any]]:
    """Test the mixture against every other arm, corrected for their number."""
    mixture, others = arms[MIXTURE], {name: answers for name, answers in arms.items() if name != MIXTURE}
    drawn = [
        statistics.paired_draws(gold, mixture[None], other[None], classes, SAMPLES, SEED) for other in others.values()
    ]
    found: dict[str, dict[str, Any]] = {}
    for (name, other), one in zip(others.items(), statistics.differences(drawn), strict=True):
        right, theirs = mixture == gold, other == gold
        fixed, broken = int((right & ~theirs).sum()), int((theirs & ~right).sum())
        found[name] = {"fixed": fixed, "broken": broken, "mcnemar_p": statistics.mcnemar(fixed, broken)}
        found[name] |= {"difference": one.value, "difference_low": one.low, "difference_high": one.high}
        found[name] |= {"p_holm": one.corrected, "verdict": one.verdict}
    return found
