"""Baselines in the stages: the run folder of every method, and the same scores in a new evaluation."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.errors import ConfigError, DataError, ModelError, RunError
from finsa.evaluation import metrics
from finsa.runs.run_folder import Result
from finsa.stages import check, evaluate, train

Compose = Callable[..., RunConfig]
SMOKE = (FEW, "train=smoke", "tracking=none")
METHODS = {
    "majority": (),
    "lexicon_zh": (),
    "tfidf_lr": ("method.baseline.strengths=[1,3]",),
    "textcnn": (),
    "bilstm": (),
    "encoder": ("method.baseline.weights=random",),
}
# zh_news_mix and finfe_forum: accuracy and macro-F1 of TF-IDF and logistic regression in ../shared/data/README.md
KNOWN = {"finfe_forum": (0.753, 0.690)}


@pytest.fixture(scope="module", params=METHODS)
def finished(request: Any, config: Compose, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Result]:
    folder = tmp_path_factory.mktemp(request.param)
    cfg = config(f"method={request.param}", *METHODS[request.param], *SMOKE, f"output_dir={folder}")
    return cfg, train.run(cfg)


def read(result: Result, name: str) -> Any:
    assert result.run_dir is not None
    return json.loads((result.run_dir / name).read_text(encoding="utf-8"))


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.run_dir is not None
    written = (result.run_dir / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in written.splitlines()]


def test_the_run_folder_has_the_same_files_as_for_other_methods(finished: tuple[RunConfig, Result]) -> None:
    cfg, result = finished
    assert result.run_dir is not None
    names = {"config.yaml", "run.json", "ledger.json", "dropped.jsonl", "metrics.json", "predictions.jsonl"}
    assert names | {"confusion_matrix.png", "baseline"} <= {file.name for file in result.run_dir.iterdir()}
    assert not [file for file in result.run_dir.rglob("*") if file.suffix in (".pkl", ".pt", ".bin", ".joblib")]
    facts = read(result, "run.json")
    assert facts["status"] == "complete"
    assert cfg.method.baseline is not None
    assert facts["scoring"] == f"baseline: {cfg.method.baseline.kind}"
    assert facts["trainable_parameters"] == facts["total_parameters"] > 0
    assert facts["training_seconds"] >= 0
    assert facts["rows_per_second"] > 0
    assert facts["label_fingerprint"]
    assert result.objective == facts["best_validation"] == result.metrics["validation"]["macro_f1"]


def test_metrics_equal_those_of_the_predictions(finished: tuple[RunConfig, Result]) -> None:
    _, result = finished
    rows, kept = lines(result), read(result, "metrics.json")
    names = list(kept["test"]["per_class"])
    gold, label = ([names.index(row[key]) for row in rows] for key in ("gold", "label"))
    assert metrics.report(gold, label, names) == kept["test"]
    assert all(sum(row["probs"].values()) == pytest.approx(1, abs=1e-5) for row in rows)


def test_evaluate_gives_the_same_scores(finished: tuple[RunConfig, Result], config: Compose, tmp_path: Path) -> None:
    _, first = finished
    again = evaluate.run(config("stage=evaluate", f"run={first.run_dir}", "tracking=none", f"output_dir={tmp_path}"))
    assert again.metrics["test"] == first.metrics["test"]
    for one, other in zip(lines(first), lines(again), strict=True):
        assert (one["id"], one["label"]) == (other["id"], other["label"])
        assert one["probs"] == pytest.approx(other["probs"], abs=2e-6)
    assert read(again, "run.json")["label_fingerprint"] == read(first, "run.json")["label_fingerprint"]
    assert read(again, "ledger.json") == read(first, "ledger.json")


def test_a_damaged_file_is_reported(finished: tuple[RunConfig, Result], config: Compose, tmp_path: Path) -> None:
    _, first = finished
    assert first.run_dir is not None
    copy = shutil.copytree(first.run_dir, tmp_path / "copy")
    largest = max((copy / "baseline").iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    again = config("stage=evaluate", f"run={copy}", "tracking=none", f"output_dir={tmp_path}")
    with pytest.raises(RunError, match="has changed since the run"):
        evaluate.run(again)
    facts = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    del facts["weights"]  # as an older version wrote it
    (copy / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ModelError, match="is incomplete or damaged"):
        evaluate.run(again)


def test_the_plan_counts_the_trained_parameters(
    finished: tuple[RunConfig, Result], config: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, result = finished
    check.run(config("stage=check", FEW, f"method={cfg.method.name}", *METHODS[cfg.method.name]))
    shown = capsys.readouterr().out
    if cfg.method.name == "lexicon_zh":  # its plan names the words, but not the table that is counted
        assert "3,844 positive, 2,072 negative" in shown
    else:
        assert f"{read(result, 'run.json')['trainable_parameters']:,}" in shown
    assert "1,203 rows" in shown


def test_sampling_is_that_of_the_language_models(config: Compose, tmp_path: Path) -> None:
    result = train.run(config("method=majority", "method.balance=downsample", *SMOKE, f"output_dir={tmp_path}"))
    assert lines(result)[0]["probs"] == dict.fromkeys(["利空", "中性", "利好"], pytest.approx(1 / 3, abs=1e-6))


def test_a_mixed_sweep_ends_in_one_table(tmp_path: Path) -> None:
    methods = ["majority", "tfidf_lr", "lora_response"]
    words = ["-m", f"method={','.join(methods)}", "data=sample", *SMOKE, "train.max_steps=2", f"output_dir={tmp_path}"]
    words += ["train.batch_size=4", "stage.compare_base=false"]
    done = commands.run(*words)
    assert done.returncode == 0, done.stderr
    assert "sweep of 3 jobs, test split" in done.stdout
    (table,) = tmp_path.rglob("comparison.csv")
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [row["job"] for row in rows] == [f"method={method}" for method in methods]
    facts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(tmp_path.rglob("run.json"))]
    assert len({fact["data_fingerprint"] for fact in facts}) == 1
    assert len({fact["label_fingerprint"] for fact in facts}) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=lora", "+method.baseline.kind=majority"], "baseline.kind=majority uses no language model"),
        (["method=majority", "method.quantization=nf4"], "uses no language model: set method.learn=nothing"),
        (["method=tfidf_lr", "method.baseline.kind=svm"], "method.baseline"),
        (["method=tfidf_lr", "method.baseline.ngrams=[3,1]"], r"the shortest comes first: \[1, 3\]"),
        (["method=tfidf_lr", "method.baseline.strengths=[]"], "at least 1 item"),
        (["method=encoder", "method.baseline.hub_id=null"], "needs path"),
        (["method=textcnn", "stage=evaluate"], "method=textcnn must be trained before it can be scored"),
    ],
)
def test_incompatible_settings_are_refused(config: Compose, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*words)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["finfe_forum"])  # zh_news_mix takes half a minute and proves the same
def test_tfidf_reaches_the_known_scores(name: str, shared_data: Path, tmp_path: Path, config: Compose) -> None:
    words = ("method=tfidf_lr", "data=table", f"data.files={shared_data / name}", "tracking=none")
    found = train.run(config(*words, f"output_dir={tmp_path}")).metrics["test"]
    assert (found["accuracy"], found["macro_f1"]) == pytest.approx(KNOWN[name], abs=0.02)


@pytest.mark.parametrize("method", ["textcnn", "encoder"])
def test_an_instruction_that_leaves_no_room_for_the_input_is_refused(
    config: Compose, tmp_path: Path, method: str
) -> None:
    rows = [
        {"instruction": "判断" * 20, "input": f"第{n}条" + "跌涨"[n % 2] * 30, "output": "空多"[n % 2]}
        for n in range(40)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    words = (f"method={method}", *METHODS[method], "data=alpaca", f"data.files={tmp_path / 'rows.json'}")
    with pytest.raises(DataError, match=r"data\.max_length: in 40 rows \(train 32, validation 4, test 4\) the instr"):
        train.run(config(*words, "data.max_length=44", f"output_dir={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()
