"""Shortcut features that predict the label: origin, length and script of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from finsa.config import InspectStage
from finsa.evaluation.tables import percent

OTHERS = "(others)"
MOST_GROUPS = 20  # more distinct values are identifiers, not groups
CHANCE = 0.01  # p-value from which an association is not reported
# Letters before the first dash or digit; if all ids start the same, all characters before the first digit.
PREFIXES = (r"^(\p{L}[\p{L}_]*?)_?[-.:/\d]", r"^(\p{L}[^\d]*?)[-_.:/]?\d")
TRAITS = {
    "text length": (pl.col("text").str.len_chars().cast(pl.Float64), "characters"),
    "share of Chinese characters": (
        pl.col("text").str.count_matches(r"\p{Han}") / pl.col("text").str.replace_all(r"\s", "").str.len_chars(),
        "of the characters",
    ),
}


# ------------------------------------------------------------------------------------------------ groups


def groupings(rows: pl.DataFrame, least: int) -> dict[str, pl.Series]:
    """Find groupings of rows that are independent of the text.

    Args:
        rows: columns split, id, domain and, if known, file.
        least: minimum number of rows per group; smaller groups are merged into `OTHERS`.

    Returns:
        By kind (``domain``, ``id prefix``, ``file``), the group of each row; kinds with fewer than two groups are
        omitted.
    """
    candidates = {"domain": rows["domain"], "id prefix": _prefixes(rows["id"])}
    if "file" in rows.columns:
        candidates["file"] = rows["file"]
    kinds = {}
    for kind, groups in candidates.items():
        counts = groups.drop_nulls().value_counts(sort=True, name="rows")
        large = counts.filter(pl.col("rows") >= least)[groups.name].to_list()
        if len(large) >= 2 and len(counts) <= MOST_GROUPS:
            kept = pl.when(groups.is_in(large)).then(groups).otherwise(pl.lit(OTHERS))
            kinds[kind] = pl.select(kept.fill_null(OTHERS).alias("group")).to_series()
    return kinds


def _prefixes(ids: pl.Series) -> pl.Series:
    """The prefixes of ids; null if they are all equal."""
    for pattern in PREFIXES:
        prefix = ids.str.extract(pattern, 1)
        if prefix.n_unique() > 1:
            return prefix
    return ids.clear(len(ids))


def measure_groups(kind: str, groups: pl.Series, rows: pl.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Measure how well groups predict the label.

    Args:
        kind: name of the grouping.
        groups: the group of each row, (n,).
        rows: columns split and label (class number).
        names: class names.

    Returns:
        Plain values: ``association`` (Cramér's V), ``p`` (chi-squared), ``guess`` (accuracy of each group's most
        frequent training label on the test split, and of the most frequent label of all) and ``groups``, each
        with its rows, labels by split, and the classes that it lacks.
    """
    frame = rows.select("split", "label").with_columns(groups.alias("group"))
    counts = _crossed(frame["group"].to_numpy(), frame["label"].to_numpy(), len(names))
    described = []
    for name in sorted(counts, key=lambda name: (name == OTHERS, -int(counts[name].sum()), name)):
        members = frame.filter(pl.col("group") == name)
        splits = _crossed(members["split"].to_numpy(), members["label"].to_numpy(), len(names))
        described.append(
            {
                "name": name,
                "rows": members.height,
                "labels": dict(zip(names, counts[name].tolist(), strict=True)),
                "splits": {split: dict(zip(names, of.tolist(), strict=True)) for split, of in splits.items()},
                "lacks": [label for label, count in zip(names, counts[name], strict=True) if not count],
            }
        )
    association, p = cramers_v(np.array(list(counts.values())))
    return {"kind": kind, "association": association, "p": p, "guess": _guess(frame, names), "groups": described}


def _crossed(groups: Any, labels: Any, classes: int) -> dict[str, Any]:
    """Rows per group and class: by group, an array (c,)."""
    return {str(name): np.bincount(labels[groups == name], minlength=classes) for name in sorted(set(groups))}


def cramers_v(counts: Any) -> tuple[float, float]:
    """Association of two categories, from 0 (none) to 1 (one determines the other).

    Args:
        counts: rows by category, (g, c).

    Returns:
        Cramér's V (Cramér 1946) and the p-value of the chi-squared test; 0 and 1 if there is nothing to compare.
    """
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if min(counts.shape) < 2:
        return 0.0, 1.0
    value = stats.contingency.association(counts, method="cramer")
    return float(value), float(stats.chi2_contingency(counts, correction=False).pvalue)


