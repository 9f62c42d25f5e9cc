"""A run is scored only by its recorded rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finsa.errors import RunError
from finsa.inference import export, predictor
from finsa.runs import run_folder

Trained = Callable[..., Path]


def test_a_text_is_answered_the_same_with_white_space_around_it(trained: Trained) -> None:
    text = "公司上半年净利润同比增长三成，超出市场预期。"
    for method in ("lora_response", "tfidf_lr"):
        answers = predictor.restore(str(trained(method)), 4096)([text, f"  {text}\n", f"\u3000{text}\u00a0"])
        assert answers.log_probs[1:] == pytest.approx(np.tile(answers.log_probs[0], (2, 1)), abs=1e-6)


def test_stored_predictions_contain_the_served_probabilities(trained: Trained) -> None:
    for method in ("lora_response", "tfidf_lr"):
        run = trained(method)
        rows = [json.loads(line) for line in (run / "predictions.jsonl").open(encoding="utf-8")]
        answerer = predictor.restore(str(run), 4096)
        assert answerer.temperature != 1
        answers = answerer([row["text"] for row in rows])
        assert [row["label"] for row in rows] == answers.predicted
        for row, probs, log_probs in zip(rows, answers.probs, answers.log_probs, strict=True):
            assert list(row["probs"].values()) == pytest.approx(probs, abs=2e-5)
            assert list(row["log_probs"].values()) == pytest.approx(log_probs, abs=2e-4)


def test_another_rule_of_scoring_than_the_recorded_one_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("lora_response"), run)
    export.write(predictor.read(str(run)), "adapter", "fp32", tmp_path / "export")
    for place, name in ((run, "run.json"), (tmp_path / "export", run_folder.EXPORTED)):
        assert predictor.restore(str(place), 4096).rule == "whole label"
        facts = json.loads((place / name).read_text(encoding="utf-8"))
        assert facts["scoring"] == "whole label"
        facts["scoring"] = "whole label and end token"
        (place / name).write_text(json.dumps(facts), encoding="utf-8")
        with pytest.raises(
            RunError,
            match="by the rule 'whole label and end token', but here the rule would be 'whole label'.*repeat the run",
        ):
            predictor.restore(str(place), 4096)
        del facts["scoring"]  # of an older version
        (place / name).write_text(json.dumps(facts), encoding="utf-8")
        assert predictor.restore(str(place), 4096).rule == "whole label"
