"""Figures of mixtures: which experts the rows of each domain get."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

from finsa.evaluation.figures import LATIN, Figure, font_and_names
from finsa.evaluation.report_figures import COLOURS, DPI, WIDTH


def router(routers: Mapping[str, dict[str, Any]], file: Path) -> Figure | None:
    """Draw the mean gates of every domain as stacked bars.

    Args:
        routers: of ``metrics.json``, by the name of the run.
        file: the PNG.

    Returns:
        None where there is no mixture.
    """
    if not routers:
        return None
    bars = [
        (f"{name}: {domain}", gates) for name, one in routers.items() for domain, gates in one["mean_gates"].items()
    ]
    experts = list(dict.fromkeys(expert for _, gates in bars for expert in gates))
    font, written = font_and_names([name for name, _ in bars], "rows")
    expert_font, named = font_and_names(experts, "expert")
    file.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"font.family": list(dict.fromkeys([font, expert_font, LATIN])), "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 1.3 + 0.4 * len(bars)), layout="constrained")
        places, left = np.arange(len(bars)), np.zeros(len(bars))
        for number, expert in enumerate(experts):
            width = np.array([gates.get(expert, 0.0) for _, gates in bars])
            axes.barh(places, width, 0.7, left=left, color=COLOURS[number % len(COLOURS)], label=named[number])
            left += width
        axes.set_yticks(places, written)
        axes.set(xlim=(0, 1), ylim=(len(bars) - 0.4, -0.6), xlabel="mean share of each expert over the test rows")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
        figure.savefig(file, dpi=DPI)
        pyplot.close(figure)
    alt = "; ".join(
        f"{name}: {', '.join(f'{expert} {share:.2f}' for expert, share in gates.items())}" for name, gates in bars
    )
    return Figure(file, "Router: mean share of each expert by domain", alt)
