"""Heads and quantised bases through the stages, and what is refused before a weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from few import FEW

from finsa import launch
from finsa.config import RunConfig
from finsa.errors import ConfigError
from finsa.runs import Result
from finsa.stages import evaluate, train

Compose = Callable[..., RunConfig]
SHORT = (FEW, "train=smoke", "tracking=none", "stage.compare_base=false", "train.max_steps=2")
# The last is another code point for the first one's character; Unicode and this tokenizer hold them for the same.
ALIKE = {"利空": "利", "中性": "中", "利好": "\uf9dd"}


def predictions(result: Result) -> list[dict[str, Any]]:
    assert result.run_dir is not None
    lines = (result.run_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", [("classifier_label_words", "method.quantization=nf4"), ("lora_8bit",)])
def test_evaluate_rebuilds_head_and_quantised_base(config: Compose, tmp_path: Path, method: tuple[str, ...]) -> None:
    trained = train.run(config(f"method={method[0]}", *method[1:], *SHORT, f"output_dir={tmp_path}/a"))
    run = f"run={trained.run_dir}"
    again = evaluate.run(config("stage=evaluate", run, "tracking=none", f"output_dir={tmp_path}/b"))
    assert again.metrics["test"] == trained.metrics["test"]
    for first, second in zip(predictions(trained), predictions(again), strict=True):
        assert first["probs"] == pytest.approx(second["probs"], abs=2e-5)
    rules = [json.loads((result.run_dir / "run.json").read_text())["scoring"] for result in (trained, again)]
    assert rules == ["classification head" if "classifier" in method[0] else "whole label"] * 2


@pytest.mark.parametrize("run", [train.run, launch.run_job], ids=["stage", "command"])
def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused_before_weights(
    config: Compose, tmp_path: Path, run: Callable[[RunConfig], object]
) -> None:
    """The model has a tokenizer and no weights: a later error would be about these."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((Path("data/tiny") / name).read_bytes())
    cfg = config(
        "method=lora_label", f"model.path={tmp_path}", *SHORT, f"output_dir={tmp_path}/runs", "data.cache=null"
    )
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"labels": ALIKE})})
    launch._raised.clear()
    with pytest.raises(ConfigError, match=r"data\.labels: .* are not distinct in this tokenizer"):
        run(cfg)
        raise launch._raised.pop()
    assert not (tmp_path / "runs").exists()
