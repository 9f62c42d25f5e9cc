"""A run whose prompt asks for a target: whatever uses the run reads it; the report shows what the target is worth."""

from __future__ import annotations

import csv
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest

from finsa.config import RunConfig
from finsa.errors import ConfigError, DataError
from finsa.evaluation import report
from finsa.stages import evaluate, export, predict, train

Compose = Callable[..., RunConfig]
UP, DOWN = (
    ("{up}大涨，{down}大跌", "{down}亏损，{up}盈利", "{up}获利好，{down}遇利空"),
    ("甲公司", "乙银行", "丙股份", "丁集团"),
)
ASKING = "data.prompt='文本：{text}\n公司：{target}\n情感：'"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headlines about two companies with opposite labels, and a few about one."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [(up, down) for up in DOWN for down in DOWN if up != down]
    for number, split in enumerate(("train", "valid", "test")):
        lines = []
        for up, down in pairs:
            text = UP[number].format(up=up, down=down)
            lines += [
                {"headline": text, "company": name, "label": label} for name, label in ((up, "利好"), (down, "利空"))
            ]
        lines += [{"headline": f"{name}盈利{number}", "company": name, "label": "利好"} for name in DOWN]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(rows: Path, shallow: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    base = tmp_path_factory.mktemp("runs")
    return (
        *(
            "data=table",
            f"data.files={rows}",
            "data.columns.text=headline",
            "data.columns.target=company",
            "data.labels=['利空','利好']",
        ),
        *("data.max_length=64", "data.cache=null", "train=smoke", "train.max_steps=6", "tracking=none"),
        *("stage.compare_base=false", "model.dtype=float32", *shallow, f"output_dir={base}"),
    )


@pytest.fixture(scope="module")
def run(config: Compose, settings: tuple[str, ...]) -> Path:
    folder = train.run(config(*settings, ASKING)).run_dir
    assert folder is not None
    return folder


def _predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_predictions_have_the_target_and_depend_on_it(run: Path, rows: Path) -> None:
    given = [json.loads(line) for line in (rows / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    found = _predictions(run)
    assert [(row["text"], row["target"], row["gold"]) for row in found] == [tuple(row.values()) for row in given]
    pairs = list(zip(found[0:24:2], found[1:24:2], strict=True))
    assert all(one["text"] == other["text"] and one["probs"] != other["probs"] for one, other in pairs)


def test_evaluate_a_file_and_one_text_give_the_predictions_of_the_run(
    config: Compose, run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _predictions(run)
    again = evaluate.run(config("stage=evaluate", f"run={run}", "tracking=none", f"output_dir={tmp_path}")).run_dir
    assert again is not None
    assert _predictions(again) == found
    words = ("stage=predict", f"run={run}", f"input={rows / 'test.jsonl'}", f"output={tmp_path / 'out.csv'}")
    predict.run(config(*words))
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    assert [row["predicted_label"] for row in answers] == [row["label"] for row in found]
    assert [float(row["p_利好"]) for row in answers] == pytest.approx([row["probs"]["利好"] for row in found], abs=1e-5)
    capsys.readouterr()
    predict.run(config("stage=predict", f"run={run}", f"text='{found[0]['text']}'", f"target='{found[0]['target']}'"))
    shown = capsys.readouterr().out
    assert re.search(rf"利好 +│? *{found[0]['probs']['利好']:.4f}", shown.replace("│", " "))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("text='甲公司大涨'",), "target: the prompt of this run asks for the target of the text"),
        (("text='甲公司大涨'", "target=' '"), "target: the prompt of this run asks for the target of the text"),
    ],
)
def test_a_text_without_its_target_is_refused(config: Compose, run: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        predict.run(config("stage=predict", f"run={run}", *words))


def test_a_target_that_is_not_used_is_refused(
    config: Compose, trained: Callable[..., Path], run: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="target: the prompt of this run does not ask for a target"):
        predict.run(config("stage=predict", f"run={trained('lora_response')}", "text='涨'", "target='甲'"))
    with pytest.raises(ConfigError, match=r"target belongs to text=\.\.\."):
        config("stage=predict", f"run={run}", "input=x.csv", f"output={tmp_path / 'y.csv'}", "target='甲'")


def test_rows_without_a_target_are_rejected(
    config: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("headline,company\n甲公司大涨,甲公司\n乙银行大跌,\n", encoding="utf-8")
    done = predict.run(config("stage=predict", f"run={run}", f"input={file}", f"output={tmp_path / 'out.jsonl'}"))
    assert (done.metrics["rows"], done.metrics["answered"], done.metrics["rejected"]) == (1, 1, 1)
    shown = capsys.readouterr().out
    assert "predicted 1 row in " in shown
    assert "rejected rows: 1 (" in shown
    assert "wrote 1 row to " in shown
    rejected = json.loads((tmp_path / "out.jsonl.rejected.jsonl").read_text(encoding="utf-8"))
    assert (rejected["line"], rejected["reason"]) == (3, "no target in the field 'company'")


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.csv", "headline\n甲涨\n"), ("rows.jsonl", '{"headline": "甲涨"}\n'), ("rows.txt", "甲涨\n乙跌\n")],
)
def test_a_file_without_the_column_of_the_target_is_refused(
    config: Compose, run: Path, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    words = ("stage=predict", f"run={run}", f"input={tmp_path / name}", f"output={tmp_path / 'out.csv'}")
    with pytest.raises(DataError, match=f"{name} has no column 'company', with the targets that the prompt"):
        predict.run(config(*words))
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("form", ["merged", "onnx"])
def test_exports_answer_as_the_run_and_their_card_shows_how(
    config: Compose, run: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("stage=export", f"run={run}", f"format={form}", f"output={tmp_path / form}", "stage.timed=1")
    export.run(config(*words, "tracking=none"))
    receipt = json.loads((tmp_path / form / "receipt.json").read_text(encoding="utf-8"))
    assert (receipt["agreement"], receipt["rows"]) == (1.0, 28)
    first, *_ = _predictions(run)
    card = (tmp_path / form / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / form)
    defined: dict[str, Any] = {}
    exec(code, defined)  # the documented way to use the export without finsa
    assert defined["probabilities"](first["text"], first["target"]) == pytest.approx(first["probs"], abs=1e-4)


def test_a_classifier_has_no_place_for_a_target(config: Compose, run: Path, tmp_path: Path) -> None:
    words = ("stage=export", f"run={run}", "format=classifier", f"output={tmp_path / 'x'}", "tracking=none")
    with pytest.raises(ConfigError, match="this prompt also has a target; choose format=onnx"):
        export.run(config(*words))


def test_the_service_reads_rows_with_a_target(run: Path, tmp_path: Path) -> None:
    found = _predictions(run)[:3]
    with commands.serving(tmp_path, f"run={run}") as (process, client):
        bodies = [{"text": row["text"], "target": row["target"]} for row in found]
        singles = [client.post("/predict", json=body).json() for body in bodies]
        batch = client.post("/predict/batch", json={"rows": bodies}).json()["predictions"]
        refused = [
            client.post("/predict", json={"text": "甲公司大涨"}),
            client.post("/predict", json={"text": "甲公司大涨", "target": 3}),
            client.post("/predict/batch", json={"texts": ["甲公司大涨"]}),
        ]
        model, page = client.get("/model").json(), client.get("/").text
        process.signal(signal.SIGTERM)
        assert process.wait(30) == 0
    for row, single, one in zip(found, singles, batch, strict=True):
        assert (single["input"], single["target"]) == (one["input"], one["target"]) == (row["text"], row["target"])
        assert single["probs"] == pytest.approx(row["probs"], abs=1e-4)
        assert one["probs"] == pytest.approx(row["probs"], abs=1e-4)
    assert [(answer.status_code, answer.json()["error"]) for answer in refused] == [
        (422, "no target in the field 'target'"),
        (422, "the target is not a string but int in the field 'target'"),
        (422, 'texts: this model needs a target for each text; send {"rows": [{"text", "target"}]}'),
    ]
    assert (model["target"], model["rows"]) == (True, ["headline and company"])
    assert 'id="target"' in page


def test_the_report_compares_on_texts_whose_targets_have_different_labels(
    config: Compose, run: Path, settings: tuple[str, ...]
) -> None:
    """A method that does not read the target cannot classify both rows of a text correctly."""
    blind = train.run(config(*settings, "data.name=blind", "data.prompt='文本：{text}\n情感：'")).run_dir
    assert blind is not None
    built = report.build([run, blind], config("stage=report", f"runs={run}").stage, None, {})  # type: ignore[arg-type]
    table = built.tables["targets"]
    assert table.caption.startswith("The 24 test rows whose text has several targets with different labels.")
    by_name = {row[0]: row for row in table.rows}
    (without,) = (row for name, row in by_name.items() if "blind" in name)
    assert without[1].startswith("0.5000")
    assert len(by_name) == 2
