"""Figures as PNG files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import font_manager, pyplot
from matplotlib.ticker import MaxNLocator

# A Chinese font often has one weight only; that it is not quite "normal" is nothing to tell a user at every figure.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

# Fonts with Chinese characters, in order of preference; the first that is installed is used.
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)
ENGLISH = {"利空": "bearish", "中性": "neutral", "利好": "bullish"}


@dataclass(frozen=True)
class Figure:
    """A picture and what it shows.

    Args:
        file: the PNG.
        title: of the figure.
        alt: what a reader who cannot see it should know.
    """

    file: Path
    title: str
    alt: str


def confusion_matrix(report: Mapping[str, Any], title: str, file: Path) -> None:
    """Draw a confusion matrix: counts, coloured by the share of the true class."""
    counts = np.array(report["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    font, names = font_and_names(list(report["per_class"]))
    with pyplot.rc_context({"font.family": [font, "DejaVu Sans"], "axes.unicode_minus": False}):
        size = 2.6 + 0.75 * len(names)
        figure, axes = pyplot.subplots(figsize=(size + 0.8, size), layout="constrained")
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{title}\naccuracy {report['accuracy']:.3f}, macro-F1 {report['macro_f1']:.3f}", fontsize=11)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def search(scores: Sequence[float | None], file: Path) -> None:
    """Draw a search's scores by trial, and the best so far; stopped trials (None) have none."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    ended = [(number, score) for number, score in enumerate(scores) if score is not None]
    numbers, values = zip(*ended, strict=True)
    axes.plot(numbers, values, "o", color="#4477aa", label="trial")
    axes.step(numbers, np.maximum.accumulate(values), where="post", color="#cc6677", label="best so far")
    stopped = [number for number, score in enumerate(scores) if score is None]
    axes.plot(stopped, [min(values)] * len(stopped), "x", color="#999999", label="stopped early")
    axes.set_xlabel("trial")
    axes.set_ylabel("macro-F1 on validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def font_and_names(names: list[str], kind: str = "class") -> tuple[str, list[str]]:
    """A font that can write the names; without one, known Chinese names become English and others numbers of a kind."""
    if all(name.isascii() for name in names):
        return "DejaVu Sans", names
    installed = {font.name for font in font_manager.fontManager.ttflist}
    for font in CHINESE_FONTS:
        if font in installed:
            return font, names
    written = [
        name if name.isascii() else ENGLISH.get(name, f"{kind} {number}") for number, name in enumerate(names, 1)
    ]
    return "DejaVu Sans", written
