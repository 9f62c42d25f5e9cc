"""Measures by name: those of scikit-learn, with intervals that cover, in runs, tables and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.config.base import COSTS, LOWER_IS_BETTER, Measure, ValueMeasure
from finsa.errors import ConfigError
from finsa.evaluation import metrics, report
from finsa.session import Session
from finsa.stages import train

Compose = Callable[..., RunConfig]
GOLD = np.array([0, 0, 0, 1, 1, 2, 2, 2])
PROBS = np.array(
    [
        *([0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.7, 0.2]),
        *([0.4, 0.35, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]),
    ]
)
ALL = dict.fromkeys(get_args(Measure))


def test_every_measure_has_the_value_computed_by_hand() -> None:
    """Confusion, rows true: [2 1 0], [1 1 0], [1 0 2]."""
    found = metrics.values(ALL, GOLD, np.log(PROBS))
    recalls, share = (2 / 3, 1 / 2, 2 / 3), np.array([4, 2, 2]) / 8
    expected = float((share * np.array([3, 2, 3]) / 8).sum())
    squared = np.subtract.outer(range(3), range(3)) ** 2
    confusion = np.array([[2, 1, 0], [1, 1, 0], [1, 0, 2]])
    chance = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / 8

    def auc(label: int) -> float:
        inside, outside = PROBS[label == GOLD, label], PROBS[label != GOLD, label]
        wins = (inside[:, None] > outside).sum() + 0.5 * (inside[:, None] == outside).sum()
        return float(wins / (len(inside) * len(outside)))

    def precision(label: int) -> float:
        total, before = 0.0, 0.0
        for threshold in sorted(set(PROBS[:, label]), reverse=True):
            chosen = PROBS[:, label] >= threshold
            recall = (chosen & (label == GOLD)).sum() / (label == GOLD).sum()
            total += (recall - before) * (GOLD[chosen] == label).mean()
            before = recall
        return total

    true = PROBS[range(8), GOLD]
    assert found == pytest.approx(
        {
            "mcc": (8 * 5 - (3 * 4 + 2 * 2 + 3 * 2)) / math.sqrt((64 - 16 - 4 - 4) * (64 - 9 - 4 - 9)),
            "balanced_accuracy": sum(recalls) / 3,
            "kappa": (5 / 8 - expected) / (1 - expected),
            "quadratic_kappa": 1 - (confusion * squared).sum() / (chance * squared).sum(),
            "jaccard": (2 / 5 + 1 / 3 + 2 / 3) / 3,
            "mae": (1 + 1 + 2) / 8,
            "auroc": sum(map(auc, range(3))) / 3,
            "average_precision": sum(map(precision, range(3))) / 3,
            "log_loss": -np.log(true).mean(),
            "brier": sum((PROBS[n, c] - (GOLD[n] == c)) ** 2 for n in range(8) for c in range(3)) / 8,
        }
    )


def test_measures_that_are_not_defined_are_nan() -> None:
    found = metrics.values(ALL, np.zeros(4, int), np.log(np.tile([0.6, 0.3, 0.1], (4, 1))))
    assert {name for name, value in found.items() if math.isnan(value)} == {
        *("mcc", "kappa", "quadratic_kappa", "auroc", "average_precision")
    }


def test_intervals_cover() -> None:
    """The accuracy's analogue: mean recall of two balanced classes, true value 0.8."""
    rng, hits, trials = np.random.default_rng(0), 0, 60
    for _ in range(trials):
        gold = rng.integers(0, 2, 150)
        predicted = np.where(rng.random(150) < 0.8, gold, 1 - gold)
        log_probs = np.log(np.where(np.arange(2) == predicted[:, None], 0.9, 0.1))
        low, high = metrics.measures({"balanced_accuracy": None}, gold.tolist(), log_probs)[1]["balanced_accuracy"]
        hits += low <= 0.8 <= high
    assert 0.85 <= hits / trials <= 1


def test_a_name_that_is_no_measure_is_refused(config: Compose) -> None:
    with pytest.raises(ConfigError, match="evaluation.metrics"):
        config("evaluation.metrics=[f2]")
    with pytest.raises(ConfigError, match="train.select_by"):
        config("train.select_by=f2")


