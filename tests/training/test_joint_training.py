"""The joint objective: its parts, its normalization over micro-batches, and the schedules of both steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from finsa.config import MoeJointStage, RunConfig
from finsa.data import dataset, tokenized
from finsa.models.moe.mixture import balance_loss
from finsa.training import fit, joint_training, objective
from finsa.training.watchdog import Watch

Configure = Callable[..., RunConfig]
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.5], [-1.0, 1.0]])
DOMAINS = torch.tensor([0, 1, -1, 0])


def made(rows: slice, weights: tuple[float, float] = (1.5, 0.05)) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and weights of the joint objective over some rows, each with task loss 2 and weight 3."""
    task = objective.Objective(
        lambda model, batch: torch.tensor(2.0) * len(batch["domains"]),
        lambda batch: torch.tensor(3) * len(batch["domains"]),
    )
    mixture: Any = SimpleNamespace(route=SimpleNamespace(logits=LOGITS[rows]))
    whole = objective.joint(task, mixture, *weights)
    batch = {"domains": DOMAINS[rows]}
    return whole.total(torch.nn.Identity(), batch), whole.weight(batch)


def test_each_part_is_a_mean_over_its_rows() -> None:
    total, weight = made(slice(0, 4))
    task, routed, balance = (total / weight).tolist()
    known = DOMAINS >= 0
    assert task == pytest.approx(2 / 3)
    assert routed == pytest.approx(1.5 * functional.cross_entropy(LOGITS[known], DOMAINS[known]).item())
    assert balance == pytest.approx(0.05 * balance_loss(LOGITS.softmax(1)).item(), rel=1e-5)


def test_micro_batches_add_up_to_the_step() -> None:
    whole, weight = made(slice(0, 4))
    parts = [made(slice(0, 2)), made(slice(2, 4))]
    together, weights = (sum(part[at] for part in parts) for at in (0, 1))
    torch.testing.assert_close((together / weights)[:2], (whole / weight)[:2])


def test_a_step_without_known_domains_costs_nothing() -> None:
    total, weight = made(slice(2, 3))
    assert (total / weight)[1] == 0


def test_schedules(config: Configure) -> None:
    cfg = config("stage=moe_joint", "stage.rate=0.5", "stage.epochs=null", "train.validate_every=7", "train.warmup=500")
    assert isinstance(cfg.stage, MoeJointStage)
    warm = joint_training.warmup_schedule(cfg.train, cfg.stage)
    assert (warm.max_steps, warm.validate_every, warm.warmup, warm.patience) == (60, 60, 0.1, None)
    assert warm.learning_rate == cfg.train.learning_rate
    after = joint_training.joint_schedule(cfg.train, cfg.stage)
    assert (after.learning_rate, after.epochs) == (cfg.train.learning_rate / 2, cfg.train.epochs)
    assert after.warmup == 500


def test_domains_are_balanced_for_the_router(config: Configure, tokenizer: Any) -> None:
    cfg = config("stage=moe_joint", "data.cache=null")
    job = tokenized.build(cfg, dataset.load(cfg.data), tokenizer)
    for balance, most in (("none", [2164, 1444]), ("downsample", [1444, 1444]), ("oversample", [2164, 2164])):
        rows = job.training_rows(cfg, ("news", "forum"), balance)
        counts = [sum(row["domain"] == number for row in rows) for number in (0, 1)]
        assert counts == most, balance
    start, end = rows[0]["text_span"]
    prompt = job.prompts("train")[rows.order[0]]
    assert prompt[:start] == job.renderer.prefix
    assert prompt[end:] == job.renderer.suffix
    assert rows[0]["input_ids"][:start] == job.renderer.prefix


def test_the_run_folder_has_the_heartbeat_of_both_steps(
    config: Configure, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, given = config("stage=moe_joint", "data.cache=null"), dict[str, Any]()
    assert isinstance(cfg.stage, MoeJointStage)
    job = tokenized.build(cfg, dataset.load(cfg.data), tokenizer)
    monkeypatch.setattr(fit, "fit", lambda **passed: given.update(passed))
    mixture: Any = SimpleNamespace(experts=("news", "forum"))
    place = tmp_path / "checkpoints" / joint_training.WARMUP
    watch = Watch(cfg.train, tmp_path)
    joint_training._fit(cfg, cfg.stage, mixture, job, cfg.train, joint_training.WARMUP, "none", print, watch)
    assert (given["watch"].folder, given["folder"]) == (tmp_path, place / "steps")
