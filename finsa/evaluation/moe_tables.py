"""The tables of a report's section about mixtures, from ``metrics.json`` of their runs."""

from __future__ import annotations

from typing import Any

from finsa.evaluation.comparison import Comparison
from finsa.evaluation.moe_comparison import MIXTURE, UNION
from finsa.evaluation.report_tables import MISSING, Sheet, cell


def of(name: str, metrics: dict[str, Any]) -> list[Sheet]:
    """What there is to show of one mixture.

    Args:
        name: of its run.
        metrics: of its run; ``router`` and ``mixture`` are shown where they are there.
    """
    found = [_comparison(name, metrics["mixture"])] if metrics.get("mixture") else []
    return [*found, _router(name, metrics["router"])] if metrics.get("router") else found


def remarks(comparison: Comparison) -> list[str]:
    """What can be said of the mixtures among the arms, one sentence each."""
    said = []
    for arm in comparison.arms:
        metrics = arm.runs[0].metrics
        against = next((one for one in metrics.get("mixture") or [] if one["arm"] == UNION), None)
        if against is not None and "verdict" in against:  # runs of older versions have an uncorrected test alone
            low, high = (f"{against[f'difference_{end}']:+.4f}" for end in ("low", "high"))
            said.append(
                f"{arm.name} against one adapter on all domains: macro-F1 {against['difference']:+.4f} "
                f"({low} to {high}), {against['fixed']} rows fixed and {against['broken']} broken: "
                f"{against['verdict']}."
            )
        said += [f"{arm.name}: {warning}" for warning in (metrics.get("router") or {}).get("warnings", [])]
    return said


def _comparison(name: str, records: list[dict[str, Any]]) -> Sheet:
    domains = [key for key in records[0] if key.startswith("macro_f1 ")]
    columns = ["arm", "accuracy", "macro-F1", *(f"on {key.removeprefix('macro_f1 ')}" for key in domains)]
    rows = []
    for record in records:
        interval = f" ({record['macro_f1_low']:.3f}-{record['macro_f1_high']:.3f})"
        scores = [f"{record['accuracy']:.4f}", f"{record['macro_f1']:.4f}{interval}"]
        counts = f"{record['fixed']} / {record['broken']}" if "fixed" in record else MISSING
        tests = [_difference(record), counts, record.get("verdict", MISSING)]
        rows.append([record["arm"], *scores, *(f"{record[key]:.4f}" for key in domains), *tests])
    tested = len(records) - 1
    caption = (
        f"The same {records[0]['n']:,} test rows for every arm; macro-F1 with its 95 % bootstrap interval, on all rows "
        "and on each domain's. Difference: macro-F1 of the mixture minus the arm's, by a paired bootstrap; its "
        f"interval and the verdict on the mixture are corrected for {tested} comparisons (Holm). Fixed, broken: rows "
        "that only the mixture, only the arm classifies correctly. Experts alone are those that the mixture started "
        "from; the mixture has had their training and the joint one, the union only its own."
    )
    wins = [record.get("verdict") == "better" for record in records if record["arm"] != MIXTURE]
    mixture = next((place for place, record in enumerate(records) if record["arm"] == MIXTURE), None)
    columns += ["difference", "fixed / broken", "verdict"]
    marked = mixture if wins and all(wins) else None
    title, optional = f"{name} compared with its parts", (1, *range(2 + len(domains), 2, -1), len(columns) - 2)
    return Sheet(title, columns, rows, caption, marked, words=("verdict",), optional=optional)


def _difference(record: dict[str, Any]) -> str:
    if "verdict" not in record:  # the mixture itself, or a run of an older version, whose interval is not corrected
        return cell("difference", record.get("difference")) or MISSING
    value, low, high = (cell("difference", record[f"difference{end}"]) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def _router(name: str, router: dict[str, Any]) -> Sheet:
    experts = router["experts"]
    rows = [
        _row(
            domain, sum(counts.values()), router["accuracy_by_domain"].get(domain), counts, router["mean_gates"][domain]
        )
        for domain, counts in router["confusion"].items()
    ]
    total = {expert: sum(counts[expert] for counts in router["confusion"].values()) for expert in experts}
    rows.append(_row("all rows", router["n"], router["accuracy"], total, router["load"]))
    columns = ["domain", "rows", "right", *(f"→ {expert}" for expert in experts), *(f"gate {one}" for one in experts)]
    caption = (
        "Right: share of rows whose likeliest expert is that of their domain. →: rows by likeliest expert. Gate: mean "
        f"share of an expert. Entropy of a row's gates {router['entropy']:.3f}, of the mean gate "
        f"{router['load_entropy']:.3f} (1: uniform)."
    )
    optional = range(2 + len(experts), 2, -1)  # of many experts, the rows by likeliest one
    return Sheet(f"Router of {name}", columns, rows, " ".join([caption, *router["warnings"]]), optional=optional)


def _row(domain: str, number: int, right: float | None, counts: dict[str, int], gates: dict[str, float]) -> list[str]:
    told = MISSING if right is None else f"{right:.4f}"
    return [
        domain,
        f"{number:,}",
        told,
        *(f"{count:,}" for count in counts.values()),
        *map("{:.3f}".format, gates.values()),
    ]
