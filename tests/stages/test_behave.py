"""The stage on real runs: an oracle fails nothing, and a bag of characters fails whatever only the order tells."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from folders import answers, write_run
from matplotlib import image
from scipy.stats import binomtest

from finsa.config import ROOT, RunConfig
from finsa.errors import ConfigError, RunError
from finsa.inference import predictor
from finsa.stages import behave, train

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def bags(config: Configure, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Logistic regressions on characters and on character n-grams, trained on 1,000 rows of the sample."""
    folder, found = tmp_path_factory.mktemp("bags"), {}
    few = "data.split.rows={train: 1000, validation: 200}"
    for name, ngrams in (("characters", "[1,1]"), ("ngrams", "[1,3]")):
        words = ("method=tfidf_lr", f"method.baseline.ngrams={ngrams}", "tracking=none", few, f"output_dir={folder}")
        done = train.run(config(*words, "method.baseline.strengths=[10]"))
        assert done.run_dir is not None
        found[name] = done.run_dir
    return found


def test_a_bag_of_characters_fails_whatever_only_the_order_tells(
    config: Configure, bags: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same characters get the same label, so every row that the model had right fails when its label flips."""
    runs = f"runs=[{bags['characters']},{bags['ngrams']}]"
    done = behave.run(config("stage=behave", runs, f"output={tmp_path}", "tracking=none"))
    found = {tuple(name.rsplit(", ", 1)): record for name, record in done.metrics.items()}
    (bag,) = {name for name, _ in found if "[1, 1]" in name}
    (other,) = {name for name, _ in found if "[1, 3]" in name}
    order = found[bag, "order"]
    assert order["rows"] >= 20
    assert order["failures"] == order["tested"] >= 10
    assert found[bag, "entity"]["failures"] < found[bag, "entity"]["tested"]
    # Every number of the tables can be counted in the list of failures.
    lines = [json.loads(line) for line in (tmp_path / "behave_failures.jsonl").open(encoding="utf-8")]
    for (run, rule), record in found.items():
        assert record["failures"] == sum(line["run"] == run and line["rule"] == rule for line in lines)
    assert all(line["label"] != line["expected"] and line["text"] != line["changed"] for line in lines)
    with (tmp_path / "behave.csv").open(encoding="utf-8", newline="") as file:
        assert [row["rule"] for row in csv.DictReader(file)] == [rule for _, rule in found]
    # The paired test: rows that both answer correctly, from the predictions of both.
    right = []
    for name in ("characters", "ngrams"):
        predicted = [json.loads(line) for line in (bags[name] / "predictions.jsonl").open(encoding="utf-8")]
        right.append({line["id"] for line in predicted if line["label"] == line["gold"]})
    fails = [
        {line["id"] for line in lines if (line["run"], line["rule"]) == (run, "traditional")} for run in (bag, other)
    ]
    both = right[0] & right[1]
    first, second = len((fails[0] - fails[1]) & both), len((fails[1] - fails[0]) & both)
    tested = [found[run, "traditional"]["rows"] for run in (bag, other)]
    assert tested[0] == tested[1] >= len(both)
    assert "Failures of two runs on the same rows" in capsys.readouterr().out
    p = binomtest(first, first + second).pvalue
    (line,) = [
        line
        for line in (tmp_path / "behave.md").open(encoding="utf-8")
        if line.startswith(f"| traditional | {bag} | {other}")
    ]
    assert f"| {first} | {second} |" in line
    assert float(line.split("|")[-2]) >= round(p, 4)  # corrected for the number of rules
    assert image.imread(tmp_path / "behave.png").shape[1] == 1020
    assert "Failures of two runs on the same rows" in (tmp_path / "behave.html").read_text(encoding="utf-8")


def test_an_oracle_fails_nothing(
    config: Configure, bags: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that knows the expected label of every changed text, in the place of the run's model."""
    real, made = behave.behavior.cases, dict[str, str]()

    def remembered(*given: Any) -> Any:
        cases = real(*given)
        made.update({case.text: case.expected for case in cases})
        return cases

    class Oracle:
        def __call__(self, texts: Sequence[str], moved: Any) -> Any:
            return type("Found", (), {"predicted": [made[text] for text in texts]})()

        def close(self) -> None:
            pass

    monkeypatch.setattr(behave.behavior, "cases", remembered)
    monkeypatch.setattr(predictor, "load", lambda *_, **__: Oracle())
    done = behave.run(config("stage=behave", f"run={bags['ngrams']}", f"output={tmp_path}", "tracking=none"))
    assert len(done.metrics) >= 8
    assert {record["failures"] for record in done.metrics.values()} == {0}
    assert sum(record["tested"] for record in done.metrics.values()) > 500
    assert (tmp_path / "behave_failures.jsonl").read_text(encoding="utf-8") == ""


def test_rules_of_the_user(config: Configure, bags: dict[str, Path], tmp_path: Path) -> None:
    """A file with one rule; its errors name the file and the key, before a model is loaded."""
    file, words = tmp_path / "mine.yaml", ("stage=behave", f"run={bags['ngrams']}", f"output={tmp_path / 'out'}")
    values = yaml.safe_load((ROOT / "conf" / "behavior" / "zh.yaml").read_text(encoding="utf-8"))
    values["rules"] = {"quiet": {"expect": "stay", "about": "a space", "append": " "}}
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    done = behave.run(config(*words, f"stage.rules={file}"))
    (record,) = done.metrics.values()
    assert (record["rule"], record["rows"], record["failures"]) == ("quiet", 596, 0)
    values["rules"]["quiet"]["expct"] = "stay"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rules.quiet.expct: Extra inputs are not permitted  \[.*mine.yaml\]"):
        behave.run(config(*words, f"stage.rules={file}"))
    file.write_text("rules: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="mine.yaml"):
        behave.run(config(*words, f"stage.rules={file}"))
    with pytest.raises(ConfigError, match="stage.rules: there is no file"):
        behave.run(config(*words, "stage.rules=nothing.yaml"))


def test_runs_that_cannot_be_tested(config: Configure, tmp_path: Path) -> None:
    gold = np.zeros(5, dtype=np.int64)
    run = write_run(tmp_path / "run", config("method=tfidf_lr"), gold, answers(gold, 1, 0), ("up", "down"))
    words = ("stage=behave", f"run={run}", f"output={tmp_path / 'out'}")
    with pytest.raises((ConfigError, RunError), match="opposite labels, and up, down have none|records no labels"):
        behave.run(config(*words))
    with pytest.raises(ConfigError, match="stage=behave needs run=<folder>"):
        config("stage=behave")
    assert not (tmp_path / "out").exists()
