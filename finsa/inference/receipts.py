"""How far the predictions of a changed model, such as an int8 or an exported one, differ from those of the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finsa.config import RunConfig
from finsa.data import dataset, tokenized
from finsa.data.labels import LabelSpace
from finsa.errors import FinsaError
from finsa.inference.predictor import Predictions, Predictor
from finsa.session import Session

FILE = "receipt.json"
ROWS = 256  # that an int8 model is compared on
CLOSE = 0.01  # of the range: the difference up to which two numbers agree
SAMPLES, SEED = 2000, 0  # of the bootstrap


def agreement(labels: LabelSpace, first: Predictions, second: Predictions) -> tuple[float, float, float]:
    """Share of equal predictions, and the largest and the mean difference of a probability, or of a number.

    With several labels per text, each label counts; two numbers are equal if they differ by at most `CLOSE`.
    """
    one, other = first.values, second.values
    if labels.task == "regression" and one is not None and other is not None:
        apart = np.abs(one - other)
        close = apart <= CLOSE * (labels.numbers[-1] - labels.numbers[0])
        return float(close.mean()), float(apart.max()), float(apart.mean())
    if one is not None and other is not None:
        equal = one == other
    else:
        equal = first.probs.argmax(axis=1) == second.probs.argmax(axis=1)
    apart = np.abs(first.probs - second.probs)
    return float(equal.mean()), float(apart.max()), float(apart.mean())


def quantize(model: Predictor, texts: Sequence[str], gold: Sequence[int] | None) -> dict[str, Any]:
    """Quantize a predictor in place, and compare its predictions before and after.

    Args:
        model: of a language model in float32.
        texts: that are predicted twice, at least one.
        gold: their true classes; None: unknown, or the task has none.

    Returns:
        ``rows``, ``agreement``, ``largest_difference`` and ``mean_difference`` of a probability; with true classes also
        ``macro_f1_difference``, int8 minus float32, and ``macro_f1_interval``, its 95 % interval by the paired
        bootstrap (Efron & Tibshirani 1993).
    """
    before = model(texts)
    model.quantize()
    after = model(texts)
    share, largest, mean = agreement(model.record.labels, before, after)
    differences = {"largest_difference": round(largest, 6), "mean_difference": round(mean, 6)}
    receipt: dict[str, Any] = {"rows": len(texts), "agreement": share, **differences}
    if gold is not None:
        from finsa.evaluation import statistics  # scipy takes half a second to import

        new, old = (one.log_probs.argmax(axis=1)[None] for one in (after, before))
        drawn = statistics.paired_draws(np.array(gold), new, old, len(model.labels), SAMPLES, SEED)
        difference = statistics.differences([drawn])[0]
        receipt["macro_f1_difference"] = round(difference.value, 6)
        receipt["macro_f1_interval"] = [round(difference.low, 6), round(difference.high, 6)]
    return receipt


def rows_of(labeled: tokenized.Labeled, split: str) -> tuple[list[str], list[int] | None]:
    """Up to `ROWS` texts from all of a split, and their true classes; None if the task has none."""
    texts = labeled.texts(split)
    chosen = np.unique(np.linspace(0, len(texts) - 1, ROWS).astype(int)).tolist()
    gold = labeled.gold(split) if labeled.task in ("classification", "ordinal") else None
    return [texts[row] for row in chosen], None if gold is None else [gold[row] for row in chosen]


def validation_rows(cfg: RunConfig, session: Session | None) -> tuple[list[str], list[int] | None]:
    """`rows_of` the validation rows of a run; none if its data cannot be read any more."""
    try:
        data = dataset.load(cfg.data, session or Session())
        data.require("validation")
        return rows_of(tokenized.Labeled(data, **tokenized.labeled_settings(cfg, session)), "validation")
    except FinsaError:
        return [], None


def describe(receipt: dict[str, Any]) -> str:
    """A receipt in one line."""
    parts = [
        f"equal predictions on {receipt['agreement']:.2%} of {receipt['rows']:,} rows",
        f"largest difference of a probability {receipt['largest_difference']:.2g}",
    ]
    if "macro_f1_difference" in receipt:
        low, high = receipt["macro_f1_interval"]
        parts.append(f"macro-F1 {receipt['macro_f1_difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
    return f"int8 against float32: {', '.join(parts)}"
