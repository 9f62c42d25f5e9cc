"""Rules that split rows into train, validation and test."""

from __future__ import annotations

import math
import random
import warnings
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finsa.config import Split
from finsa.errors import DataError

SPLITS = ("train", "validation", "test")


def divide(rows: pl.DataFrame, split: Split, validation: float, test: float) -> list[str]:
    """Assign splits by the configured rule; rows of one family (variants), group, or text with several targets stay
    together.

    Args:
        rows: columns id, part, label, parent, group, and ``_text``, which is not null if texts have several targets.
        split: the rule and its seed.
        validation, test: shares; 0 leaves a split out.

    Returns:
        ``train``, ``validation`` or ``test`` for each row, (n,).
    """
    if not rows.height:
        return []
    firsts, units = rows, None
    links = ("parent", "group", "_text")
    if any(rows[link].null_count() < rows.height for link in links):
        units = rows.select(families(rows, *links).alias("unit"), "label")
        firsts = units.unique("unit", keep="first", maintain_order=True)
    labels = firsts["label"].to_list()
    if split.rule == "random":
        assigned = at_random(len(labels), validation, test, split.seed)
    else:
        rule = stratified if split.rule == "stratified" else by_class
        assigned = rule(labels, validation, test, split.seed)
    if units is None:
        return assigned
    return units["unit"].replace_strict(dict(zip(firsts["unit"], assigned, strict=True))).to_list()


def families(rows: pl.DataFrame, *links: str) -> pl.Series:
    """Number the families of rows: those connected through any number of steps by a common original or group.

    Args:
        rows: columns id, part and those of `links`; equal ids in different parts of a mixture are different ids.
        links: ``parent``, which names the id of another row, ``group`` or ``_text``, which rows share.

    Returns:
        The same number for rows of one family, (n,).
    """
    if all(rows[link].null_count() == rows.height for link in links):
        return pl.Series(np.arange(rows.height, dtype=np.int32))
    from scipy.sparse import coo_matrix  # takes most of a second, so it is imported only if needed
    from scipy.sparse.csgraph import connected_components

    part = pl.col("part").fill_null("") + pl.lit("\x1f")
    ids, parents = part + pl.col("id"), part + pl.col("parent")
    originals = pl.when(ids.is_in(parents.drop_nulls().implode())).then(
        ids
    )  # only ids that are a parent: others may occur twice
    named = {
        "parent": [originals, parents],
        "group": [pl.lit("\x1e") + pl.col("group")],
        "_text": [pl.lit("\x1d") + pl.col("_text")],
    }
    ends = pl.concat([rows.select(end.alias("end"))["end"] for link in links for end in named[link]])
    known = ends.is_not_null().to_numpy()
    nodes = ends.drop_nulls().rank("dense").to_numpy().astype(np.int64) + rows.height - 1
    starts = np.resize(np.arange(rows.height), len(ends))[known]
    size = rows.height + ends.drop_nulls().n_unique()
    graph = coo_matrix((np.ones(len(nodes), bool), (starts, nodes)), shape=(size, size))
    return pl.Series(connected_components(graph, directed=False)[1][: rows.height])


def at_random(n: int, validation: float, test: float, seed: int) -> list[str]:
    """Assign splits by the published rule of AIDF: two calls of datasets' ``train_test_split`` with one seed.

    Test takes ceil(test * n) of a permutation's first rows; validation ceil(validation / (1 - test) * rest) of the
    rest's. Their validation share of 0.125 of the rest is 0.1125 of all.

    Args:
        n: number of rows.
        validation, test: shares of all rows; 0 leaves a split out.
        seed: of both permutations.
    """
    assigned, left = np.full(n, "train", dtype=object), np.arange(n)
    for name, share in (("test", test), ("validation", validation / (1 - test))):
        size = math.ceil(round(share * len(left), 9))
        # datasets permutes all rows and takes the first ones as test, the next as train
        order = np.random.default_rng(seed).permutation(len(left))
        assigned[left[order[:size]]] = name
        left = left[order[size:]]
    return assigned.tolist()


def stratified(labels: Sequence[object], validation: float, test: float, seed: int) -> list[str]:
    """Assign splits in proportion to the classes, sizes as scikit-learn rounds them.

    Raises:
        DataError: if a class is too small to be in every split.
    """
    from sklearn.model_selection import train_test_split

    assigned, left = np.full(len(labels), "train", dtype=object), np.arange(len(labels))
    classes = np.asarray([str(label) for label in labels])
    for name, share in (("test", test), ("validation", validation / (1 - test))):
        if share > 0:
            try:
                left, held = train_test_split(left, test_size=share, stratify=classes[left], random_state=seed)
            except ValueError as error:
                raise DataError(f"data.split: {error} Use data.split.rule=by_class, or more rows") from None
            assigned[held] = name
    return assigned.tolist()