@pytest.fixture(scope="module")
def run(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def cost(gold: Any, predicted: Any, probs: Any) -> float:
        return float(np.abs(gold - predicted).mean() + 0 * probs.sum())

    words = (FEW, "train=smoke", "tracking=none", "stage.compare_base=false", "model.dtype=float32")
    words += ("evaluation.metrics=[mcc,auroc]", "train.select_by=brier", "train.max_steps=4", "train.validate_every=2")
    base = tmp_path_factory.mktemp("measured")
    folder = train.run(config(*words, f"output_dir={base}"), Session(measures={"cost": cost})).run_dir
    assert folder is not None
    return folder


def test_a_run_reports_them_and_selects_by_them(run: Path) -> None:
    values = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    names = list(lines[0]["log_probs"])
    gold = np.array([names.index(line["gold"]) for line in lines])
    log_probs = np.array([[line["log_probs"][name] for name in names] for line in lines])
    found = metrics.values({"mcc": None, "auroc": None, "brier": None}, gold, log_probs)
    distance = float(np.abs(gold - log_probs.argmax(axis=1)).mean())
    assert values["test"]["measures"] == pytest.approx({**found, "cost": distance}, abs=1e-4)
    for name, value in values["test"]["measures"].items():
        low, high = values["test"]["intervals"][name]
        assert low <= value <= high
    validations = [
        json.loads(line)
        for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        if "eval_brier" in line
    ]
    best = min(one["eval_brier"] for one in validations)
    assert len(validations) == 2
    assert values["validation"]["brier"] == pytest.approx(best, abs=1e-6)


def test_the_report_and_the_page_show_them(run: Path, config: Compose) -> None:
    built = report.build([run], config("stage=report", f"runs={run}").stage, None, {})  # type: ignore[arg-type]
    table = built.tables["measures"]
    assert list(table.columns) == ["configuration", "mcc", "auroc", "brier", "cost"]
    values = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]
    low, high = values["intervals"]["mcc"]
    assert table.rows[0][1] == f"{values['measures']['mcc']:.4f} ({low:.4f}-{high:.4f})"
    assert "average_precision" not in (run / "index.html").read_text(encoding="utf-8")
    assert f"{values['measures']['auroc']:.4f}" in (run / "index.html").read_text(encoding="utf-8")


def test_lower_is_better_names_measures() -> None:
    assert set(LOWER_IS_BETTER) - {"loss", *COSTS} <= {*get_args(Measure), *get_args(ValueMeasure)}


def test_the_documented_function_is_reported(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (project / "docs" / "extend.md").read_text(encoding="utf-8").partition("## A measure")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('["method=tfidf_lr"]', f'["method=tfidf_lr", "tracking=none", "output_dir={tmp_path}"]'), {})
    (shown,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert 0 < json.loads(shown.replace("'", '"'))["cost"] < 1


@pytest.mark.parametrize("seed", range(12))
def test_values_are_those_of_scikit_learn(seed: int) -> None:
    """With ties in the scores, and classes without rows or predictions."""
    from sklearn import metrics as sk

    rng, labels = np.random.default_rng(seed), [0, 1, 2, 3]
    gold = rng.choice([[0, 1, 2, 3], [0, 2, 3, 3], [1, 1, 2, 2]][seed % 3], 40)
    log_probs = np.log(rng.dirichlet(np.ones(4), 40).round(1) + 0.01)
    probs, predicted, present = metrics.probabilities(log_probs), log_probs.argmax(axis=1), np.unique(gold)
    found = metrics.values(ALL, gold, log_probs)
    shares = [(gold == label, probs[:, label]) for label in present]
    assert found == pytest.approx(
        {
            "mcc": sk.matthews_corrcoef(gold, predicted),
            "balanced_accuracy": sk.recall_score(gold, predicted, labels=present, average="macro"),
            "kappa": sk.cohen_kappa_score(gold, predicted),
            "quadratic_kappa": sk.cohen_kappa_score(gold, predicted, labels=labels, weights="quadratic"),
            "mae": sk.mean_absolute_error(gold, predicted),
            "jaccard": sk.jaccard_score(gold, predicted, labels=np.union1d(gold, predicted), average="macro"),
            "auroc": np.mean([sk.roc_auc_score(*one) for one in shares]),
            "average_precision": np.mean([sk.average_precision_score(*one) for one in shares]),
            "log_loss": sk.log_loss(gold, probs, labels=labels),
            "brier": ((probs - np.eye(4)[gold]) ** 2).sum(axis=1).mean(),
        }
    )
