from __future__ import annotations

import pytest
from compositions import config

from finsa.config import Train
from finsa.errors import ConfigError
from finsa.training import preflight


def settings(*overrides: str) -> Train:
    return config(*overrides).train


def test_steps_count_every_epochs_incomplete_step() -> None:
    train = settings("train.batch_size=32", "train.micro_batch_size=8", "train.epochs=2")
    assert preflight.optimizer_steps(train, rows=100) == 2 * 4
    assert preflight.accumulation_steps(train) == 4


def test_steps_of_the_published_schedules() -> None:
    aidf = settings("train=aidf")
    assert preflight.accumulation_steps(aidf, world=4) == 8  # 6 x 8 x 4 = 192
    # Published 185 and 140: the libraries of that time dropped an epoch's incomplete step, today's keep it.
    assert preflight.optimizer_steps(aidf, rows=7147, world=4) == 190
    assert preflight.optimizer_steps(aidf, rows=5430, world=4) == 145
    assert preflight.optimizer_steps(settings("train=finsa_moe"), rows=1_626_292) == 304_932
    assert preflight.optimizer_steps(settings("train=finsa_moe"), rows=8_275) == 1_554


def test_max_steps_stops_earlier() -> None:
    assert preflight.optimizer_steps(settings("train.max_steps=3"), rows=1000) == 3


def test_a_batch_larger_than_the_data_is_reported_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size: 32 is more than the 20 training rows.*=20 or less"):
        preflight.optimizer_steps(settings("train.batch_size=32"), rows=20)


def test_processes_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size x processes: 32 x 3"):
        preflight.accumulation_steps(settings("train.batch_size=32", "train.micro_batch_size=32"), world=3)
