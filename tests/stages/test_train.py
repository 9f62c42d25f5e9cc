"""The main stage on the embedded default, shortened; every file of the run folder is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from few import FEW
from matplotlib import image

from finsa.config import ROOT, RunConfig
from finsa.data import dataset
from finsa.evaluation import metrics, run_results
from finsa.inference.scoring import LabelScorer
from finsa.runs import provenance
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.stages import evaluate, train

Compose = Callable[..., RunConfig]
QUICK = ("train=smoke", "tracking=none", "train.batch_size=4")
SHORT = (FEW, *QUICK, "train.max_steps=12", "train.validate_every=6")


@pytest.fixture(scope="module")
def finished(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Result]:
    cfg = config(*SHORT, f"output_dir={tmp_path_factory.mktemp('runs')}")
    return cfg, train.run(cfg)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of the sample."""
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("train", 48), ("valid", 24), ("test", 32)):
        pl.read_csv(ROOT / "data" / "sample" / f"{name}.csv").head(rows).write_csv(folder / f"{name}.csv")
    return folder


def read(result: Result, name: str) -> Any:
    assert result.run_dir is not None
    return json.loads((result.run_dir / name).read_text(encoding="utf-8"))


def predictions(result: Result) -> list[dict[str, Any]]:
    assert result.run_dir is not None
    lines = (result.run_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_record_describes_the_run(finished: tuple[RunConfig, Result]) -> None:
    cfg, result = finished
    facts = read(result, "run.json")
    assert facts["status"] == "complete"
    assert facts["steps"] == 12
    assert facts["trainable_parameters"] == 28_672
    assert facts["scoring"] == "whole label"
    assert {"git_commit", "versions", "data_fingerprint", "template_fingerprint", "label_fingerprint"} <= facts.keys()
    assert facts["wall_seconds"] > 0
    assert facts["peak_memory_bytes"] > 1e8
    assert result.run_dir is not None
    written = yaml.safe_load((result.run_dir / "config.yaml").read_text(encoding="utf-8"))
    assert RunConfig.model_validate_json(json.dumps(written)) == cfg


def test_metrics_equal_those_of_the_predictions(finished: tuple[RunConfig, Result]) -> None:
    _, result = finished
    kept, rows = read(result, "metrics.json"), predictions(result)
    names = list(kept["test"]["per_class"])
    gold, label = ([names.index(row[key]) for row in rows] for key in ("gold", "label"))
    again = metrics.report(gold, label, names)
    assert again == kept["test"]
    assert kept == result.metrics
    assert all(max(row["probs"], key=row["probs"].get) == row["label"] for row in rows)
    assert all(sum(row["probs"].values()) == pytest.approx(1, abs=1e-5) for row in rows)


def test_the_ledger_balances_and_counts_truncation(finished: tuple[RunConfig, Result]) -> None:
    ledger = read(finished[1], "ledger.json")
    assert sum(ledger["read"].values()) == sum(ledger["buckets"].values()) == 1323
    assert sum(sum(counts.values()) for counts in ledger["splits"].values()) == ledger["buckets"]["used"]
    assert set(ledger["truncated"]) == {"train", "validation", "test"}


def test_the_log_and_the_figure_exist(finished: tuple[RunConfig, Result]) -> None:
    folder = finished[1].run_dir
    assert folder is not None
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == list(range(1, 13))
    assert any("eval_loss" in record and "eval_macro_f1" in record for record in steps)
    picture = image.imread(folder / "confusion_matrix.png")
    assert np.ptp(picture) > 0.5


def test_the_adapter_is_an_ordinary_peft_folder(finished: tuple[RunConfig, Result]) -> None:
    folder = finished[1].run_dir
    assert folder is not None
    adapter = json.loads((folder / "adapters" / "default" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["peft_type"], adapter["r"], sorted(adapter["target_modules"])) == ("LORA", 8, ["q_proj", "v_proj"])
    assert (folder / "adapters" / "default" / "adapter_model.safetensors").stat().st_size > 28_672 * 4


def test_evaluate_rebuilds_the_model_and_the_prompt(
    finished: tuple[RunConfig, Result], config: Compose, tmp_path: Path
) -> None:
    _, trained = finished
    again = evaluate.run(config("stage=evaluate", f"run={trained.run_dir}", "tracking=none", f"output_dir={tmp_path}"))
    assert again.metrics["test"] == trained.metrics["test"]
    for first, second in zip(predictions(trained), predictions(again), strict=True):
        assert (first["id"], first["label"]) == (second["id"], second["label"])
        assert first["probs"] == pytest.approx(second["probs"], abs=2e-5)
    assert read(again, "run.json")["template_fingerprint"] == read(trained, "run.json")["template_fingerprint"]
    assert set(read(again, "ledger.json")["truncated"]) == {"test"}


def test_the_base_model_scores_as_before_training(
    finished: tuple[RunConfig, Result], config: Compose, tmp_path: Path
) -> None:
    bare = evaluate.run(config("stage=evaluate", FEW, "tracking=none", f"output_dir={tmp_path}"))
    zero_shot = train.run(config("method=zero_shot", *SHORT, f"output_dir={tmp_path}"))
    assert bare.metrics["test"] == finished[1].metrics["base"] == zero_shot.metrics["test"]
    assert zero_shot.run_dir is not None
    assert not (zero_shot.run_dir / "adapters").exists()


def test_full_training_does_not_change_a_shared_base(config: Compose, files: Path, tmp_path: Path) -> None:
    few, session = (f"data.files={files}", "tracking=none", f"output_dir={tmp_path}"), Session()
    words = ("method=full", *QUICK, *few, "train.max_steps=2", "train.learning_rate=1e-3")
    full = train.run(config(*words), session)
    bare = evaluate.run(config("stage=evaluate", *few), session)
    assert bare.metrics["test"] == full.metrics["base"] != full.metrics["test"]
    again = evaluate.run(config("stage=evaluate", f"run={full.run_dir}", *few[1:]), session)
    assert again.metrics["test"] == full.metrics["test"]


def test_a_run_that_breaks_is_marked_failed_and_resumed_to_the_same_numbers(
    finished: tuple[RunConfig, Result], config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = (*SHORT, f"output_dir={tmp_path}")
    real = run_results.validation
    calls = []

    def breaks(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run_results, "validation", breaks)
    with pytest.raises(KeyboardInterrupt):
        train.run(config(*short))
    monkeypatch.setattr(run_results, "validation", real)
    (broken,) = [file.parent for file in tmp_path.glob("*/run.json")]
    assert json.loads((broken / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert not (broken / "metrics.json").exists()
    resumed = train.run(config(*short, "resume=true"))
    assert resumed.run_dir == broken
    assert resumed.metrics == finished[1].metrics
    assert predictions(resumed) == predictions(finished[1])
    assert read(resumed, "run.json")["status"] == "complete"


def test_validation_and_the_unchanged_base_are_scored_once(
    config: Compose, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of a sweep share the base's scores; a run writes the same values as if it had scored them itself.

    They share tokenized rows too, and yet the ledger of each covers only the splits that it has read.
    """
    scored, plain = [], LabelScorer.score

    def score(self: LabelScorer, prompts: Any, *moved: Any) -> Any:
        scored.append(len(prompts))
        return plain(self, prompts, *moved)

    monkeypatch.setattr(LabelScorer, "score", score)
    limits = ("train.max_steps=2", "train.validation_rows=null", "data.max_length=63")
    words = (*QUICK, *limits, f"data.files={files}")
    rows = dataset.load(config(*words).data).splits
    validation, test = rows["validation"].height, rows["test"].height

    session = Session()

    def run(name: str, place: str = "sweep") -> tuple[list[int], Result]:
        scored.clear()
        done = train.run(config(f"method={name}", *words, f"output_dir={tmp_path / place}"), session)
        return list(scored), done

    first, lora = run("lora_response")
    assert first == [validation, test, test]
    second, other = run("lora")
    assert second == [validation, test]
    third, zero = run("zero_shot")
    assert third == []
    assert lora.metrics["base"] == other.metrics["base"] == zero.metrics["test"]
    again, alone = run("lora", "alone")  # tokens are kept below it, so it shares nothing with the others
    assert again == [validation, test, test]
    assert alone.metrics == other.metrics
    assert isinstance(read(zero, "run.json")["scoring_seconds"], float)  # of the job that scored them
    evaluation = ("stage=evaluate", f"run={lora.run_dir}", "stage.split=validation", "tracking=none")
    judged = evaluate.run(config(*evaluation, f"output_dir={tmp_path / 'sweep'}"), session)
    for name in ("accuracy", "macro_f1"):
        assert judged.metrics["validation"][name] == lora.metrics["validation"][name]
    told = [set(read(done, "ledger.json")["truncated"]) for done in (lora, zero, judged)]
    assert told == [{"train", "validation", "test"}, {"test"}, {"validation"}]


def test_scores_of_the_base_model_are_shared_across_commands(
    config: Compose, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later command reads them, with equal results, unless the model, the rows or the code are others."""
    scored, plain = [], LabelScorer.score

    def score(self: LabelScorer, prompts: Any, *moved: Any) -> Any:
        scored.append(len(prompts))
        return plain(self, prompts, *moved)

    monkeypatch.setattr(LabelScorer, "score", score)

    def run(*words: str) -> tuple[int, Result]:
        scored.clear()
        common = ("method=zero_shot", *QUICK, f"data.files={files}", f"output_dir={tmp_path / 'runs'}", "fresh=true")
        done = train.run(config(*common, *words))
        return len(scored), done

    (first, computed), (second, read_back) = run(), run()
    assert (first, second) == (1, 0)
    assert predictions(read_back) == predictions(computed)
    assert read(read_back, "run.json")["scoring_seconds"] == read(computed, "run.json")["scoring_seconds"]
    assert run("data.prompt='{text}:'")[0] == run("train.threads=1")[0] == run("data.cache=null")[0] == 1
    with monkeypatch.context() as other_code:
        other_code.setattr(provenance, "code", lambda: "another version")
        assert run()[0] == 1
    entries = list((tmp_path / "runs" / "cache").glob("scores-*"))
    assert len(entries) == 4
    for entry in entries:  # damaged
        (entry / "log_probs.npy").write_bytes(b"")
    again, repaired = run()
    assert again == 1
    assert predictions(repaired) == predictions(computed)
    (tmp_path / "file").write_text("no folder")
    assert run(f"data.cache={tmp_path / 'file'}")[1].metrics == computed.metrics


def test_a_measure_without_a_value_is_reported_once(
    config: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of the other checkpoints is used."""
    values, measured = iter([np.nan, np.nan, 0.5, 0.4, 0.5]), run_results.validation
    monkeypatch.setattr(run_results, "validation", lambda *args: {**measured(*args), "mcc": next(values)})
    words = (FEW, *QUICK, "train.max_steps=4", "train.validate_every=1", "train.select_by=mcc")
    folder = train.run(config(*words, f"output_dir={tmp_path}", "stage.compare_base=false")).run_dir
    assert folder is not None
    assert capsys.readouterr().err.count("warning: train.select_by=mcc has no value") == 1
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["best_validation"] == 0.5
