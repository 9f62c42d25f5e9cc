"""model.inference=int8: receipts of evaluation and prediction, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from finsa.config import RunConfig
from finsa.errors import ConfigError, FinsaError
from finsa.evaluation import metrics
from finsa.inference import predictor, receipts
from finsa.stages import evaluate, predict

Compose = Callable[..., RunConfig]
INT8 = "model.inference=int8"


def test_an_evaluation_has_a_receipt(config: Compose, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("lora_response")
    words = ("stage=evaluate", "stage.split=validation", f"run={run}", "tracking=none", f"output_dir={tmp_path}")
    done, plain = (evaluate.run(config(*words, *more)) for more in ([INT8], []))
    assert done.run_dir is not None
    assert plain.run_dir is not None
    receipt = json.loads((done.run_dir / receipts.FILE).read_text())
    assert not (plain.run_dir / receipts.FILE).exists()
    assert set(receipt) == {
        "rows",
        "agreement",
        "largest_difference",
        "mean_difference",
        "macro_f1_difference",
        "macro_f1_interval",
    }
    assert receipt["agreement"] > 0.95
    assert 0 < receipt["largest_difference"] < 0.2
    low, high = receipt["macro_f1_interval"]
    assert low <= receipt["macro_f1_difference"] <= high
    rows = [
        [json.loads(line)["probs"] for line in (folder / "predictions.jsonl").open(encoding="utf-8")]
        for folder in (done.run_dir, plain.run_dir)
    ]
    first, second = (np.array([list(probs.values()) for probs in every]) for every in rows)
    assert np.abs(first - second).max() < 0.2


def test_a_receipt_counts_what_changed(trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = predictor.restore(str(trained("lora_response")), 4096)
    texts = ["公司净利润大幅增长", "公司亏损扩大", "公司召开会议", "订单减少"]
    labels = model(texts).probs.argmax(1)

    def turned() -> None:  # every score is that of the opposite label
        score = model.scorer.score
        monkeypatch.setattr(model.scorer, "score", lambda *given: -score(*given))

    monkeypatch.setattr(model, "quantize", turned)
    receipt = receipts.quantize(model, texts, labels.tolist())
    assert receipt["agreement"] == 0
    perfect = metrics.report(labels.tolist(), labels.tolist(), model.labels)["macro_f1"]
    worse = metrics.report(labels.tolist(), model(texts).probs.argmax(1).tolist(), model.labels)["macro_f1"]
    assert receipt["macro_f1_difference"] == pytest.approx(worse - perfect, abs=1e-6)


def test_a_text_and_a_file_have_receipts(
    config: Compose, trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"run={trained('lora_response')}"
    predict.run(config("stage=predict", run, INT8, 'text="公司净利润大幅增长"'))
    assert "int8 against float32 on this text: largest difference" in capsys.readouterr().out
    pl.DataFrame({"text": ["公司净利润大幅增长", "公司亏损扩大"]}).write_csv(tmp_path / "in.csv")
    output = tmp_path / "out.csv"
    predict.run(config("stage=predict", run, INT8, f"input={tmp_path / 'in.csv'}", f"output={output}"))
    assert pl.read_csv(output).height == 2
    receipt = json.loads((tmp_path / f"out.csv.{receipts.FILE}").read_text())
    assert receipt["rows"] > 50
    assert "macro_f1_interval" in receipt


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["stage=train", INT8], "only by predict, evaluate, serve"),
        (["stage=predict", "text=a", INT8, "run={tfidf_lr}"], "is for language models"),
        (
            ["stage=evaluate", "stage.protocol=generate", INT8, "run={lora_response}"],
            "leave stage.protocol=generate out",
        ),
    ],
)
def test_what_int8_does_not_do(config: Compose, trained: Callable[..., Path], words: list[str], reason: str) -> None:
    filled: list[Any] = [
        word.format(**{name: trained(name) for name in ("tfidf_lr", "lora_response") if name in word}) for word in words
    ]
    with pytest.raises(FinsaError, match=reason):
        stage = config(*filled)
        (predict if stage.stage.name == "predict" else evaluate).run(stage)


@pytest.mark.parametrize(
    ("update", "reason"),
    [({"quantization": "nf4"}, "which are quantized"), ({"baseline": "x"}, "is for language models")],
)
def test_methods_that_int8_refuses(trained: Callable[..., Path], update: dict[str, Any], reason: str) -> None:
    record = predictor.read(str(trained("lora_response")))
    method = record.cfg.method.model_copy(update=update)
    changed = predictor.Record(record.path, record.cfg.model_copy(update={"method": method}), {}, record.labels)
    with pytest.raises(ConfigError, match=reason):
        predictor.for_inference(changed, "int8")
    assert predictor.for_inference(changed, "auto") is changed
