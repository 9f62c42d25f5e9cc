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


@pytest.mark.parametrize(
    ("method", "trainable"),
    [
        (("dora",), 540_672 + 24 * (896 + 128)),  # a magnitude per output of q_proj and v_proj
        (("pissa",), 540_672),
        (("qlora",), 4_399_104),
        (("lora_8bit",), 540_672),
        (("classifier_label_words",), 540_672 + 896 * 3 + 3),
        (("classifier", "method.learn=head", "method.adapter=null"), 896 * 3 + 3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_every_learners_parameters_are_counted_without_weights(
    config: Compose, method: tuple[str, ...], trainable: int
) -> None:
    metrics = check.run(config("stage=check", "model=qwen05b", f"method={method[0]}", *method[1:])).metrics
    assert metrics["trainable_parameters"] == trainable
    assert metrics["total_parameters"] == 494_032_768 + trainable


def test_a_quantised_base_needs_less_memory(config: Compose) -> None:
    plans = [
        check.run(config("stage=check", "model=glm9b", f"method.quantization={kind}")).metrics["memory_plan"]
        for kind in ("none", "int8", "nf4")
    ]
    need = [made["training_bytes"]["weights"] for made in plans]
    weights = 9_400_279_040 - 2 * 151_552 * 4096  # but for embeddings and LM head
    width = need[0] - need[1] + weights  # bytes of all of them in the type of this machine
    assert width / weights == pytest.approx(round(width / weights), rel=1e-3)  # norms stay as they are
    assert round(width / weights) in (2, 4)
    assert need[1] - need[2] == pytest.approx(weights * (1 - 0.516), rel=1e-3)
