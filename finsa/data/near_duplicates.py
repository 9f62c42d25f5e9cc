"""Near duplicates across splits: texts that share most of their shingles, found by MinHash and verified exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import polars as pl
from datasketch import MinHash, MinHashLSH
from datasketch.hashfunc import sha1_hash32

from finsa.config import Near
from finsa.data.cleaning import folded

MISSED = 1e-3  # largest share of pairs exactly at the threshold that may be missed; above it far fewer are
_ROW = {"split": pl.String(), "id": pl.String(), "text": pl.String(), "label": pl.Int64()}
SCHEMA = {**_ROW, **{f"other_{name}": kind for name, kind in _ROW.items()}, "similarity": pl.Float64()}


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of similar texts in different splits.

    Args:
        pairs: a row per pair, most similar first: split, id, text and label of the held-out row, then ``other_split``,
            ``other_id``, ``other_text`` and ``other_label``, and ``similarity``.
        bands, rows: of the index; see `bands`.
        recall: probability that a pair exactly at the threshold is found.
    """

    pairs: pl.DataFrame
    bands: int
    rows: int
    recall: float


def shingles(text: str, size: int) -> frozenset[str]:
    """All runs of `size` characters of a folded text; a shorter text is one shingle, so it equals only itself."""
    if len(text) <= size:
        return frozenset([text] if text else [])
    return frozenset(text[start : start + size] for start in range(len(text) - size + 1))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Number of common shingles over the number of all shingles of two texts, in [0, 1]; 0 if there are none."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0


def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Divide a signature into bands, favoring recall: a false candidate costs a comparison, a missed one is lost.

    Two texts of similarity s agree in a band of r hashes with s^r and are candidates with 1 - (1 - s^r)^b
    (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4).

    Returns:
        Bands b and hashes per band r: the longest bands with which at most `MISSED` of the pairs at the threshold are
        missed; bands of one hash if even these miss more.
    """
    for rows in range(permutations // 2, 1, -1):
        if 1 - recall(threshold, permutations // rows, rows) <= MISSED:
            return permutations // rows, rows
    return permutations, 1


def recall(similarity: float, count: int, rows: int) -> float:
    """Probability that a pair of a similarity becomes a candidate, with `count` bands of `rows` hashes."""
    return 1.0 - float((1.0 - similarity**rows) ** count)


def find(splits: dict[str, pl.DataFrame], settings: Near) -> NearDuplicates:
    """Find near duplicates between held-out rows and the other splits.

    Only held-out rows are indexed; training rows are compared one at a time, so there may be millions of them.

    Args:
        splits: rows per split with id, text and label.
        settings: threshold, shingle size, permutations.

    Returns:
        Exactly the pairs whose Jaccard similarity reaches the threshold, except the few that MinHash misses.
    """
    count, rows = bands(settings.threshold, settings.permutations)
    index = _Index(settings, (count, rows))
    found = list[tuple[Any, ...]]()
    for split in ("test", "validation", "train"):  # each against the held-out ones before it
        found += index.matches(split, splits[split])
        if split != "train":
            index.add(split, splits[split])
    order = ["similarity", "split", "id", "other_id"]
    pairs = pl.DataFrame(found, schema=SCHEMA, orient="row").sort(order, descending=[True, False, False, False])
    return NearDuplicates(pairs, count, rows, recall(settings.threshold, count, rows))


class _Index:
    """Held-out rows, indexed by the bands of their signatures."""

    def __init__(self, settings: Near, params: tuple[int, int]) -> None:
        self.settings = settings
        hashed = lru_cache(maxsize=1 << 20)(lambda shingle: int(sha1_hash32(shingle.encode("utf-8", "surrogatepass"))))
        self.empty = MinHash(num_perm=settings.permutations, hashfunc=hashed)
        self.lsh = MinHashLSH(num_perm=settings.permutations, params=params)
        self.rows = list[tuple[Any, ...]]()
        self.sets = list[frozenset[str]]()

    def add(self, split: str, held: pl.DataFrame) -> None:
        """Add the rows of a held-out split."""
        for row, found in self._rows(held):
            self.lsh.insert(len(self.rows), self._signature(found), check_duplication=False)
            self.rows.append((split, *row))
            self.sets.append(found)

    def matches(self, split: str, others: pl.DataFrame) -> Iterator[tuple[Any, ...]]:
        """Yield the pairs of a split's rows with the rows added so far that reach the threshold."""
        for row, found in self._rows(others) if self.rows else ():
            for number in self.lsh.query(self._signature(found)):
                similarity = jaccard(self.sets[number], found)
                if similarity >= self.settings.threshold:
                    yield (*self.rows[number], split, *row, similarity)

    def _rows(self, rows: pl.DataFrame) -> Iterator[tuple[tuple[Any, ...], frozenset[str]]]:
        """Id, text and label of the rows that have a shingle, with their shingles."""
        folds = rows.select(folded("text"))["text"]
        for row, fold in zip(rows.select("id", "text", "label").iter_rows(), folds, strict=True):
            if found := shingles(fold, self.settings.shingle):
                yield row, found

    def _signature(self, found: frozenset[str]) -> MinHash:
        signature = self.empty.copy()  # shares the permutations, which are slow to generate
        signature.update_batch(found)
        return signature
