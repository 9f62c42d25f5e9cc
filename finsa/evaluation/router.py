"""What a mixture's router does with rows: whom it asks, how surely, and whether it has stopped telling rows apart.

Letters: n rows, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.config import MoeJointStage
from finsa.errors import DataError

UNUSED = 0.05  # an expert with a smaller share of every domain's rows has fallen out of use
INDIFFERENT = 0.05  # domains whose mean gates differ by less are not told apart


def analysis(gates: NDArray[np.float64], domains: Sequence[str | None], experts: Sequence[str]) -> dict[str, Any]:
    """Describe gates.

    Args:
        gates: shares of the experts, (n, E).
        domains: of the rows; None where unknown.
        experts: names; where they are domains, the right expert of a row is that of its domain.

    Returns:
        ``accuracy`` and ``accuracy_by_domain`` of the likeliest expert (None where no row's domain is an expert),
        ``load`` (mean gate) and ``chosen`` (share of rows for which an expert is the likeliest) by expert, ``entropy``
        of a row's gates and ``load_entropy`` of the mean gate, both 1 for uniform, ``confusion`` (rows by domain and
        likeliest expert), ``mean_gates`` by domain, and ``warnings``.
    """
    number, likeliest = len(experts), gates.argmax(axis=1)
    named = np.array([domain or "(none)" for domain in domains])
    found = sorted(set(named.tolist()), key=lambda name: (name not in experts, name))
    confusion = {
        name: {expert: int((likeliest[named == name] == at).sum()) for at, expert in enumerate(experts)}
        for name in found
    }
    means = {name: gates[named == name].mean(axis=0) for name in found}
    right = {name: counts[name] / sum(counts.values()) for name, counts in confusion.items() if name in experts}
    known = sum(sum(confusion[name].values()) for name in right)
    load = gates.mean(axis=0)
    return {
        "n": len(gates),
        "experts": list(experts),
        "accuracy": sum(confusion[name][name] for name in right) / known if known else None,
        "accuracy_by_domain": right,
        "load": _by(experts, load),
        "chosen": _by(experts, np.bincount(likeliest, minlength=number) / len(gates)),
        "entropy": float(_entropy(gates).mean() / np.log(number)),
        "load_entropy": float(_entropy(load[None])[0] / np.log(number)),
        "confusion": confusion,
        "mean_gates": {name: _by(experts, mean) for name, mean in means.items()},
        "warnings": _warnings(means, experts),
    }


def require_known(stage: MoeJointStage, experts: Sequence[str], domains: Sequence[str | None]) -> None:
    """Check that rows that name a domain name one that the router was trained on.

    Raises:
        DataError: naming the domain.
    """
    unknown = sorted({domain for domain in domains if domain is not None} - set(experts))
    if stage.domain_weight > 0 and unknown:
        raise DataError(
            f"data: rows are of domain '{unknown[0]}', and this mixture's router was trained on {', '.join(experts)}. "
            "To score them all the same, without saying how often the router is right, set data.columns.domain=null"
        )


def _by(names: Sequence[str], values: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """In nats, of each row of (n, E)."""
    return -(shares * np.log(np.clip(shares, 1e-12, None))).sum(axis=1)


def _warnings(means: dict[str, NDArray[np.float64]], experts: Sequence[str]) -> list[str]:
    """Signs of collapse, one sentence each."""
    table = np.array(list(means.values()))
    warnings = [
        f"Expert {name} has fallen out of use: its mean gate is below {UNUSED} in every domain."
        for name, most in zip(experts, table.max(axis=0), strict=True)
        if most < UNUSED
    ]
    if len(table) > 1 and np.ptp(table, axis=0).max() < INDIFFERENT:
        warnings.append(
            f"The router does not tell the domains apart: no expert's mean gate differs by {INDIFFERENT} between them."
        )
    return warnings
