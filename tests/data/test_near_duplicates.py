"""Near duplicates: exactly the pairs at or above the threshold are found, also of short texts."""

from __future__ import annotations

import random

import polars as pl
import pytest

from finsa.config import Near
from finsa.data import near_duplicates

SPLITS = ("train", "validation", "test")
CHARACTERS = (
    "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学么"
)


def _splits(**texts: list[str]) -> dict[str, pl.DataFrame]:
    schema = {"id": pl.String, "text": pl.String, "label": pl.Int64}
    return {
        split: pl.DataFrame(
            [(f"{split}-{n}", text, 0) for n, text in enumerate(texts.get(split, []))], schema, orient="row"
        )
        for split in SPLITS
    }


def _pairs(found: near_duplicates.NearDuplicates) -> dict[tuple[str, str], float]:
    return {
        (held, other): value for held, other, value in found.pairs.select("id", "other_id", "similarity").iter_rows()
    }


def _planted(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    """Texts, and copies with a few characters replaced, deleted or inserted."""
    texts = ["".join(rng.choices(CHARACTERS, k=rng.randint(12, 80))) for _ in range(count)]
    copies = []
    for text in texts:
        characters = list(text)
        for _ in range(rng.randint(0, max(1, len(text) // 10))):
            at = rng.randrange(len(characters))
            characters[at : at + 1] = rng.choice(
                [[], [rng.choice(CHARACTERS)], [characters[at], rng.choice(CHARACTERS)]]
            )
        copies.append("".join(characters))
    return texts, copies


@pytest.mark.parametrize(("threshold", "shingle"), [(0.5, 2), (0.7, 2), (0.8, 3), (0.9, 1)])
def test_planted_pairs_are_found_and_no_others(threshold: float, shingle: int) -> None:
    texts, copies = _planted(random.Random(7), 1500)
    settings = Near(threshold=threshold, shingle=shingle, permutations=128)
    found = _pairs(near_duplicates.find(_splits(test=texts, train=copies), settings))
    sets = [[near_duplicates.shingles(text, shingle) for text in side] for side in (texts, copies)]
    similar = {
        (f"test-{n}", f"train-{n}"): near_duplicates.jaccard(a, b) for n, (a, b) in enumerate(zip(*sets, strict=True))
    }
    clear = {pair for pair, value in similar.items() if value >= threshold + 0.05}
    assert len(clear) >= 300
    assert len(clear & set(found)) >= 0.99 * len(clear)
    assert all(value >= threshold for value in found.values())
    assert {pair: similar[pair] for pair in found if pair in similar} == {
        p: v for p, v in found.items() if p in similar
    }


@pytest.mark.parametrize("permutations", [16, 64, 128, 256])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_favor_recall(threshold: float, permutations: int) -> None:
    count, rows = near_duplicates.bands(threshold, permutations)
    assert count >= 2
    assert count * rows <= permutations
    assert near_duplicates.recall(threshold, count, rows) >= 1 - near_duplicates.MISSED or rows == 1
    assert near_duplicates.recall(min(1.0, threshold + 0.05), count, rows) >= 0.99


def test_similarity_of_known_sets() -> None:
    assert near_duplicates.shingles("abcd", 2) == {"ab", "bc", "cd"}
    assert near_duplicates.jaccard(near_duplicates.shingles("abcd", 2), near_duplicates.shingles("bcde", 2)) == 0.5
    assert near_duplicates.jaccard(frozenset(), frozenset()) == 0.0


def test_short_texts_equal_only_themselves() -> None:
    settings = Near(threshold=0.7, shingle=3, permutations=64)
    held, others = ["涨", "跌", "涨停", "", " ", "Ａ b"], ["涨", "停", "涨 停", "", "　", "aB"]
    found = _pairs(near_duplicates.find(_splits(test=held, train=others), settings))
    assert found == {("test-0", "train-0"): 1.0, ("test-2", "train-2"): 1.0, ("test-5", "train-5"): 1.0}


def test_pairs_are_between_splits_and_each_once() -> None:
    settings = Near(threshold=0.7, shingle=2, permutations=64)
    text = "公司一季度净利润同比增长百分之二十"
    found = near_duplicates.find(_splits(train=[text, text], validation=[text], test=[text, text]), settings)
    between = found.pairs.group_by("split", "other_split").len().sort("split", "other_split").rows()
    assert between == [("test", "train", 4), ("test", "validation", 2), ("validation", "train", 2)]


def test_no_held_out_rows() -> None:
    assert (
        near_duplicates.find(_splits(train=["文本"]), Near(threshold=0.7, shingle=2, permutations=16)).pairs.height == 0
    )
