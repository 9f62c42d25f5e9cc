"""The saved model against a scikit-learn pipeline: both give the same scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labeled_texts import evaluate, ignore, texts
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from finsa import baselines
from finsa.baselines.linear import TfidfLr
from finsa.config import RunConfig
from finsa.config import TfidfLr as Section
from finsa.errors import DataError

Compose = Callable[..., RunConfig]
HELD, HELD_LABELS = texts(30, seed=1)


def section(config: Compose, *words: str) -> Section:
    found = config("method=tfidf_lr", *(f"method.baseline.{word}" for word in words)).method.baseline
    assert isinstance(found, Section)
    return found


def pipeline(strength: float, weight: str | None = None) -> Any:
    counts = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    return make_pipeline(counts, LogisticRegression(C=strength, class_weight=weight, max_iter=1000))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("weight", ["none", "balanced"])
def test_saved_scores_equal_those_of_scikit_learn(config: Compose, tmp_path: Path, classes: int, weight: str) -> None:
    rows, labels = texts(60, classes)
    rows, labels = rows[:45], labels[:45]
    held = [label % classes for label in HELD_LABELS]
    cfg = config("method=tfidf_lr", "method.baseline.strengths=[3]", f"method.baseline.class_weight={weight}")
    names = ["a", "b", "c"][:classes]
    learner = baselines.build(cfg, names)
    learner.fit(rows, labels, HELD, evaluate(held), ignore)
    baselines.save(learner, names, tmp_path)
    again = baselines.restore(cfg, names, tmp_path)
    np.testing.assert_array_equal(again.score(HELD), learner.score(HELD))
    expected = pipeline(3, None if weight == "none" else weight).fit(rows, labels).predict_proba(HELD)
    np.testing.assert_allclose(np.exp(again.score(HELD)), expected, atol=1e-9)


def test_validation_rows_choose_the_penalty(config: Compose) -> None:
    rows, labels = texts(60)
    rows = [text for number, text in enumerate(rows) if labels[number] == 2 or number < 12]  # a strong penalty sees one
    labels = [label for number, label in enumerate(labels) if label == 2 or number < 12]
    strengths = (0.001, 0.3, 30.0)
    scores = {}
    for strength in strengths:
        scores[strength] = float((pipeline(strength).fit(rows, labels).predict(HELD) == np.array(HELD_LABELS)).mean())
    assert scores[0.001] < max(scores.values())
    learner = TfidfLr(section(config, "strengths=[30,0.001,0.3]"), 3)
    fitted = learner.fit(rows, labels, HELD, evaluate(HELD_LABELS), ignore)
    assert fitted.chosen["strengths"] == scores
    assert fitted.chosen["strength"] == min(s for s in strengths if scores[s] == max(scores.values()))
    assert fitted.best == evaluate(HELD_LABELS)(learner.score(HELD))["macro_f1"] == max(scores.values())
    assert fitted.parameters == learner.weights.size + 3


def test_a_class_without_training_rows_never_wins(config: Compose) -> None:
    rows, labels = texts(40, classes=2)
    learner = TfidfLr(section(config, "strengths=[3]"), 3)
    learner.fit(rows, labels, HELD, evaluate([0] * len(HELD)), ignore)
    scores = learner.score(HELD)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(np.exp(scores[:, :2]), pipeline(3).fit(rows, labels).predict_proba(HELD), atol=1e-9)
    assert scores[:, 2].max() < -40


def test_texts_are_read_whole(config: Compose) -> None:
    rows, labels = texts(40)
    learner = TfidfLr(section(config), 3)
    learner.fit(rows, labels, HELD, evaluate(HELD_LABELS), ignore)
    assert learner.count_truncated(["长" * 10_000]) is None
    late = learner.score(["今" * 5000 + "大涨盈利", "今" * 5000 + "大跌亏损"])
    assert not np.array_equal(late[0], late[1])


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [(["甲乙", "乙丙"], [1, 1], "use method=majority"), (["甲", "乙"], [0, 1], "set method.baseline.min_rows=1")],
)
def test_rows_without_anything_to_learn_are_refused(
    config: Compose, rows: list[str], labels: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        TfidfLr(section(config), 3).fit(rows, labels, HELD, evaluate(HELD_LABELS), ignore)