def _guess(frame: pl.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Accuracy of predicting each group's most frequent label, and the most frequent label of all."""
    train, test = (frame.filter(pl.col("split") == split) for split in ("train", "test"))
    on = "test" if train.height and test.height else "all"
    known, predicted = (train, test) if on == "test" else (frame, frame)
    ranked = known.group_by("group", "label").len().sort(["len", "label"], descending=[True, False])
    usual = ranked.unique("group", keep="first", maintain_order=True).select("group", pl.col("label").alias("guess"))
    majority = known["label"].mode().sort()[0]
    guessed = predicted.join(usual, on="group", how="left").with_columns(pl.col("guess").fill_null(majority))
    return {
        "on": on,
        "accuracy": (guessed["guess"] == guessed["label"]).mean(),
        "majority": (predicted["label"] == majority).mean(),
        "majority_label": names[majority],
    }


# ------------------------------------------------------------------------------------------------ traits


def measure_trait(name: str, rows: pl.DataFrame, names: Sequence[str], least: int) -> dict[str, Any]:
    """Measure how well a number computed from the text, such as its length, predicts the label.

    Args:
        name: one of `TRAITS`.
        rows: columns text and label (class number).
        names: class names.
        least: minimum number of rows of a class to be compared.

    Returns:
        Plain values: ``eta_squared`` (of the ranks: the share of their variance between classes, which is (H - c + 1) /
        (n - c) of the Kruskal-Wallis test; Tomczak & Tomczak 2014) and per class its quartiles and ``auc``: the
        probability that a text of the class has the higher value than one of another class.
    """
    expression, unit = TRAITS[name]
    values, labels = rows.select(expression.fill_nan(0.0)).to_series().to_numpy(), rows["label"].to_numpy()
    ranks, classes = stats.rankdata(values), []
    for number, label in enumerate(names):
        members = labels == number
        size, rest = int(members.sum()), int((~members).sum())
        quartiles = np.percentile(values[members], [25, 50, 75]).tolist() if size else None
        above = float(ranks[members].sum()) - size * (size + 1) / 2  # Mann-Whitney's U
        auc = above / (size * rest) if min(size, rest) >= least else None
        other = float(np.median(values[~members])) if rest else None
        classes.append({"label": label, "rows": size, "quartiles": quartiles, "median_of_others": other, "auc": auc})
    return {"name": name, "unit": unit, "eta_squared": _eta_squared(values, labels), "classes": classes}


def _eta_squared(values: Any, labels: Any) -> float:
    parts = [values[labels == number] for number in sorted(set(labels))]
    if len(parts) < 2 or len(values) <= len(parts) or len(set(values)) < 2:
        return 0.0
    statistic = stats.kruskal(*parts).statistic
    return float(max(0.0, (statistic - len(parts) + 1) / (len(values) - len(parts))))


# ------------------------------------------------------------------------------------------------ sentences


def describe_groups(measured: dict[str, Any], stage: InspectStage) -> list[str]:
    """Sentences about classes that a group lacks, and about groups that predict the label."""
    kind, groups = measured["kind"], measured["groups"]
    total = sum(group["rows"] for group in groups)
    sentences = []
    for group in groups:
        if group["lacks"] and group["rows"] >= stage.group_rows:
            share = f"{group['rows']:,} rows, {percent(group['rows'] / total)} of all"
            sentences.append(f"{kind} {group['name']} ({share}) has no {' and no '.join(group['lacks'])} rows.")
    if measured["association"] >= stage.association and measured["p"] < CHANCE:
        guess, of = measured["guess"], "test rows" if measured["guess"]["on"] == "test" else "rows"
        sentences.append(
            f"{kind} and label are confounded (Cramér's V {measured['association']:.2f}): the {kind} alone predicts "
            f"the label of {percent(guess['accuracy'], 1)} of the {of}; the majority label "
            f"{guess['majority_label']} is correct for {percent(guess['majority'], 1)}. "
            f"{_concentrated(kind, groups, total)} Report scores per {kind} as well."
        )
    return sentences


def _concentrated(kind: str, groups: list[dict[str, Any]], total: int) -> str:
    """The sentence about the class and the group in which it is most over-represented."""
    sizes = {label: sum(group["labels"][label] for group in groups) for label in groups[0]["labels"]}
    inside, outside, label, name = max(
        (
            (group["labels"][label] / size, group["rows"] / total, label, group["name"])
            for group in groups
            for label, size in sizes.items()
            if size
        ),
        key=lambda one: one[0] - one[1],
    )
    return f"{percent(inside)} of the {label} rows are {kind} {name}, which has {percent(outside)} of all rows."


def describe_trait(measured: dict[str, Any], stage: InspectStage) -> list[str]:
    """The sentence about the class that a trait predicts best; none if its AUC is below ``stage.separation``."""
    judged = [one for one in measured["classes"] if one["auc"] is not None]
    best = max(judged, key=lambda one: abs(one["auc"] - 0.5), default=None)
    if best is None or max(best["auc"], 1 - best["auc"]) < stage.separation:
        return []
    higher = best["auc"] >= 0.5
    middle, other = (
        percent(value) if measured["unit"].startswith("of") else f"{value:.0f}"
        for value in (best["quartiles"][1], best["median_of_others"])
    )
    return [
        f"{measured['name']} predicts the label {best['label']}: it is {'higher' if higher else 'lower'} than in a row "
        f"of another label with probability {best['auc'] if higher else 1 - best['auc']:.2f} (0.5 would be chance); "
        f"median {middle} {measured['unit']}, of the other labels {other}."
    ]
