"""Variants of training rows: sampling of rows, synonyms from a dictionary, and filters for all variants.

The counterpart of FinSA-MoE's augmentation (20 % of the rows with synonyms, 80 % with paraphrases, three variants each)
without its leak: variants are generated from training rows only, after the split, and each refers to its original.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import polars as pl

from finsa.data.cleaning import folded, mark
from finsa.data.readers import FATE

NO_WORD, NO_OTHER = "no word of the dictionary in the text", "no further combination of words"
COLUMNS = ("id", "text", "label", "domain", "parent")
PROPOSAL = {**dict.fromkeys(COLUMNS, pl.String), "kind": pl.String, FATE: pl.String}


def draw(rows: pl.DataFrame, share: float, seed: int, last: bool = False) -> pl.DataFrame:
    """Draw a share of the rows.

    Args:
        rows: to draw from.
        share: of them, in (0, 1].
        seed: of the order in which they are drawn.
        last: draw from the end of that order, so that two draws have no row in common while their shares sum to 1.
    """
    order = random.Random(f"augment-{seed}").sample(range(rows.height), rows.height)
    size = round(share * rows.height)
    return rows[sorted(order[rows.height - size :] if last else order[:size])]


def with_unique_ids(train: pl.DataFrame, held_ids: set[str]) -> pl.DataFrame:
    """Rename ids that occur twice, or also in a held-out split, so that a parent is exactly one row.

    Args:
        train: training rows; the variants among them follow their original's new id.
        held_ids: ids of validation and test rows.
    """
    ids = unique_ids(train["id"], held_ids)
    renamed = dict(zip(reversed(train["id"].to_list()), reversed(ids.to_list()), strict=True))  # the first row's wins
    return train.with_columns(ids, pl.col("parent").replace(renamed))


def unique_ids(ids: pl.Series, taken: set[str]) -> pl.Series:
    """Append to every id that is taken, or occurs before, the lowest number that makes it unique."""
    taken, unique = set(taken), []
    for name in ids.to_list():
        number, new = 1, name
        while new in taken:
            number += 1
            new = f"{name}-{number}"
        unique.append(new)
        taken.add(new)
    return pl.Series("id", unique, dtype=pl.String)


# ------------------------------------------------------------------------------------------------ synonyms


def replace_words(text: str, words: Mapping[str, Sequence[str]], count: int, rng: random.Random) -> list[str]:
    """Replace every dictionary word of a text in one pass, longest match first, so that nothing is replaced twice.

    Args:
        text: the original.
        words: replacements by word.
        count: how many variants are wanted.
        rng: draws among the combinations.

    Returns:
        Distinct combinations of replacements, possibly fewer than wanted; none if no dictionary word occurs.
    """
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    parts = re.split(f"({pattern})", text)
    hits = parts[1::2]
    combinations = prod(len(words[hit]) for hit in hits) if hits else 0
    drawn = dict[int, None]()
    while len(drawn) < min(count, combinations):
        drawn[rng.randrange(combinations)] = None
    variants = []
    for number in drawn:
        for place, hit in enumerate(hits):
            number, choice = divmod(number, len(words[hit]))
            parts[2 * place + 1] = words[hit][choice]
        variants.append("".join(parts))
    return variants


def propose_synonyms(rows: pl.DataFrame, words: Mapping[str, Sequence[str]], variants: int, seed: int) -> pl.DataFrame:
    """Propose synonym variants of rows; those that are impossible are included with the reason."""
    texts: list[list[tuple[str, str | None]]] = []
    for row, text in rows.select("id", "text").iter_rows():
        # A generator per row: the variants of one row do not depend on the others.
        made = replace_words(text, words, variants, random.Random(f"{seed}-{row}"))
        rest = (variants - len(made)) * [("", NO_OTHER if made else NO_WORD)]
        texts.append([*((text, None) for text in made), *rest])
    return propose(rows, "synonyms", texts)


# ------------------------------------------------------------------------------------------------ filters


def propose(rows: pl.DataFrame, kind: str, texts: Sequence[Sequence[tuple[str, str | None]]]) -> pl.DataFrame:
    """Build rows from proposed texts.

    Args:
        rows: the originals, (n,).
        kind: how the texts were generated; its first letter is part of the ids.
        texts: per original its variants, each with the reason why it has no text, or None.

    Returns:
        The columns of a row, kind and fate.
    """
    proposed = [
        (f"{row}-{kind[0]}{number}", text, label, domain, row, kind, fate)
        for (row, label, domain), variants in zip(rows.select("id", "label", "domain").iter_rows(), texts, strict=True)
        for number, (text, fate) in enumerate(variants, 1)
    ]
    return pl.DataFrame(proposed, schema=PROPOSAL, orient="row")


def judge(
    proposed: pl.DataFrame, train: pl.DataFrame, held: pl.Series, shortest: float, longest: float
) -> pl.DataFrame:
    """Mark every proposal that cannot be used; texts are compared in the same way as for duplicates.

    Args:
        proposed: from `propose`.
        train: all training rows; the parents are among them.
        held: texts of the validation and test rows.
        shortest, longest: characters of a variant relative to its parent's.
    """
    parents = train.select(pl.col("id").alias("parent"), pl.col("text").alias("_original"))
    frame = proposed.join(parents, on="parent", how="left", maintain_order="left", validate="m:1")
    frame = frame.with_columns(pl.col("text").str.strip_chars(), folded("text").alias("_key"))
    ratio = pl.col("text").str.len_chars() / pl.col("_original").str.len_chars()
    frame = mark(frame, pl.col("_key") == "", "empty")
    frame = mark(frame, pl.col("text").str.contains("[\x00\ufffd]"), "unreadable: damaged characters")
    frame = mark(frame, pl.col("_key") == folded("_original"), "unchanged")
    frame = mark(frame, ratio < shortest, "too short")
    frame = mark(frame, ratio > longest, "too long")
    frame = mark(frame, pl.col("_key").is_in(_keys(held).implode()), "leak: text of a validation or test row")
    frame = mark(frame, pl.col("_key").is_in(_keys(train["text"]).implode()), "equal to a training text")
    first = pl.col("_key").is_first_distinct().over(pl.col(FATE).is_null())
    frame = mark(frame, ~first, "equal to another variant")
    return frame.drop("_original", "_key")


def _keys(texts: pl.Series) -> pl.Series:
    return pl.DataFrame({"text": texts.unique()}).select(folded("text")).to_series()


def count(judged: pl.DataFrame) -> dict[str, Any]:
    """Count the proposals: wanted, made, and dropped by reason."""
    dropped = judged.filter(pl.col(FATE).is_not_null()).group_by(FATE, maintain_order=True).len()
    made = judged[FATE].null_count()
    return {"wanted": judged.height, "made": made, "dropped": dict(dropped.iter_rows())}
