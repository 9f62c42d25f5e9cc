"""Numbers and several labels: every stage reads a run of them in the same way, and its reports agree."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import numpy as np
import polars as pl
import pytest
import torch

from finsa.config import RunConfig
from finsa.data import dataset, tokenized, values
from finsa.errors import ConfigError
from finsa.evaluation import examples, report, value_metrics
from finsa.inference import model_cards, predictor
from finsa.inference.export import PooledGraph
from finsa.models import tokenizers
from finsa.session import Job, Session
from finsa.stages import evaluate, export, inspect, predict, search, train

Compose = Callable[..., RunConfig]
MOVES = {"暴涨": 0.9, "上涨": 0.5, "持平": 0.0, "下跌": -0.4, "暴跌": -0.9}
TOPICS = {"股价": "股价{move}", "风险": "公司遭调查", "分红": "拟派现金红利"}
TASKS = {
    "regression": (
        *("data.task=regression", "data.columns.label=score", "data.labels={-1: '利空', 0: '中性', 1: '利好'}"),
        "data.prompt='文本：{text}\n情感：'",
    ),
    "multi_label": (
        *("data.task=multi_label", "data.columns.label=topics", "data.labels=['股价','风险','分红']"),
        *("data.answers=['{label}：是','{label}：否']", "data.prompt='文本：{text}\n涉及'"),
    ),
}
METHODS = {
    "regression": ("lora_label", "regression_head", "tfidf_lr", "textcnn", "majority"),
    "multi_label": ("lora_label", "classifier", "tfidf_lr", "textcnn", "majority"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose words determine a number and a set of labels."""
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(1)
    for split, count in (("train", 128), ("valid", 40), ("test", 40)):
        lines = []
        for number in range(count):
            move, topics = draw.choice(list(MOVES)), [name for name in TOPICS if draw.random() < 0.5]
            parts = [TOPICS[name].format(move=move) for name in topics]
            text = f"{split}{number}，今日{move}，" + "，".join(parts)
            lines.append({"id": f"{split}{number}", "text": text, "score": MOVES[move], "topics": topics})
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(config: Compose, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a finished run of a task and method."""
    done: dict[tuple[str, str], Path] = {}

    def of(task: str, method: str) -> Path:
        if (task, method) not in done:
            words = ("data=table", *TASKS[task], f"data.files={rows}", "data.max_length=80", "data.cache=null")
            more = ("train.max_steps=30", "train.validate_every=15", "train.learning_rate=3e-3", "model.dtype=float32")
            base = tmp_path_factory.mktemp(f"{task}_{method}")
            folder = train.run(
                config(
                    *(*words, *more, f"method={method}", "tracking=none", "stage.compare_base=false"),
                    f"output_dir={base}",
                )
            ).run_dir
            assert folder is not None
            done[task, method] = folder
        return done[task, method]

    return of


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def _test_scores(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]
    return values


@pytest.mark.parametrize("method", METHODS["regression"])
def test_the_scores_of_numbers_are_those_of_the_predictions(runs: Callable[..., Path], method: str) -> None:
    run = runs("regression", method)
    lines, scores = _lines(run), _test_scores(run)
    true, guess = (np.array([[line[key]] for line in lines]) for key in ("gold", "number"))
    for name, value in value_metrics.values("regression", true, guess).items():
        assert scores[name] is None if np.isnan(value) else scores[name] == pytest.approx(value, abs=1e-5), name
    if method == "lora_label":
        expected = [line["probs"]["利好"] - line["probs"]["利空"] for line in _renamed(lines)]
        assert [line["number"] for line in lines] == pytest.approx(expected, abs=1e-5)
    if method in ("lora_label", "regression_head", "tfidf_lr"):  # the words determine the number
        assert scores["rmse"] < 0.8 * _test_scores(runs("regression", "majority"))["rmse"]


@pytest.mark.parametrize("method", ["majority", "tfidf_lr", "lora_label"])
def test_undefined_correlations_are_null_in_strict_json(runs: Callable[..., Path], method: str) -> None:
    run = runs("regression", method)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)
    log = run / "log.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        assert None not in json.loads(line, parse_constant=refuse).values()
    assert (metrics["validation"]["pearson"] is None) == (method == "majority")


def _renamed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    words = {"-1": "利空", "0": "中性", "1": "利好"}
    return [{**line, "probs": {words[name]: prob for name, prob in line["probs"].items()}} for line in lines]


@pytest.mark.parametrize("method", METHODS["multi_label"])
def test_the_scores_of_sets_are_those_of_the_predictions(runs: Callable[..., Path], method: str) -> None:
    run = runs("multi_label", method)
    lines, scores = _lines(run), _test_scores(run)
    thresholds = json.loads((run / "run.json").read_text(encoding="utf-8"))["calibration"]["thresholds"]
    for line in lines:
        assert line["label"] == [name for name in TOPICS if line["probs"][name] > thresholds[name] - 1e-6]
    true, guess = (np.array([[float(n in line[key]) for n in TOPICS] for line in lines]) for key in ("gold", "label"))
    for name, value in value_metrics.values("multi_label", true, guess).items():
        assert scores[name] == pytest.approx(value), name
    if method != "majority":
        assert scores["macro_f1"] > 0.1 + _test_scores(runs("multi_label", "majority"))["macro_f1"]


def _sets(data: dataset.Dataset) -> tuple[pl.Series, pl.Series]:
    """The texts of a data set, and their labels."""
    rows = pl.concat(data.splits.values())
    names = data.labels.names
    sets = [[name for name, has in zip(names, row, strict=True) if has] for row in rows[values.VALUES]]
    return rows["text"], pl.Series(sets)


@pytest.mark.parametrize(
    ("task", "method"), [("regression", "lora_label"), ("regression", "tfidf_lr"), ("multi_label", "lora_label")]
)
def test_evaluation_file_and_service_repeat_the_predictions(
    config: Compose, runs: Callable[..., Path], rows: Path, tmp_path: Path, task: str, method: str
) -> None:
    run = runs(task, method)
    lines = _lines(run)
    again = evaluate.run(config("stage=evaluate", f"run={run}", "tracking=none", f"output_dir={tmp_path}")).run_dir
    assert again is not None
    assert again.name.partition("_evaluate_")[2] == run.name.partition("_train_")[2]  # method, model and data
    assert _lines(again) == lines
    assert _test_scores(again) == _test_scores(run)
    output = tmp_path / "out.csv"
    predict.run(config("stage=predict", f"run={run}", f"input={rows / 'test.jsonl'}", f"output={output}"))
    with output.open(encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    with commands.serving(tmp_path / "service", f"run={run}") as (_, client):
        served = client.post("/predict/batch", json={"texts": [line["text"] for line in lines]}).json()["predictions"]
        metrics = client.get("/metrics").text
    if task == "regression":
        numbers = [line["number"] for line in lines]
        assert [float(row["number"]) for row in answers] == pytest.approx(numbers, abs=1e-4)
        assert [one["number"] for one in served] == pytest.approx(numbers, abs=1e-4)
        assert "label" not in answers[0]
        assert 'label="number"' in metrics  # one series, whatever the numbers
    else:
        assert [json.loads(row["label"]) for row in answers] == [line["label"] for line in lines]
        keep = ("method=lora_label", "data.on_duplicate=keep", "data.on_conflict=keep", "data.columns.label=label")
        for form in ("csv", "jsonl", "parquet"):
            written = output.with_suffix(f".{form}")
            if form != "csv":
                predict.run(config("stage=predict", f"run={run}", f"input={rows / 'test.jsonl'}", f"output={written}"))
            read = dataset.load(config("data=table", *TASKS[task], f"data.files={{train: '{written}'}}", *keep).data)
            assert sum(part.height for part in read.splits.values()) == len(lines)
            found = dict(zip(*(column.to_list() for column in _sets(read)), strict=True))
            assert found == {line["text"]: line["label"] for line in lines}
        assert [] in found.values()
        assert [one["labels"] for one in served] == [line["label"] for line in lines]
        assert served[0]["probs"] == pytest.approx(lines[0]["probs"], abs=1e-4)


@pytest.mark.parametrize(
    ("task", "method", "form"),
    [
        *(("regression", "lora_label", "merged"), ("regression", "regression_head", "merged")),
        *(("multi_label", "lora_label", "onnx"), ("multi_label", "classifier", "merged")),
    ],
)
def test_an_export_predicts_as_its_run_and_its_card_too(
    config: Compose, runs: Callable[..., Path], tmp_path: Path, task: str, method: str, form: str
) -> None:
    run = runs(task, method)
    words = ("stage=export", f"run={run}", f"format={form}", f"output={tmp_path / 'out'}", "stage.timed=1")
    receipt = export.run(config(*words)).metrics["receipt"]
    assert receipt["agreement"] == 1
    assert receipt["largest_difference"] < 1e-3
    if method == "regression_head":
        card = " ".join((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split())
        assert "The number is the output of the head, clipped to the range from -1 to 1." in card
    measure = "rmse" if task == "regression" else "macro_f1"
    assert receipt["run"][measure] == pytest.approx(receipt["export"][measure], abs=1e-5)
    text = _lines(run)[0]["text"]
    one, other = (predictor.restore(str(folder), 1000)([text]) for folder in (run, tmp_path / "out"))
    assert one.values == pytest.approx(other.values, abs=1e-3)
    if method == "lora_label" or form == "onnx":
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        code = card.split("```python\n")[1].split("```")[0]
        code = code[: code.rindex("print(")].replace('"."', f'"{tmp_path / "out"}"').replace('"model.onnx"', "GRAPH")
        scope: dict[str, Any] = {"GRAPH": str(tmp_path / "out" / "model.onnx")}
        exec(code, scope)
        if task == "regression":
            assert scope["number"](text) == pytest.approx(float(other.values[0, 0]), abs=1e-4)  # type: ignore[index]
        else:
            probs = dict(zip(other.labels, other.probs[0].tolist(), strict=True))
            assert scope["probabilities"](text) == pytest.approx(probs, abs=1e-4)


@pytest.mark.parametrize(("task", "method"), [("regression", "regression_head"), ("multi_label", "classifier")])
def test_the_graph_of_a_head_has_the_outputs_of_its_run(runs: Callable[..., Path], task: str, method: str) -> None:
    run = runs(task, method)
    with_head = predictor.restore(str(run), 1000)
    renderer, text = with_head.renderer, _lines(run)[0]["text"]
    assert renderer is not None
    prompt = renderer.until_text_end(renderer.encode([text])[0])
    graph = PooledGraph(with_head.model, renderer, with_head.temperature).eval()
    with torch.no_grad():
        scores, probs = graph(torch.tensor([[*prompt, 0, 0]]), torch.tensor([len(prompt)]))
    found = with_head([text])
    assert scores.numpy() == pytest.approx(found.log_probs, abs=1e-4)
    assert probs.numpy() == pytest.approx(found.log_probs if task == "regression" else found.probs, abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_a_sequence_classifier_and_generated_answers_are_refused(
    config: Compose, runs: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    run, place = runs(task, "lora_label"), f"output_dir={tmp_path}"
    with pytest.raises(ConfigError, match=f"one class per text, and this is {task}; choose format=onnx"):
        export.run(config("stage=export", f"run={run}", "format=classifier", f"output={tmp_path / 'x'}"))
    with pytest.raises(ConfigError, match=f"generate needs one class per row, and this is task={task}"):
        evaluate.run(config("stage=evaluate", f"run={run}", "stage.protocol=generate", "tracking=none", place))


@pytest.mark.parametrize("task", TASKS)
def test_a_report_ranks_and_tests_the_runs(
    config: Compose, runs: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    folders = [runs(task, method) for method in METHODS[task]]
    stage: Any = config("stage=report", f"runs={folders[0]}").stage
    made = report.build(folders, stage, None, {})
    report.write(made, tmp_path)
    assert made.comparison is not None
    measure, order = ("rmse", 1) if task == "regression" else ("macro_f1", -1)
    records = made.comparison.records
    values = [record[measure] for record in records]
    assert values == sorted(values, key=lambda value: order * value)
    by_name = {record["arm"]: record for record in records}
    for method, folder in zip(METHODS[task], folders, strict=True):
        scores = _test_scores(folder)
        assert by_name[method][measure] == pytest.approx(scores[measure], abs=1e-5)
        assert [by_name[method][f"{measure}_low"], by_name[method][f"{measure}_high"]] == scores["intervals"][measure]
    worst = by_name["majority"]
    assert worst["vs_best_difference"] == pytest.approx(worst[measure] - values[0])
    assert worst["vs_best_verdict"] == "worse"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "figures/scores.png" in page
    assert (tmp_path / "figures" / "scores.png").stat().st_size > 5000
    assert "confusion" not in page
    assert ("By class" in page) == (task == "multi_label")


@pytest.mark.parametrize("task", TASKS)
def test_the_page_of_a_run(runs: Callable[..., Path], task: str) -> None:
    run = runs(task, "lora_label")
    page, scores = (run / "index.html").read_text(encoding="utf-8"), _test_scores(run)
    assert f"{scores['rmse' if task == 'regression' else 'macro_f1']:.4f}" in page
    assert ("Largest errors" in page, "Predicted by true number" in page) == (task == "regression",) * 2
    assert (" mistakes, the most confident first" in page) == (task == "multi_label")
    assert (run / "numbers.png").is_file() == (task == "regression")
    assert not (run / "confusion_matrix.png").exists()


def test_inspection_counts_a_row_for_each_of_its_labels(config: Compose, rows: Path, tmp_path: Path) -> None:
    words = (*TASKS["multi_label"], f"data.files={rows}", "data.max_length=80", "data.cache=null")
    found = inspect.run(config("stage=inspect", "data=table", *words, f"output_dir={tmp_path}")).run_dir
    assert found is not None
    given = [json.loads(line) for line in (rows / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    of_train = json.loads((found / "inspect.json").read_text(encoding="utf-8"))["splits"]["train"]
    assert of_train["rows"] == len(given)
    assert of_train["labels"] == {name: sum(name in row["topics"] for row in given) for name in TOPICS}
    every = [json.loads(line) for file in rows.glob("*.jsonl") for line in file.read_text("utf-8").splitlines()]
    trait = json.loads((found / "inspect.json").read_text(encoding="utf-8"))["traits"][0]
    of_trait = {one["label"]: one["rows"] for one in trait["classes"]}
    assert of_trait == {name: sum(name in row["topics"] for row in every) for name in TOPICS}


def test_inspection_shows_the_labels_of_a_row_and_one_question_about_them(config: Compose, rows: Path) -> None:
    cfg = config("data=table", *TASKS["multi_label"], f"data.files={rows}", "data.max_length=80", "method=lora_label")
    given = {row["id"]: row["topics"] for row in map(json.loads, (rows / "test.jsonl").open(encoding="utf-8"))}
    job = tokenized.build(cfg, dataset.load(cfg.data), tokenizers.load_tokenizer(cfg.model))
    shown = [one for one in examples.examples(job, cfg, 6) if one.split == "test"]
    assert len(shown) == 6
    for one in shown:
        assert one.label == ("; ".join(given[one.id]) or "no label")
        answer = "".join(piece.text for part in one.segments if part.part == "answer" for piece in part.pieces)
        name, _, said = answer.partition("：")
        assert said == ("是" if name in given[one.id] else "否")


def test_a_search_for_numbers_keeps_the_smallest_error(config: Compose, rows: Path, tmp_path: Path) -> None:
    words = ["data=table", *TASKS["regression"], f"data.files={rows}", "data.cache=null", "method=tfidf_lr"]
    words += ["stage.space=[{key: method.baseline.min_rows, values: [1,2,40,90]}]", "stage.trials=4", "tracking=none"]
    job = Job(("stage=search", *words), {}, (), tmp_path, None, 0)
    found = search.run(config("stage=search", *words, f"output_dir={tmp_path}"), Session(job)).run_dir
    assert found is not None
    result = json.loads((found / "search.json").read_text(encoding="utf-8"))
    errors = [trial["rmse"] for trial in result["trials"]]
    assert len(set(errors)) > 1
    assert result["best"]["rmse"] == min(errors)


def test_numbers_have_seven_significant_digits_and_their_range_has_thousands(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    values = np.array([[123456.7891234], [-1.23456789e-7]])
    shown = predictor.Predictions((), values, values, [False, False], task="regression", values=values)
    assert shown.numbers == {"number": [123456.8, -1.234568e-07]}
    run = runs("regression", "regression_head")
    model = predictor.restore(str(run), 1000)
    assert model.renderer is not None
    model.renderer.labels = replace(model.renderer.labels, names=("-0.5", "0", "1000000"))
    model_cards.write(tmp_path, "merged", model.cfg, run, model.facts, model.renderer)
    card = " ".join((tmp_path / "README.md").read_text(encoding="utf-8").split())
    assert "clipped to the range from -0.5 to 1,000,000." in card
