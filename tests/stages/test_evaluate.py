"""Evaluation by generated answers, what a run records for its probabilities, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import commands
import numpy as np
import pytest

from finsa.config import RunConfig
from finsa.errors import ConfigError, RunError
from finsa.evaluation import comparison, finished_runs
from finsa.inference import predictor
from finsa.stages import evaluate

Compose = Callable[..., RunConfig]
Trained = Callable[..., Path]


def test_generated_answers_are_parsed_counted_and_stored(config: Compose, trained: Trained, tmp_path: Path) -> None:
    words = ("stage=evaluate", "stage.protocol=generate", "tracking=none", f"output_dir={tmp_path}")
    result = evaluate.run(config(*words, f"run={trained('lora_response')}", "train.score_tokens=65536"))
    assert result.run_dir is not None
    facts = json.loads((result.run_dir / "run.json").read_text(encoding="utf-8"))
    assert (facts["protocol"], facts["scoring"]) == ("generate", "generated, parsed by aidf")
    lines = (result.run_dir / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = result.metrics["test"]
    names = list(found["per_class"])
    right = [row["label"] == row["gold"] for row in rows]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    lost = {name: sum(row["label"] is None and row["gold"] == name for row in rows) for name in names}
    assert found["unparsable"] == lost
    assert sum(map(sum, found["confusion"])) == found["n"] - sum(lost.values())
    for row in rows:
        start = row["answer"].strip().split("\n")[0].split("。")[0].strip()
        assert row["label"] == (start if start in names else None)


def test_a_run_records_its_temperature_and_gives_probabilities_at_it(trained: Trained) -> None:
    folder = trained("lora_response")
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    told = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["calibration"]
    assert facts["calibration"]["temperature"] == told["temperature"] != 1
    assert facts["labels"] == {"利空": "利空", "中性": "中性", "利好": "利好"}
    assert told["validation"]["loss"] <= told["validation"]["loss_uncalibrated"]
    answers = predictor.restore(str(folder), 4096)(["公司大涨", "公告"])
    wanted = np.exp(answers.log_probs / told["temperature"])
    np.testing.assert_allclose(answers.probs, wanted / wanted.sum(axis=1, keepdims=True))


def test_a_run_an_evaluation_and_a_report_have_one_calibration_error_and_one_interval(
    config: Compose, trained: Trained, tmp_path: Path
) -> None:
    run = trained("lora_response")
    again = evaluate.run(config("stage=evaluate", f"run={run}", "tracking=none", f"output_dir={tmp_path}"))
    known = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["calibration"]
    assert known["test"]["ece"] != pytest.approx(known["test"]["ece_uncalibrated"], abs=1e-3)
    assert again.metrics["calibration"]["test"]["ece"] == pytest.approx(known["test"]["ece"], abs=1e-5)
    assert again.run_dir is not None
    assert evaluated_rows(again.run_dir) == evaluated_rows(run)
    for folder in (run, again.run_dir):
        (found,), _ = finished_runs.load([folder])
        (record,) = comparison.compare(
            finished_runs.group([found])[0], config("stage=report", f"runs={run}").stage
        ).records
        assert record["calibration_error"] == pytest.approx(known["test"]["ece"], abs=1e-5)
        own = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]["intervals"]
        for name in ("accuracy", "macro_f1", "weighted_f1"):
            assert [record[f"{name}_low"], record[f"{name}_high"]] == own[name]


def test_a_merged_adapter_answers_as_an_unmerged_one(trained: Trained) -> None:
    texts = ["公司大涨", "公告", "亏损" * 200]
    for method in ("lora_response", "classifier"):
        one, other = (predictor.restore(str(trained(method)), 4096, merge=merge)(texts) for merge in (False, True))
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("tfidf_lr", "", "needs a language model that answers in words"),
        ("classifier", "", "needs a language model that answers in words"),
        ("lora_response", "stage.parse=letter", "letter reads options that are one capital letter"),
    ],
)
def test_answers_that_cannot_be_generated_or_read_are_refused(
    config: Compose, trained: Trained, tmp_path: Path, method: str, words: str, message: str
) -> None:
    given = ("stage=evaluate", "stage.protocol=generate", "tracking=none", f"output_dir={tmp_path}", *words.split())
    with pytest.raises(ConfigError, match=message):
        evaluate.run(config(*given, f"run={trained(method)}"))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model_of_labels_is_refused(config: Compose, trained: Trained, tmp_path: Path) -> None:
    words = ("stage=evaluate", "tracking=none", f"output_dir={tmp_path}")
    done = evaluate.run(config(*words, f"run={trained('tfidf_lr')}"))
    with pytest.raises(
        RunError, match="was written by stage=evaluate; name the folder of a run that was trained on labels"
    ):
        evaluate.run(config(*words, f"run={done.run_dir}"))


def test_an_evaluation_uses_the_data_of_its_run_with_changes_of_the_command(trained: Trained, tmp_path: Path) -> None:
    """The run's data section is used with the changes of the command, except for keys that belong to the model."""
    run = trained("lora_response")
    words = ("stage=evaluate", f"run={run}", "tracking=none", f"output_dir={tmp_path}")
    done = commands.run(*words, "data.max_length=99")
    assert done.returncode == 2
    assert "data.max_length: is fixed by the model" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = commands.run(*words, "data.cache=null")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert evaluated_rows(folder) == evaluated_rows(run)


def evaluated_rows(run: Path) -> list[str]:
    """Ids of the test rows that a run scored."""
    return [json.loads(line)["id"] for line in (run / "predictions.jsonl").open(encoding="utf-8")]