def by_class(labels: Sequence[object], validation: float, test: float, seed: int) -> list[str]:
    """Assign a split to every row by the published rule of FinNF (FinSA-MoE).

    Per class: shuffle; validation takes max(1, floor(share * n)), test the same, the rest trains.

    Args:
        labels: the class of each row, (n,).
        validation: share of each class, in (0, 0.5).
        test: share of each class; 0 leaves the test split out.
        seed: of the shuffle.

    Returns:
        ``train``, ``validation`` or ``test`` for each row, (n,).
    """
    assigned = ["train"] * len(labels)
    for rows in shuffled_classes(labels, seed).values():
        left = iter(rows)
        for name, share in (("validation", validation), ("test", test)):
            # The small addend keeps floor(0.2 * 5) at 1 although binary fractions may fall just below the whole number.
            size = max(1, int(share * len(rows) + 1e-9)) if share > 0 else 0
            for row in islice(left, size):
                assigned[row] = name
    return assigned


def by_time(
    times: Sequence[datetime | None], validation: float, test: float, purge: float, embargo: float
) -> list[str]:
    """Assign the latest rows to test, those before them to validation, the others to train; equal times stay together.

    Rows in the gaps around the beginning of a split are in none (López de Prado 2018, who purges and embargoes training
    rows around a test split; here every row precedes the next split, so that the embargo shortens the later one).

    Args:
        times: (n,), null for rows without one.
        validation, test: shares of the rows with times; 0 leaves a split out.
        purge: days before a split, in the previous one.
        embargo: days after the beginning of a split, in that split.

    Returns:
        ``train``, ``validation`` or ``test`` for each row, (n,), or the reason why it is in none.

    Raises:
        DataError: if no row is left for a split.
    """
    ordered = sorted(time for time in times if time is not None)
    begins, last = dict[str, datetime](), len(ordered)
    for name, share in (("test", test), ("validation", validation)):
        size = math.ceil(round(share * len(ordered), 9))
        if size and last > size:
            last -= size
            begins[name] = ordered[last]
            last = bisect_left(ordered, ordered[last])
    before, after, assigned = timedelta(days=purge), timedelta(days=embargo), list[str]()
    for time in times:
        name = next((split for split, begin in begins.items() if time is not None and time >= begin), "train")
        later = [begin for begin in begins.values() if time is not None and begin > time]
        if time is None:
            name = "no time"
        elif name in begins and time - begins[name] < after:
            name = f"embargo, the first {embargo:g} days of {name}"
        elif later and min(later) - time <= before and before:
            name = f"purge, {purge:g} days before the next split"
        assigned.append(name)
    wanted = ["train", *(name for name, share in (("validation", validation), ("test", test)) if share)]
    for name in wanted:
        if name not in assigned:
            raise DataError(
                f"data.split.rule=time: no row is left for the {name} split, because of few different times, or of "
                f"data.split.purge={purge:g} and data.split.embargo={embargo:g} days"
            )
    return assigned


def only_latest(assigned: Sequence[str], units: pl.Series) -> list[str]:
    """Remove rows of a family or group that also has rows in a later split, which would otherwise be seen in training.

    Args:
        assigned: from `by_time`, (n,).
        units: numbers of the families, (n,).

    Returns:
        The split of each row, or the reason why it is in none, (n,).
    """
    order = pl.col("split").replace_strict({name: place for place, name in enumerate(SPLITS)}, default=None)
    removed = pl.lit("a row of its family or group is in a later split")
    rows = pl.DataFrame({"unit": units, "split": assigned})
    return rows.select(pl.when(order < order.max().over("unit")).then(removed).otherwise("split"))["literal"].to_list()


def shuffled_classes(labels: Sequence[object], seed: int) -> dict[object, list[int]]:
    """Row numbers by class, shuffled within each class; classes in the order of their names."""
    classes: dict[object, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        classes[label].append(row)
    for label, rows in classes.items():
        random.Random(f"{seed}-{label}").shuffle(rows)
    return dict(sorted(classes.items(), key=lambda item: str(item[0])))


def folds(labels: Sequence[int], groups: NDArray[Any], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Row numbers of each of `count` folds: the classes in the same proportions, rows of a group in the same fold."""
    from sklearn.model_selection import StratifiedGroupKFold  # most runs do not need scikit-learn

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # some folds have no row of it
        divided = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(labels, labels, groups)
        return [left_out for _, left_out in divided]
