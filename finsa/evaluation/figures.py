"""Figures as PNG files."""

from __future__ import annotations

import logging
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import font_manager, ft2font, pyplot
from matplotlib.ticker import MaxNLocator

# A Chinese font often has one weight only; that it is not quite "normal" is nothing to tell a user at every figure.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

MANY = 20  # classes that are too many to have a colour, a row or readable cells each
FREQUENT = 9  # of those the ones that are shown beside the others
LATIN = "DejaVu Sans"  # matplotlib's own
CARRIED = Path(__file__).parent / "fonts" / "FinsaSansSC.otf"  # the 3,755 most frequent Chinese characters
# Fonts for the characters that these two lack, in order of preference; then any other that has them.
PREFERRED = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)


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


def frequent(counts: Iterable[Mapping[str, int]], labels: Sequence[str]) -> list[str]:
    """The labels that a figure with a colour or row for each can show: all, or the most frequent of many, in order."""
    if len(labels) <= MANY:
        return list(labels)
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    kept = {label for label, _ in total.most_common(FREQUENT)}
    return [label for label in labels if label in kept]


def folded(counts: Mapping[str, int], labels: Sequence[str], shown: Sequence[str]) -> dict[str, int]:
    """Counts of the labels that are shown, and the sum of the others where there are any."""
    rest = sum(counts.get(label, 0) for label in labels if label not in shown)
    others = {f"{len(labels) - len(shown)} other classes": rest} if len(shown) < len(labels) else {}
    return {label: counts.get(label, 0) for label in shown} | others


def letters(text: str) -> int:
    """Width of a text in Latin letters; a Chinese character is two wide."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def confusion_matrix(report: Mapping[str, Any], title: str, file: Path) -> None:
    """Draw a confusion matrix: counts, coloured by the share of the true class; of many classes the colours alone."""
    counts = np.array(report["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    font, names = font_and_names(list(report["per_class"]))
    title_font, (title,) = font_and_names([title], "run")
    with pyplot.rc_context(
        {"font.family": list(dict.fromkeys([font, title_font, LATIN])), "axes.unicode_minus": False}
    ):
        many = len(names) > MANY
        cell = 0.13 if many else 0.75  # inches
        size = 2.6 + cell * len(names)
        figure, axes = pyplot.subplots(figsize=(size + 0.8, size), layout="constrained")
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in [] if many else np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", color=colour)
        font_size = 6 if many else 10
        axes.set_xticks(range(len(names)), names, fontsize=font_size)
        axes.set_yticks(range(len(names)), names, fontsize=font_size)
        if many or max(map(letters, names)) * 0.085 > cell:  # inches of a letter
            axes.tick_params("x", rotation=90)
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


def font_and_names(names: Sequence[str], kind: str = "class") -> tuple[str, list[str]]:
    """A font that has all characters of the names beside matplotlib's own, and the names as they are to be written.

    Frequent Chinese characters are in the font that finsa carries; for others an installed font is looked for. Names
    that no font can write become numbers of a kind, of which a warning is given.
    """
    characters = frozenset(letter for name in names for letter in name if letter.isprintable() and not letter.isspace())
    lacking = _lacking(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", characters)
    if not lacking:
        return LATIN, list(names)
    carried, rare = _carried(), _lacking(CARRIED, lacking)
    if not rare:
        return carried, list(names)
    if installed := _installed(lacking):
        return installed, list(names)
    written = [f"{kind} {number}" if rare & set(name) else name for number, name in enumerate(names, start=1)]
    _warn("".join(sorted(rare)), kind)
    return carried, written


def _lacking(font: Path | str, characters: frozenset[str]) -> frozenset[str]:
    """Characters that a font does not have."""
    face = ft2font.FT2Font(str(font))
    return frozenset(letter for letter in characters if not face.get_char_index(ord(letter)))


def _carried() -> str:
    fonts = font_manager.fontManager
    if not any(entry.fname == str(CARRIED) for entry in fonts.ttflist):
        fonts.addfont(CARRIED)
    return "Finsa Sans SC"


@cache
def _installed(characters: frozenset[str]) -> str | None:
    """An installed font with all of these characters; matplotlib's list of fonts may be older than some of them."""
    fonts = font_manager.fontManager
    known = {entry.fname for entry in fonts.ttflist}
    for file in font_manager.findSystemFonts():
        if file not in known:
            with suppress(OSError, RuntimeError):  # a damaged file, or of a kind that matplotlib does not read
                fonts.addfont(file)
    ranked = sorted(fonts.ttflist, key=lambda entry: (entry.name not in PREFERRED, entry.weight != 400))
    for entry in ranked:
        if "Resort" in entry.name:  # "Last Resort": boxes for all characters there are
            continue
        with suppress(OSError, RuntimeError):  # listed, and removed since
            if not _lacking(entry.fname, characters):
                return str(entry.name)
    return None


@cache
def _warn(characters: str, kind: str) -> None:
    """Once for the same characters."""
    print(
        f"warning: no font has {characters}; figures say '{kind} 1', '{kind} 2' ... instead of the names. Install one "
        "that has them, such as Debian's fonts-noto-cjk; tables and pages are not affected",
        file=sys.stderr,
    )
