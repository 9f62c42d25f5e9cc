"""The memory plan: what it chooses for a budget, and that the estimate is near what real steps take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finsa import composition
from finsa.config import ROOT, RunConfig
from finsa.data import table, task
from finsa.errors import ConfigError
from finsa.modeling import tokenizers
from finsa.training import plan

Compose = Callable[..., RunConfig]


def planned(config: Compose, *words: str, world: int = 1) -> plan.Plan:
    cfg = config("model=qwen05b", "model.weights=random", "model.architecture.num_hidden_layers=6", *words)
    tokenizer, _, _ = tokenizers.own_or_embedded(cfg.model, local_only=True)
    job = task.build(cfg, table.load(cfg.data), tokenizer)
    return plan.make(cfg, job, job.prompts("train").lengths, world)


def test_without_a_budget_the_configured_sizes_stay(config: Compose) -> None:
    made = planned(config, "train.micro_batch_size=4")
    assert (made.micro_batch_size, made.accumulation, made.gradient_checkpointing) == (4, 4, False)
    assert made.score_tokens == 16384


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_a_budget_takes_the_largest_micro_batch_that_fits(config: Compose, method: str) -> None:
    words = (f"method={method}", "train.batch_size=64", "train.micro_batch_size=1", "train.score_tokens=256")
    one = planned(config, *words)
    sizes = []
    for more in (0, 2**30, 2**36):
        budget = 1024 * -(-(one.peak() + more) // 1024)
        made = planned(config, *words, f"train.memory={budget // 1024}KiB")
        assert made.peak() <= budget
        assert made.micro_batch_size * made.accumulation == 64
        assert not made.gradient_checkpointing
        sizes.append(made.micro_batch_size)
    assert sizes[0] == 1 < sizes[1] < sizes[2] == 64


def test_checkpointing_only_where_nothing_fits_without(config: Compose) -> None:
    words = ("method=lora", "train.batch_size=16", "train.micro_batch_size=1", "train.score_tokens=256")
    one = planned(config, *words, "train.gradient_checkpointing=false")
    assert one.training is not None
    budget = one.training.total() - 2**20
    made = planned(config, *words, f"train.memory={-(-budget // 1024)}KiB")
    assert made.gradient_checkpointing
    assert made.peak() <= budget
    with pytest.raises(ConfigError, match=r"one row at a time needs about .* GiB.*gradient_checkpointing=auto"):
        planned(config, *words, f"train.memory={-(-budget // 1024)}KiB", "train.gradient_checkpointing=false")


def test_processes_share_the_batch(config: Compose) -> None:
    made = planned(config, "train.batch_size=64", "train.micro_batch_size=1", "train.memory=200GiB", world=4)
    assert (made.micro_batch_size, made.accumulation) == (16, 1)


def test_a_budget_that_nothing_fits_into_is_refused_before_weights(config: Compose) -> None:
    with pytest.raises(ConfigError, match=r"train.memory: 1GiB .* does not suffice: .* needs about \d"):
        planned(config, "train.memory=1GiB")


@pytest.mark.parametrize("stage", ["moe_joint"])
def test_stages_that_do_not_plan_refuse_a_budget(stage: str) -> None:
    words = [f"stage={stage}", "train.memory=8GiB"]
    with pytest.raises(ConfigError, match="train.memory plans stage=train"):
        composition.build(*composition.compose_values(words), words)


def test_a_run_keeps_its_plan_and_trains_by_it(config: Compose, tmp_path: Path) -> None:
    from finsa.stages import train

    words = ("train=smoke", "train.max_steps=1", "train.micro_batch_size=1", "train.memory=8GiB", "tracking=none")
    done = train.run(config(*words, "stage.compare_base=false", f"output_dir={tmp_path}")).run_dir
    assert done is not None
    facts = json.loads((done / "run.json").read_text())
    assert facts["memory_plan"]["micro_batch_size"] == facts["batching"]["micro_batch_size"] == 16
    assert facts["memory_plan"]["budget"] == 8 * 2**30
    assert not facts["batching"]["micro_batch_halved"]


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_the_estimate_is_near_what_real_steps_take(arm: str) -> None:
    if sys.platform != "linux":
        pytest.skip("the peak is read from /proc")
    words = [sys.executable, "benchmarks/memory_plan.py", "--quick", "--one", arm, "--rows", "32"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["measured"] > 1.1 * found["imports"]  # most of it is not just libraries
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.2)
