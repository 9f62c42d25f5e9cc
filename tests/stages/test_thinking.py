"""A run that thinks: training on rationales, its folder, evaluation, prediction, service and report."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import services
from few import FEW

from finsa.config import RunConfig
from finsa.errors import ConfigError, DataError
from finsa.evaluation import report
from finsa.inference import predictor
from finsa.stages import check, evaluate, export, predict, train

Compose = Callable[..., RunConfig]
Runs = Callable[..., Path]
MARKS = "model.thought.marks=['<think>','</think>']"
THINK = ("model.think=open", MARKS, "model.thought.max_tokens=6", "model.dtype=float32", "tracking=none")
ROWS = "data.split.rows={train: 60, validation: 12, test: 20}"
SHORT = ("train=smoke", "train.max_steps=2", "train.batch_size=8", "stage.compare_base=false")


@pytest.fixture(scope="module")
def thinking(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of a run by its settings; one per module."""
    base, known = tmp_path_factory.mktemp("thinking"), dict[tuple[str, ...], Path]()

    def of(*words: str) -> Path:
        if words not in known:
            folder = train.run(config(*words, *THINK, FEW, ROWS, f"output_dir={base}")).run_dir
            assert folder is not None
            known[words] = folder
        return known[words]

    return of


def _predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def _facts(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return facts


@pytest.fixture(scope="module")
def rationales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the few rows, in which most training rows have a rationale."""
    folder, source = tmp_path_factory.mktemp("rationales"), Path(FEW.partition("=")[2])
    for name in ("train", "valid", "test"):
        with (source / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for number, row in enumerate(rows if name == "train" else ()):
            row["rationale"] = "" if number % 3 == 0 else f"看{row['label']}"
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.mark.parametrize("method", ["zero_shot", "lora_response"])
def test_every_stage_has_the_thoughts_of_the_run(
    thinking: Runs, config: Compose, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = thinking(f"method={method}", *SHORT, "model.thought.samples=2")
    rows, facts = _predictions(run), _facts(run)
    assert all(len(row["thought"]) == 2 for row in rows)
    assert 0 < facts["thought_tokens"] <= 12
    assert 0 <= facts["thoughts_cut"] <= 1
    again = evaluate.run(config("stage=evaluate", f"run={run}", "tracking=none", f"output_dir={tmp_path}")).run_dir
    assert again is not None
    assert _predictions(again) == rows
    assert _facts(again)["thought_tokens"] == facts["thought_tokens"]
    model = predictor.restore(str(run), 16384)
    answers = model([row["text"] for row in rows])
    assert answers.thoughts == [row["thought"] for row in rows]
    assert np.abs(answers.log_probs - np.array([list(row["log_probs"].values()) for row in rows])).max() < 1e-3
    source, output = tmp_path / "texts.jsonl", tmp_path / "labeled.jsonl"
    lines = [json.dumps({"text": row["text"], "thought": "given"}, ensure_ascii=False) for row in rows]
    source.write_text("\n".join(lines), encoding="utf-8")
    predict.run(config("stage=predict", f"run={run}", f"input={source}", f"output={output}", "stage.chunk=7"))
    labeled = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["predicted_thought"] for row in labeled] == ["\n\n".join(row["thought"]) for row in rows]
    capsys.readouterr()
    predict.run(config("stage=predict", f"run={run}", f"text='{rows[0]['text']}'"))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("thought: ")] == [
        f"thought: {text}" for text in rows[0]["thought"]
    ]


def test_the_report_has_the_price_beside_the_scores(thinking: Runs, config: Compose, tmp_path: Path) -> None:
    runs = [thinking("method=zero_shot", *SHORT, "model.thought.samples=2"), thinking("method=zero_shot", *SHORT)]
    words = (
        "method=zero_shot",
        "model.think=closed",
        "model.dtype=float32",
        MARKS,
        FEW,
        ROWS,
        *SHORT,
        "tracking=none",
        f"output_dir={tmp_path}",
    )
    closed = train.run(config(*words)).run_dir
    assert closed is not None
    stage = config("stage=report", f"runs={runs[0]}").stage
    for paths, priced in (([*runs, closed], True), ([closed], False)):
        built = report.build(paths, stage, None, {})  # type: ignore[arg-type]
        for name in ("scores", "costs"):
            assert ("thought tokens per answer" in built.tables[name].columns) == priced
    built = report.build([*runs, closed], stage, None, {})  # type: ignore[arg-type]
    table = built.tables["scores"]
    column = list(table.columns).index("thought tokens per answer")
    shown = {row[0]: row[column] for row in table.rows}
    assert set(shown) == {
        "zero_shot model.think=closed",
        *(f"zero_shot model.think=open model.thought.samples={samples}" for samples in (1, 2)),
    }
    assert sorted(shown.values()) == sorted(["-", *(f"{_facts(run)['thought_tokens']:.1f}" for run in runs)])


def test_rationales_are_trained_on(
    rationales: Path, config: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("method=lora_response", *SHORT, *THINK, f"data.files={rationales}", ROWS, f"output_dir={tmp_path}")
    train.run(config(*words, "data.columns.rationale=rationale"))
    found = capsys.readouterr().out
    missing = int(found.split("note: ")[1].split(" of 60 training rows have no rationale")[0])
    assert 5 < missing < 40
    with pytest.raises(DataError, match=r"no training row has a text in the column 'reason'"):
        train.run(config(*words, "data.columns.rationale=reason"))
    mark = "model.thought.marks=['<think>','看']"
    with pytest.raises(DataError, match=r"\d+ of 60 rationales contain 看, which ends a thought"):
        train.run(config(*words, mark, "data.columns.rationale=rationale"))
    check.run(config("stage=check", *words[:2], f"data.files={rationales}", ROWS, "data.columns.rationale=rationale"))
    assert "data.columns.rationale is not used: needs model.think=open" in capsys.readouterr().out


def test_the_loss_of_a_row_is_on_its_rationale_and_answer(rationales: Path, config: Compose, tokenizer: Any) -> None:
    from finsa.data import dataset, tokenized
    from finsa.data.rows import IGNORE

    cfg = config(*THINK, f"data.files={rationales}", "data.columns.rationale=rationale")
    data = tokenized.build(cfg, dataset.load(cfg.data), tokenizer)
    rows, written = data.training_rows(cfg), data.rationales()
    for at in range(12):
        row, text = rows[at], written[rows.order[at]]
        trained = tokenizer.decode([token for token in row["labels"] if token != IGNORE])
        label = data.dataset.labels.words[rows.gold[rows.order[at]]]
        whole = f"{text[:6]}\n</think>\n\n{label}{tokenizer.eos_token}"
        assert trained == (whole if text else f"{label}{tokenizer.eos_token}")
    plain = config(*THINK[1:], f"data.files={rationales}")
    without = dataset.load(plain.data).fingerprint
    assert data.dataset.fingerprint != without
    assert dataset.load(config(FEW).data).fingerprint == without


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.think=open", "model.prompt=chat"), "has no thoughts (<think>)"),
        (("model.think=open",), "a plain prompt has no thoughts (<think>)"),
        ((*THINK[:2], "model.thought.max_tokens=2000"), "set model.thought.max_tokens=848 or less"),
        ((*THINK[:3], "method=classifier"), "reads the text and no thought"),
        ((*THINK[:3], "method=lora_label"), "trains no thought; choose method=lora_response"),
        ((*THINK[:3], "stage=moe_joint"), "a mixture of experts writes no thoughts"),
        (
            (*THINK[:3], "model.thought.samples=2", "model.thought.temperature=0"),
            "samples of temperature=0 are all equal",
        ),
        (("method=grpo",), "set model.think=open"),
    ],
)
def test_what_cannot_think_says_so_before_weights_are_loaded(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = commands.run(*words, FEW, "tracking=none", f"output_dir={tmp_path}", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert "loading" not in done.stdout + done.stderr


def test_the_service_returns_the_thoughts(thinking: Runs, config: Compose, tmp_path: Path) -> None:
    run = thinking("method=zero_shot", *SHORT, "model.thought.samples=2")
    row = _predictions(run)[0]
    with services.serving(services.stage_of(config), predictor.restore(str(run), 16384), tmp_path) as service:
        answer = service.client.post("/predict", json={"text": row["text"]}).json()
    assert (answer["prediction"], answer["thoughts"]) == (row["label"], row["thought"])
    with services.serving(services.stage_of(config), services.Reader(), tmp_path) as service:
        assert not service.client.post("/predict", json={"text": "大涨"}).json().get("thoughts")


def test_formats_without_generation_are_refused(thinking: Runs, config: Compose, tmp_path: Path) -> None:
    run = thinking("method=lora_response", *SHORT, "model.thought.samples=2")
    for form in ("onnx", "classifier"):
        with pytest.raises(ConfigError, match=f"{form} computes scores and writes no thoughts"):
            export.run(config("stage=export", f"run={run}", f"format={form}", f"output={tmp_path / 'x'}"))
    words = ("stage=export", f"run={run}", "format=merged", f"output={tmp_path / 'merged'}", "stage.timed=1")
    export.run(config(*words, "tracking=none"))
    receipt = json.loads((tmp_path / "merged" / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["agreement"] == 1
