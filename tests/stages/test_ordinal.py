"""Ordered labels: measures that know the order, the expected level in predictions, and a loss for them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import FEW
from services import serving, stage_of

from finsa.config import Loss, RunConfig
from finsa.errors import ConfigError
from finsa.evaluation import report
from finsa.inference import predictor
from finsa.stages import predict, train
from finsa.training.objective import choice_loss

Compose = Callable[..., RunConfig]
SETTINGS = (FEW, "data.task=ordinal", "train=smoke", "train.max_steps=3", "tracking=none", "stage.compare_base=false")


@pytest.fixture(scope="module")
def run(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("method=lora_ordinal", *SETTINGS, "model.dtype=float32")
    folder = train.run(config(*words, f"output_dir={tmp_path_factory.mktemp('ordinal')}")).run_dir
    assert folder is not None
    return folder


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def _loss(config: Compose, **changes: Any) -> Loss:
    return config("method=lora_ordinal").method.loss.model_copy(update=changes)


def test_targets_fall_with_the_distance_from_the_true_level(config: Compose) -> None:
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.1]], requires_grad=True)
    loss = choice_loss(scores, torch.tensor([1]), _loss(config, spread=0.5))
    target = np.exp(-np.abs(np.arange(4) - 1) / 0.5)
    target /= target.sum()
    log_p = scores.detach().log_softmax(1).numpy()[0]
    assert float(loss.detach()) == pytest.approx(-(target * log_p).sum(), rel=1e-6)
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.numpy()[0] == pytest.approx(np.exp(log_p) - target, abs=1e-6)


def test_without_spread_it_is_cross_entropy(config: Compose) -> None:
    scores, targets = torch.randn(8, 5, generator=torch.manual_seed(0)), torch.arange(8) % 5
    narrow = choice_loss(scores, targets, _loss(config, spread=1e-3))
    assert torch.allclose(narrow, torch.nn.functional.cross_entropy(scores, targets, reduction="none"), atol=1e-6)


def test_a_near_level_costs_less_than_a_far_one(config: Compose) -> None:
    scores = 4 * torch.eye(3)
    losses = choice_loss(scores, torch.zeros(3, dtype=torch.long), _loss(config))
    assert losses[0] < losses[1] < losses[2]


def test_reports_and_predictions_know_the_order(run: Path, config: Compose, tmp_path: Path) -> None:
    values = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]
    lines, names = _lines(run), ["利空", "中性", "利好"]
    distance = [abs(names.index(line["gold"]) - names.index(line["label"])) for line in lines]
    assert values["measures"]["mae"] == pytest.approx(np.mean(distance))
    assert set(values["measures"]) == {"mae", "quadratic_kappa"}
    for line in lines:
        assert line["level"] == pytest.approx(
            sum(line["probs"][name] * (n + 1) for n, name in enumerate(names)), abs=1e-5
        )
    table = report.build([run], config("stage=report", f"runs={run}").stage, None, {}).tables["measures"]  # type: ignore[arg-type]
    assert list(table.columns) == ["configuration", "mae", "quadratic kappa"]
    file, output = tmp_path / "rows.csv", tmp_path / "out.csv"
    file.write_text("text\n" + "\n".join(line["text"] for line in lines[:5]) + "\n", encoding="utf-8")
    predict.run(config("stage=predict", f"run={run}", f"input={file}", f"output={output}"))
    with output.open(encoding="utf-8") as content:
        rows = list(csv.DictReader(content))
    assert list(rows[0]) == ["text", "label", "level", "p_利空", "p_中性", "p_利好"]
    assert [float(row["level"]) for row in rows] == pytest.approx([line["level"] for line in lines[:5]], abs=1e-4)


def test_the_service_answers_with_the_level(run: Path, config: Compose, tmp_path: Path) -> None:
    first, *_ = _lines(run)
    with serving(stage_of(config), predictor.restore(str(run), 16384), tmp_path) as service:
        answer = service.client.post("/predict", json={"text": first["text"]}).json()
    assert answer["level"] == pytest.approx(first["level"], abs=1e-4)


def test_levels_need_their_order(config: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task=ordinal needs data\.labels, the levels from lowest to highest"):
        config("data=table", "data.files=x.csv", "data.task=ordinal")
    words = ("method=lora_ordinal", FEW, "tracking=none", f"output_dir={tmp_path}")
    with pytest.raises(
        ConfigError, match=r"method\.loss\.name=ordinal: is for labels with an order: set data\.task=ordinal"
    ):
        train.run(config(*words))
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_reports_them_too(config: Compose, tmp_path: Path) -> None:
    done = train.run(config("method=tfidf_lr", FEW, "data.task=ordinal", "tracking=none", f"output_dir={tmp_path}"))
    assert set(done.metrics["test"]["measures"]) == {"mae", "quadratic_kappa"}
