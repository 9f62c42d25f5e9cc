from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finsa.config import RunConfig
from finsa.stages import check

Compose = Callable[..., RunConfig]


def test_the_plan_of_the_published_ablation(config: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    result = check.run(config("stage=check", "model=qwen05b", "method=lora"))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())  # as if the table's cells were not wrapped
    assert "540,672 trainable of 494,573,440 total" in shown
    assert "train 3,608, validation 596, test 596" in shown
    assert "an estimate, because the model's own is not on this machine" in shown
    assert result.metrics["trainable_parameters"] == 540_672
    assert result.run_dir is None


@pytest.mark.parametrize("model", ["qwen7b", "glm9b", "r1_distill_1_5b", "llama3_8b", "baichuan2_7b", "chatglm3_6b"])
def test_every_model_can_be_planned_offline(config: Compose, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = check.run(config("stage=check", f"model={model}", "method=lora"))
    assert result.metrics["total_parameters"] > 1e9
    assert result.metrics["memory_bytes"] > 2 * result.metrics["total_parameters"]
    assert "GiB" in capsys.readouterr().out


def test_the_plan_counts_what_training_will_do(config: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    check.run(config("stage=check", "method=lora_downsample", "train.epochs=2", "train.batch_size=16"))
    smallest = 954
    steps = 2 * -(-3 * smallest // 16)
    assert f"{3 * smallest:,} rows, {steps:,} steps of 16 sequences" in capsys.readouterr().out


def test_nothing_is_written(config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check.run(config("stage=check", f"output_dir={tmp_path}"))
    assert list(tmp_path.iterdir()) == []
