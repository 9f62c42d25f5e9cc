"""A few-shot run: its folder has the examples, and whatever uses the run shows them to the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.errors import ConfigError, RunError
from finsa.evaluation import report
from finsa.inference import predictor
from finsa.stages import evaluate, export, train

Compose = Callable[..., RunConfig]
Runs = Callable[..., Path]
SETTINGS = (FEW, "tracking=none", "stage.compare_base=false", "model.dtype=float32", "method.examples.count=4")


@pytest.fixture(scope="module")
def few_shot(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of a run by its settings; one per module."""
    base, known = tmp_path_factory.mktemp("few_shot"), dict[tuple[str, ...], Path]()

    def of(*words: str) -> Path:
        if words not in known:
            folder = train.run(config("method=few_shot", *SETTINGS, *words, f"output_dir={base}")).run_dir
            assert folder is not None
            known[words] = folder
        return known[words]

    return of


def _predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def _log_probs(run: Path) -> Any:
    return np.array([list(row["log_probs"].values()) for row in _predictions(run)])


@pytest.mark.parametrize("words", [(), ("method.examples.choice=nearest",), ("method.examples.calibrate=true",)])
def test_evaluation_and_prediction_show_the_examples_of_the_run(
    few_shot: Runs, config: Compose, tmp_path: Path, words: tuple[str, ...]
) -> None:
    run = few_shot(*words)
    again = evaluate.run(config("stage=evaluate", f"run={run}", "tracking=none", f"output_dir={tmp_path}")).run_dir
    assert again is not None
    assert _predictions(again) == _predictions(run)
    texts = [row["text"] for row in _predictions(run)]
    answers = predictor.restore(str(run), 16384)(texts)
    assert np.abs(answers.log_probs - _log_probs(run)).max() < 1e-4
    rows = (run / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == (1203 if words and "nearest" in words[0] else 4)


def test_calibration_subtracts_what_content_free_texts_have(few_shot: Runs) -> None:
    plain, calibrated = few_shot(), few_shot("method.examples.calibrate=true")
    bias = json.loads((calibrated / "run.json").read_text(encoding="utf-8"))["contextual_bias"]
    assert _log_probs(calibrated) + bias == pytest.approx(_log_probs(plain), abs=1e-5)
    free = predictor.restore(str(plain), 16384)(["N/A", "[MASK]", ""]).log_probs
    assert bias == pytest.approx(free.mean(axis=0).tolist(), abs=1e-4)


def test_no_examples_are_zero_shot(few_shot: Runs, config: Compose, tmp_path: Path) -> None:
    words = ("method=zero_shot", *SETTINGS[:-1], f"output_dir={tmp_path}")
    alone = train.run(config(*words)).run_dir
    assert alone is not None
    assert _predictions(few_shot("method.examples.count=0")) == _predictions(alone)


def test_an_export_keeps_fixed_examples_and_others_are_refused(few_shot: Runs, config: Compose, tmp_path: Path) -> None:
    words = ("stage=export", f"run={few_shot()}", "format=merged", f"output={tmp_path / 'merged'}", "stage.rows=40")
    export.run(config(*words, "stage.timed=1", "tracking=none"))
    assert json.loads((tmp_path / "merged" / "receipt.json").read_text(encoding="utf-8"))["agreement"] == 1
    for setting, message in (
        ("choice=nearest", "chosen for each text"),
        ("calibrate=true", "no contextual calibration"),
    ):
        run = few_shot(f"method.examples.{setting}")
        with pytest.raises(ConfigError, match=message):
            export.run(config("stage=export", f"run={run}", "format=merged", f"output={tmp_path / 'x'}"))


def test_a_run_without_its_examples_is_refused(few_shot: Runs) -> None:
    file = few_shot("seed=7") / "examples.jsonl"
    file.write_text('{"text": "甲"}\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"examples\.jsonl is missing or damaged; repeat the run's command"):
        predictor.restore(str(file.parent), 16384)


def test_the_report_has_the_cost_of_a_row(few_shot: Runs, config: Compose) -> None:
    runs = [few_shot(), few_shot("method.examples.count=0")]
    stage = config("stage=report", f"runs={runs[0]}").stage
    built = report.build(runs, stage, None, {})  # type: ignore[arg-type]
    table = built.tables["costs"]
    tokens = [float(row[list(table.columns).index("tokens per prompt")]) for row in table.rows]
    facts = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in runs]
    assert sorted(tokens) == sorted(one["prompt_tokens"] for one in facts)
    assert facts[0]["prompt_tokens"] > facts[1]["prompt_tokens"] + 40
    assert all(float(row[list(table.columns).index("ms per test row")]) > 0 for row in table.rows)
