"""Mixtures of experts: analysis of the router's gates, and comparison with the mixture's parts on the same test rows.

Letters: n rows, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.config import MoeJointStage
from finsa.errors import DataError
from finsa.evaluation import metrics, statistics
from finsa.evaluation.tables import MISSING, Table, format_value, signed

Classes = NDArray[np.int64]
UNUSED = 0.05  # an expert whose mean gate is below this in every domain is reported as unused
SAME = 0.05  # domains whose mean gates differ by less than this are reported as not distinguished
MIXTURE, UNION, ORACLE, WRONG = "mixture", "union", "true domain's expert", "another domain's expert"
SAMPLES, SEED = 2000, 0  # of the bootstrap


# ------------------------------------------------------------------------------------------------ router


def analyze_gates(gates: NDArray[np.float64], domains: Sequence[str | None], experts: Sequence[str]) -> dict[str, Any]:
    """Describe the gates of a router.

    Args:
        gates: weights of the experts, (n, E).
        domains: domain of each row; None if unknown.
        experts: names; if they are domains, the correct expert of a row is that of its domain.

    Returns:
        ``accuracy`` and ``accuracy_by_domain`` of the top expert (None if no row's domain is an expert), ``load``
        (mean gate) and ``chosen`` (share of rows for which an expert is the top one) by expert, ``entropy`` of a row's
        gates and ``load_entropy`` of the mean gate, both 1 for uniform, ``confusion`` (rows by domain and top expert),
        ``mean_gates`` by domain, and ``warnings`` about a collapsed router.
    """

    def by_expert(values: NDArray[np.float64]) -> dict[str, float]:
        return {name: float(value) for name, value in zip(experts, values, strict=True)}

    number, top = len(experts), gates.argmax(axis=1)
    named = np.array([domain or "(none)" for domain in domains])
    domain_names = sorted(set(named.tolist()), key=lambda name: (name not in experts, name))
    confusion = {
        name: {expert: int((top[named == name] == place).sum()) for place, expert in enumerate(experts)}
        for name in domain_names
    }
    means = {name: gates[named == name].mean(axis=0) for name in domain_names}
    correct = {name: counts[name] / sum(counts.values()) for name, counts in confusion.items() if name in experts}
    known = sum(sum(confusion[name].values()) for name in correct)
    load, table = gates.mean(axis=0), np.array(list(means.values()))
    warnings = [
        f"Expert {name} is hardly used: its mean gate is below {UNUSED} in every domain."
        for name, most in zip(experts, table.max(axis=0), strict=True)
        if most < UNUSED
    ]
    if len(table) > 1 and np.ptp(table, axis=0).max() < SAME:
        warnings.append(
            f"The router does not distinguish the domains: no expert's mean gate differs by {SAME} between them."
        )
    return {
        "n": len(gates),
        "experts": list(experts),
        "accuracy": sum(confusion[name][name] for name in correct) / known if known else None,
        "accuracy_by_domain": correct,
        "load": by_expert(load),
        "chosen": by_expert(np.bincount(top, minlength=number) / len(gates)),
        "entropy": float(_entropy(gates).mean() / np.log(number)),
        "load_entropy": float(_entropy(load[None])[0] / np.log(number)),
        "confusion": confusion,
        "mean_gates": {name: by_expert(mean) for name, mean in means.items()},
        "warnings": warnings,
    }


def _entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of each row of (n, E), in nats."""
    return -(shares * np.log(np.clip(shares, 1e-12, None))).sum(axis=1)


def require_known_domains(stage: MoeJointStage, experts: Sequence[str], domains: Sequence[str | None]) -> None:
    """Check that the router was trained on the domains of the rows; rows without a domain are accepted.

    Raises:
        DataError: naming the domain.
    """
    unknown = sorted({domain for domain in domains if domain is not None} - set(experts))
    if stage.domain_weight > 0 and unknown:
        raise DataError(
            f"data: rows are of domain '{unknown[0]}', but this mixture's router was trained on {', '.join(experts)}. "
            "To score them without the accuracy of the router, set data.columns.domain=null"
        )


# ------------------------------------------------------------------------------------------------ comparison


def expert_answers(alone: Mapping[str, Classes], domains: Sequence[str | None]) -> dict[str, Classes]:
    """Answers of each expert alone, of the expert of each row's domain, and of the expert of another domain.

    Args:
        alone: each expert's answers to all rows, (n,).
        domains: domain of each row; the last two require that each is an expert's.

    Returns:
        Answers by model, (n,). With more than two experts, the next one is that of another domain.
    """
    answers = {f"{name} alone": predicted for name, predicted in alone.items()}
    if not set(domains) <= set(alone):
        return answers
    names = list(alone)
    expert = np.array([names.index(str(domain)) for domain in domains])
    table, rows = np.array([alone[name] for name in names]), np.arange(len(expert))
    return {**answers, ORACLE: table[expert, rows], WRONG: table[(expert + 1) % len(names), rows]}


def compare(
    answers: Mapping[str, Classes], gold: Classes, domains: Sequence[str | None], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Score models and test the mixture against each of the others on the same rows.

    Args:
        answers: by model, (n,); one of them is the mixture.
        gold: true classes, (n,).
        domains: of the rows.
        labels: class names.

    Returns:
        One record per model, named by ``arm``: accuracy, macro_f1 with its interval, macro_f1 by domain; and for
        all but the mixture how it differs from them: rows that only the mixture classifies correctly (``fixed``) and
        only the other (``broken``), the exact McNemar p-value, and the difference in macro-F1 with the interval, the
        p-value and the verdict of Holm's procedure.
    """
    mixture, others = answers[MIXTURE], {name: one for name, one in answers.items() if name != MIXTURE}
    drawn = [
        statistics.paired_draws(gold, mixture[None], other[None], len(labels), SAMPLES, SEED)
        for other in others.values()
    ]
    tests: dict[str, dict[str, Any]] = {}
    for (name, other), one in zip(others.items(), statistics.differences(drawn), strict=True):
        correct, theirs = mixture == gold, other == gold
        fixed, broken = int((correct & ~theirs).sum()), int((theirs & ~correct).sum())
        tests[name] = {"fixed": fixed, "broken": broken, "mcnemar_p": statistics.mcnemar(fixed, broken)}
        tests[name] |= {"difference": one.value, "difference_low": one.low, "difference_high": one.high}
        tests[name] |= {"p_holm": one.corrected, "verdict": one.verdict}
    named = np.array([domain or "(none)" for domain in domains])
    records = []
    for name, predicted in answers.items():
        report = metrics.report(gold.tolist(), predicted.tolist(), labels)
        low, high = report["intervals"]["macro_f1"]
        record: dict[str, Any] = {"arm": name, "n": len(gold), "accuracy": report["accuracy"]}
        record |= {"macro_f1": report["macro_f1"], "macro_f1_low": low, "macro_f1_high": high}
        for domain in sorted(set(named.tolist())):
            rows = named == domain
            of_domain = metrics.report(gold[rows].tolist(), predicted[rows].tolist(), labels)
            record[f"macro_f1 {domain}"] = of_domain["macro_f1"]
        records.append(record | tests.get(name, {}))
    return records


# ------------------------------------------------------------------------------------------------ tables


def tables(name: str, values: Mapping[str, Any]) -> list[Table]:
    """The tables of one mixture, as far as its metrics contain them: comparison with its parts, and router.

    Args:
        name: name of the run.
        values: contents of ``metrics.json``.
    """
    comparison = [_comparison_table(name, values["mixture"])] if values.get("mixture") else []
    return [*comparison, _router_table(name, values["router"])] if values.get("router") else comparison


def remarks(name: str, values: Mapping[str, Any]) -> list[str]:
    """The summary of one mixture, one sentence each; empty for other runs."""
    sentences = []
    against = next((one for one in values.get("mixture") or [] if one["arm"] == UNION), None)
    if against is not None and "verdict" in against:  # older versions wrote only an uncorrected test
        sentences.append(
            f"{name} against one adapter trained on all domains: macro-F1 {signed(against['difference'])} "
            f"({signed(against['difference_low'])} to {signed(against['difference_high'])}), {against['fixed']} rows "
            f"fixed and {against['broken']} broken: {against['verdict']}."
        )
    return sentences + [f"{name}: {warning}" for warning in (values.get("router") or {}).get("warnings", [])]


def _comparison_table(name: str, records: Sequence[Mapping[str, Any]]) -> Table:
    domains = [key for key in records[0] if key.startswith("macro_f1 ")]
    rows = []
    for record in records:
        interval = f" ({record['macro_f1_low']:.3f}-{record['macro_f1_high']:.3f})"
        row = [record["arm"], f"{record['accuracy']:.4f}", f"{record['macro_f1']:.4f}{interval}"]
        row += [f"{record[key]:.4f}" for key in domains]
        difference = format_value("difference", record.get("difference")) or MISSING
        if "verdict" in record:  # not for the mixture itself, nor for the uncorrected test of older versions
            difference += f" ({signed(record['difference_low'])} to {signed(record['difference_high'])})"
        counts = f"{record['fixed']} / {record['broken']}" if "fixed" in record else MISSING
        rows.append([*row, difference, counts, record.get("verdict", MISSING)])
    caption = (
        f"The same {records[0]['n']:,} test rows for every model; macro-F1 with its 95 % bootstrap interval, on all "
        "rows and on each domain's. Difference: macro-F1 of the mixture minus the model's, by a paired bootstrap; its "
        f"interval and the verdict on the mixture are corrected for {len(records) - 1} comparisons (Holm). Fixed, "
        "broken: rows that only the mixture, only the model classifies correctly. Experts alone are those that the "
        "mixture started from; the mixture has had their training and the joint training, the union only one training."
    )
    columns = ["model", "accuracy", "macro-F1", *(f"on {key.removeprefix('macro_f1 ')}" for key in domains)]
    columns += ["difference", "fixed / broken", "verdict"]
    names = [record["arm"] for record in records]
    better = [record.get("verdict") == "better" for record in records if record["arm"] != MIXTURE]
    marked = names.index(MIXTURE) if better and all(better) and MIXTURE in names else None
    optional = (1, *range(2 + len(domains), 2, -1), len(columns) - 2)
    return Table(f"{name} compared with its parts", columns, rows, caption, marked, ("verdict",), optional)


def _router_table(name: str, router: Mapping[str, Any]) -> Table:
    experts, confusion = router["experts"], router["confusion"]
    total = {expert: sum(counts[expert] for counts in confusion.values()) for expert in experts}
    lines = [
        (domain, counts, router["accuracy_by_domain"].get(domain), router["mean_gates"][domain])
        for domain, counts in confusion.items()
    ]
    rows = []
    for domain, counts, correct, gates in [*lines, ("all rows", total, router["accuracy"], router["load"])]:
        row = [domain, f"{sum(counts.values()):,}", MISSING if correct is None else f"{correct:.4f}"]
        rows.append([*row, *(f"{count:,}" for count in counts.values()), *(f"{gate:.3f}" for gate in gates.values())])
    columns = ["domain", "rows", "accuracy", *(f"→ {one}" for one in experts), *(f"gate {one}" for one in experts)]
    caption = (
        "Accuracy: share of rows whose top expert is that of their domain. →: rows by top expert. Gate: mean weight of "
        f"an expert. Entropy of a row's gates {router['entropy']:.3f}, of the mean gate {router['load_entropy']:.3f} "
        "(1: uniform)."
    )
    optional = range(2 + len(experts), 2, -1)  # with many experts, hide the rows by top expert
    return Table(f"Router of {name}", columns, rows, " ".join([caption, *router["warnings"]]), optional=optional)
