"""Figures of an inspection: drawn from the numbers given, whatever there is or is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib import image

from finsa.data.near_duplicates import SCHEMA
from finsa.evaluation import inspect_figures
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
    "labels": lambda file: inspect_figures.labels_by_group("domain", GROUPS, LABELS, file),
    "lengths": lambda file: inspect_figures.token_lengths(LENGTHS, 256, file),
    "truncation": lambda file: inspect_figures.truncation(SPLITS, LABELS, file),
    "ledger": lambda file: inspect_figures.ledger({"used": 100, "duplicate": 3}, file),
    "near": lambda file: inspect_figures.near_duplicates(PAIRS, 0.7, file),
    "no near": lambda file: inspect_figures.near_duplicates(PAIRS.clear(), 1.0, file),
    "traits": lambda file: inspect_figures.traits(ROWS, LABELS, file),
    "many labels": lambda file: inspect_figures.labels_by_group("split", {"all": {"train": COUNTS}}, MANY, file),
    "many cut": lambda file: inspect_figures.truncation(
        {"train": {"rows": 77, "labels": COUNTS, "cut": COUNTS}}, MANY, file
    ),
    "many traits": lambda file: inspect_figures.traits(MANY_ROWS, MANY, file),
}
ALT = {
    "labels": "新闻: 利空 25 %, 中性 0 %, 利好 75 %; 论坛: 利空 50 %, 中性 50 %, 利好 0 %",
    "lengths": "cut-off at 256. train: median 30, longest 300, 1 cut",
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
    assert pixels.shape[1] == pytest.approx(inspect_figures.WIDTH * inspect_figures.DPI, abs=2)
    assert (pixels < 0.9).any(axis=2).mean() > 0.005  # something is drawn


def test_other_numbers_give_another_figure(tmp_path: Path) -> None:
    for name, count in (("a.png", 3), ("b.png", 90)):
        inspect_figures.ledger({"used": 100, "duplicate": count}, tmp_path / name)
    first, second = (image.imread(tmp_path / name) for name in ("a.png", "b.png"))
    assert np.abs(first - second).mean() > 0.005


@pytest.mark.parametrize(("colour", "ink"), [("#000000", "white"), ("#ffffff", "black"), ("#0072B2", "white")])
def test_writing_stands_out_from_its_ground(colour: str, ink: str) -> None:
    assert inspect_figures._ink(colour) == ink


def test_many_classes_have_colours() -> None:
    assert len({tuple(colour) for colour in inspect_figures._colours(50)}) == 50
