"""Figures of an inspection: drawn from the given numbers, also if some are missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib import image

from finsa.data.near_duplicates import SCHEMA
from finsa.evaluation import figures, inspection_figures
from finsa.evaluation.figures import Figure

LABELS = ("利空", "中性", "利好")
SPLITS = {
    "train": {"rows": 60, "labels": {"利空": 10, "中性": 20, "利好": 30}, "cut": {"利空": 1, "中性": 0, "利好": 3}},
    "test": {"rows": 0, "labels": {"利空": 0, "中性": 0, "利好": 0}, "cut": {"利空": 0, "中性": 0, "利好": 0}},
}
GROUPS = {"train": {"新闻": {"利空": 1, "中性": 0, "利好": 3}, "论坛": {"利空": 5, "中性": 5, "利好": 0}}}
PAIRS = pl.DataFrame([("test", "a", "x", 0, "train", "b", "y", 0, 0.8)], SCHEMA, orient="row")
ROWS = pl.DataFrame({"text": ["净利润增长", "ab", "跌 了"], "label": [2, 1, 0]})
LENGTHS = {"train": np.array([20, 30, 300]), "test": np.array([], dtype=int)}

MANY = [f"intent {number}" for number in range(77)]
COUNTS = dict.fromkeys(MANY, 1)
MANY_ROWS = pl.DataFrame({"text": MANY, "label": range(77)})

DRAWN: dict[str, Callable[[Path], Figure]] = {
    "labels": lambda file: inspection_figures.labels_by_group("domain", GROUPS, LABELS, file),
    "lengths": lambda file: inspection_figures.token_lengths(LENGTHS, 256, file),
    "truncation": lambda file: inspection_figures.truncation(SPLITS, LABELS, file),
    "ledger": lambda file: inspection_figures.ledger({"used": 100, "duplicate": 3}, file),
    "near": lambda file: inspection_figures.near_duplicates(PAIRS, 0.7, file),
    "no near": lambda file: inspection_figures.near_duplicates(PAIRS.clear(), 1.0, file),
    "traits": lambda file: inspection_figures.traits(ROWS, LABELS, file),
    "many labels": lambda file: inspection_figures.labels_by_group("split", {"all": {"train": COUNTS}}, MANY, file),
    "many cut": lambda file: inspection_figures.truncation(
        {"train": {"rows": 77, "labels": COUNTS, "cut": COUNTS}}, MANY, file
    ),
    "many traits": lambda file: inspection_figures.traits(MANY_ROWS, MANY, file),
}
ALT = {
    "labels": "新闻: 利空 25 %, 中性 0 %, 利好 75 %; 论坛: 利空 50 %, 中性 50 %, 利好 0 %",
    "lengths": "limit 256. train: median 30, longest 300, 1 truncated",
    "truncation": "train: 4 of 60 rows; test: 0 of 0 rows",
    "ledger": "used 100, duplicate 3",
    "near": "test – train: 1 pairs",
    "no near": "test – train: 0 pairs",
    "traits": "5th to 95th percentile",
    "many labels": "intent 8 1 %, 68 other classes 88 %",
    "many cut": "train: 77 of 77 rows",
    "many traits": "5th to 95th percentile",
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("fonts", ["installed", "none"])
@pytest.mark.filterwarnings("error:Glyph")
def test_a_figure_is_drawn_and_described(name: str, fonts: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if fonts == "none":
        request.getfixturevalue("no_fonts")
    figure = DRAWN[name](tmp_path / "figure.png")
    assert figure.file == tmp_path / "figure.png"
    assert ALT[name] in figure.alt
    pixels = image.imread(figure.file)[..., :3]
    assert pixels.shape[1] == pytest.approx(figures.WIDTH * figures.DPI, abs=2)
    assert (pixels < 0.9).any(axis=2).mean() > 0.005  # something is drawn


def test_the_drawn_data_are_the_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    for draw in DRAWN.values():
        draw(tmp_path / "figure.png")
    found = dict(zip(DRAWN, drawn, strict=True))

    (axes,) = found["labels"].axes
    assert axes.get_title() == "train: 14 rows"
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.25, 0.5, 0, 0.5, 0.75, 0])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["新闻", "论坛"]
    assert [text.get_text() for text in found["labels"].legends[0].texts] == list(LABELS)
    assert sorted(text.get_text() for text in axes.texts) == ["25%", "50%", "50%", "75%"]

    (axes,) = found["lengths"].axes  # the empty split has no histogram
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert axes.get_title() == "train: median 30, 1 of 3 truncated"
    assert axes.lines[0].get_xdata() == [256, 256]

    (axes,) = found["truncation"].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.1, 0, 0, 0, 0.1, 0])
    assert [text.get_text() for text in axes.texts] == ["1", "0", "0", "0", "3", "0"]

    (axes,) = found["ledger"].axes
    assert [bar.get_width() for bar in axes.patches] == [100, 3]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["used", "duplicate"]

    (axes,) = found["near"].axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights.count(1) == sum(heights) == 1
    (bar,) = (bar for bar in axes.patches if bar.get_height())
    assert bar.get_x() <= 0.8 <= bar.get_x() + bar.get_width()
    assert [text.get_text() for text in found["no near"].axes[0].texts] == ["none found"]

    length, script = found["traits"].axes
    assert [line.get_xdata().tolist() for line in length.lines[1::2]] == [[3, 3], [2, 2], [5, 5]]  # medians
    assert [line.get_xdata().tolist() for line in script.lines[1::2]] == [[1, 1], [0, 0], [1, 1]]

    (axes,) = found["many labels"].axes
    assert len(axes.patches) == 10  # nine classes and the others
    assert axes.patches[-1].get_width() == pytest.approx(68 / 77)
    assert [bar.get_height() for bar in found["many cut"].axes[0].patches] == [1] * 10
    assert len(found["many traits"].axes[0].get_yticklabels()) == 9
