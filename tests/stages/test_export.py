"""Every export predicts as the run does and reports it in its receipt; impossible exports are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llama
import numpy as np
import polars as pl
import pytest
import torch
import yaml

from finsa.config import ExportStage, RunConfig
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import Renderer
from finsa.errors import ConfigError, FinsaError, ModelError, RunError
from finsa.inference import export as exporting
from finsa.inference import predictor, receipts
from finsa.models import base
from finsa.stages import evaluate, export, predict

Compose = Callable[..., RunConfig]
Trained = Callable[..., Path]
SHORT = ("stage=export", "stage.rows=50", "stage.timed=3")
# Largest difference of a probability. int8 is held to its own default (measured: 0.05), and may answer a few rows
# differently: the run is hardly trained, so some of its scores are close.
FORMATS = {
    "merged": ("format=merged", 1e-5),
    "adapter": ("format=adapter", 1e-6),
    "classifier": ("format=classifier", 1e-5),
    "onnx": ("format=onnx", 1e-5),
    "onnx_int8": ("format=onnx stage.precision=int8 stage.agreement=0.95", 0.1),
}
if llama.INSTALLED or llama.REQUIRED:
    FORMATS["gguf"] = ("format=gguf", 1e-4)


@pytest.fixture(scope="module")
def texts(project: Path) -> list[str]:
    rows = pl.read_csv(project / "data" / "sample" / "test.csv")["text"].to_list()[:40]
    return [*rows, "亏损" * 200, "<|im_end|> 涨停 ABC 3.5%"]


@pytest.fixture(scope="module", autouse=True)
def _one_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache the traced model, which takes most of the time and is the same for two of the formats."""
    real, base = torch.onnx.export, tmp_path_factory.mktemp("graph")

    def once(graph: Any, inputs: Any, file: Path, **words: Any) -> None:
        kept = base / type(graph).__name__
        kept.mkdir(exist_ok=True)
        if not any(kept.iterdir()):
            real(graph, inputs, kept / file.name, **words)
        for part in kept.iterdir():
            shutil.copy2(part, file.with_name(part.name))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.onnx, "export", once)
        yield


@pytest.fixture(scope="module")
def export_of(
    config: Compose, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """The folder of a method's run in a format, which is written once."""
    base = tmp_path_factory.mktemp("exports")

    @cache
    def of(method: str, name: str) -> Path:
        folder = base / f"{method}_{name}"
        export.run(config(*SHORT, f"run={trained(method)}", f"output={folder}", *FORMATS[name][0].split()))
        return folder

    return of


@pytest.fixture(scope="module")
def answers(trained: Trained, texts: list[str]) -> predictor.Predictions:
    """Those of the run."""
    return predictor.restore(str(trained("lora_response")), 4096)(texts)


@pytest.fixture(params=FORMATS)
def exported(request: Any, trained: Trained, export_of: Callable[[str, str], Path]) -> tuple[str, Path, Path]:
    """A format, its folder, and the run's."""
    return request.param, export_of("lora_response", request.param), trained("lora_response")


def test_the_receipt_matches_the_two_folders(exported: tuple[str, Path, Path]) -> None:
    name, folder, _ = exported
    receipt = json.loads((folder / receipts.FILE).read_text())
    assert receipt["rows"] == 50
    assert receipt["largest_difference"] <= FORMATS[name][1]
    assert receipt["agreement"] == 1 or name == "onnx_int8"
    assert receipt["run"]["type"] == "float32"
    assert receipt["export"]["type"] == ("int8" if name == "onnx_int8" else "float32")
    assert receipt["export"]["milliseconds"] > 0
    assert 0 < receipt["export"]["bytes"] < receipt["run"]["bytes"] * 1.1
    if name != "onnx_int8":
        assert receipt["run"]["macro_f1"] == receipt["export"]["macro_f1"]


def test_an_export_is_restored_alone_and_answers_as_the_run(
    exported: tuple[str, Path, Path],
    texts: list[str],
    answers: predictor.Predictions,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    name, folder, _ = exported
    monkeypatch.chdir(tmp_path)
    found, wanted = predictor.restore(str(folder), 4096)(texts), answers
    assert found.labels == wanted.labels
    assert found.truncated == wanted.truncated
    assert found.truncated[-2:] == [True, False]
    assert found.probs == pytest.approx(wanted.probs, abs=max(2e-5, FORMATS[name][1]))
    if name != "onnx_int8":
        assert found.predicted == wanted.predicted
    assert not (folder / "run.json").exists(), "it would be taken for another run of its configuration"
    manifest = predictor.read_manifest(folder)
    assert list(manifest["labels"]) == list(wanted.labels)
    assert manifest["rule"] == "whole label"
    assert manifest["prompt"]["head"] + "{text}" + manifest["prompt"]["tail"] == manifest["prompt"]["template"]


@pytest.mark.parametrize("name", ["onnx", "onnx_int8"])
def test_a_bundle_answers_without_torch(
    name: str, export_of: Callable[[str, str], Path], trained: Trained, texts: list[str], project: Path, tmp_path: Path
) -> None:
    folder, light = export_of("lora_response", name), predictor.restore(str(export_of("lora_response", name)), 4096)
    full = predictor.renderer_of(predictor.read(str(trained("lora_response"))))
    assert light.renderer is not None
    assert light.renderer.tokenizer is None
    for found, wanted in zip(light.renderer.encode(texts), full.encode(texts), strict=True):
        assert list(found) == list(wanted)
    code = (
        "import json, sys; from finsa.cli import run; code = run(); "
        "heavy = {'torch', 'transformers', 'peft', 'scipy', 'sklearn'} & {*sys.modules}; "
        "print('imported', json.dumps(sorted(heavy))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "stage=predict", f"run={folder}", f"text={texts[0]}"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "imported []" in done.stdout
    shown = dict(re.findall(r"│ (\w+) +│ ([\d.]+) │", done.stdout))
    probs = light(texts[:1]).probs[0]
    assert {key: float(value) for key, value in shown.items()} == pytest.approx(
        dict(zip(light.labels, probs, strict=True)), abs=1e-4
    )


def test_a_bundle_of_an_older_version_is_read_with_transformers(
    export_of: Callable[[str, str], Path], texts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "older"
    shutil.copytree(export_of("lora_response", "onnx"), folder)
    manifest = json.loads((folder / predictor.MANIFEST).read_text())
    del manifest["rendering"]
    (folder / predictor.MANIFEST).write_text(json.dumps(manifest))
    older, newer = (predictor.restore(str(one), 4096) for one in (folder, export_of("lora_response", "onnx")))
    np.testing.assert_array_equal(older(texts).probs, newer(texts).probs)


def test_predictions_do_not_depend_on_the_other_texts(exported: tuple[str, Path, Path], texts: list[str]) -> None:
    _, folder, _ = exported
    answerer = predictor.restore(str(folder), 4096)
    together = answerer(texts).probs
    for number in (0, 7, len(texts) - 1):
        assert together[number] == pytest.approx(answerer([texts[number]]).probs[0], abs=1e-5)


def test_the_pipeline_of_transformers_loads_the_classifier_unchanged(
    export_of: Callable[[str, str], Path], answers: predictor.Predictions, texts: list[str]
) -> None:
    from transformers import pipeline

    folder = export_of("lora_response", "classifier")
    classify = pipeline("text-classification", model=str(folder), top_k=None)
    for batch_size in (1, 8):
        found = classify([text.strip() for text in texts], batch_size=batch_size, truncation=True)
        assert [rows[0]["label"] for rows in found] == answers.predicted
    for rows, probs in zip(found, answers.probs, strict=True):
        by_label = {row["label"]: row["score"] for row in rows}
        assert [by_label[label] for label in answers.labels] == pytest.approx(list(probs), abs=1e-5)


def test_a_graph_gives_the_log_probabilities_and_the_probabilities_of_the_run(
    trained: Trained, export_of: Callable[[str, str], Path], texts: list[str]
) -> None:
    import onnxruntime

    for method in ("lora_response", "classifier"):
        session = onnxruntime.InferenceSession(export_of(method, "onnx") / "model.onnx")
        assert [given.name for given in session.get_inputs()] == ["input_ids", "lengths"]
        answerer = predictor.restore(str(trained(method)), 4096)
        answers, renderer = answerer(texts[:3]), answerer.renderer
        assert renderer is not None
        assert answerer.temperature != 1
        for number, prompt in enumerate(renderer.encode(texts[:3])):
            ids = renderer.until_text_end(prompt) if method == "classifier" else prompt
            given = {"input_ids": [ids], "lengths": [len(ids)]}
            log_probs, probs = session.run(["log_probs", "probs"], {key: np.array(ids) for key, ids in given.items()})
            assert log_probs[0] == pytest.approx(answers.log_probs[number], abs=1e-4)
            assert probs[0] == pytest.approx(answers.probs[number], abs=1e-5)


def code_of(card: str, project: Path) -> Any:
    """Run the Python of a card and return what it defines."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    space: dict[str, Any] = {}
    exec(code.replace("<folder of tiny>", str(project / "data" / "tiny")), space)
    return space


def test_the_code_of_a_card_gives_the_probabilities_of_the_run(
    exported: tuple[str, Path, Path], texts: list[str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder, run = exported
    card = (folder / "README.md").read_text(encoding="utf-8")
    facts, metrics = (json.loads((run / file).read_text()) for file in ("run.json", "metrics.json"))
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["license"], header["pipeline_tag"]) == ("apache-2.0", "text-classification")
    low, high = metrics["test"]["intervals"]["macro_f1"]
    assert f"| macro-F1 | {metrics['test']['macro_f1']:.4f} | {low:.4f} to {high:.4f} |" in card
    assert f"The temperature is {facts['calibration']['temperature']:.6g}, fitted" in card
    assert "文本：{text}\n情感分类：" in card
    assert "Labels: 利空, 中性, 利好." in card
    assert ("`log_probs` (output) | (rows, 3)" in card) is name.startswith("onnx")
    monkeypatch.chdir(folder)
    made, wanted = code_of(card, project), predictor.restore(str(run), 4096)([texts[0], texts[-2], texts[-1]])
    for text, probs in zip((f" {texts[0]}\n", texts[-2], texts[-1]), wanted.probs, strict=True):
        if name == "classifier":
            found = {row["label"]: row["score"] for row in made["classify"]([text.strip()], truncation=True)[0]}
        else:
            found = made["probabilities"](text)
        assert [found[label] for label in wanted.labels] == pytest.approx(list(probs), abs=max(2e-5, FORMATS[name][1]))


def test_an_adapter_in_a_run_folder_has_a_card_whose_code_runs(
    trained: Trained, texts: list[str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("lora_response")
    monkeypatch.chdir(run / "adapters" / "default")
    found = code_of(Path("README.md").read_text(encoding="utf-8"), project)["probabilities"](texts[0])
    (wanted,) = predictor.restore(str(run), 4096)(texts[:1]).probs
    assert list(found.values()) == pytest.approx(wanted, abs=2e-5)


def test_the_line_of_a_card_that_merges_an_adapter_keeps_the_tokenizer(
    trained: Trained, texts: list[str], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(trained("lora_response") / "adapters" / "default")
    card = Path("README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(model\.merge_and_unload.*?)`", card)
    space = code_of(card, project)
    before = space["probabilities"](texts[0])
    exec(line.replace('"merged"', repr(str(tmp_path / "merged"))), space)
    space["model"] = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    space["tokenizer"] = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert space["probabilities"](texts[0]) == pytest.approx(before, abs=1e-4)


def test_the_comparison_reports_its_progress(
    config: Compose, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"run={trained('lora_response')}", f"output={tmp_path / 'out'}", "format=adapter")
    export.run(config(*SHORT, *words, "train.progress_seconds=0.01", "train.score_tokens=512"))
    said = capsys.readouterr().err
    assert "comparing the export with the run on 50 validation rows\n" in said
    for side in ("run", "export"):
        assert re.search(rf"  {side}: validation rows: \d+ of 50, ", said)


def test_exports_load_with_plain_peft_and_transformers(export_of: Callable[[str, str], Path], project: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter, whole = (export_of("lora_response", form) for form in ("adapter", "merged"))
    base = AutoModelForCausalLM.from_pretrained(project / "data" / "tiny", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(whole).eval()
    ids = AutoTokenizer.from_pretrained(whole)("文本：涨停", return_tensors="pt")["input_ids"]
    assert merged(ids).logits.detach().numpy() == pytest.approx(adapted(ids).logits.detach().numpy(), abs=1e-4)


def test_a_merged_head_keeps_its_predictions(
    config: Compose, trained: Trained, tmp_path: Path, texts: list[str]
) -> None:
    run = trained("classifier")
    export.run(config(*SHORT, f"run={run}", f"output={tmp_path / 'm'}", "format=merged"))
    found, wanted = (predictor.restore(str(place), 4096)(texts) for place in (tmp_path / "m", run))
    assert found.probs == pytest.approx(wanted.probs, abs=1e-5)


def test_a_quantized_run_is_merged_into_its_dequantized_base(
    config: Compose, trained: Trained, tmp_path: Path, texts: list[str]
) -> None:
    run = trained("qlora")
    result = export.run(config(*SHORT, f"run={run}", f"output={tmp_path / 'm'}", "format=merged"))
    assert result.metrics["receipt"]["agreement"] == 1
    assert result.metrics["receipt"]["largest_difference"] < 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_an_export_beyond_the_tolerance_is_removed_unless_forced(
    config: Compose, trained: Trained, tmp_path: Path
) -> None:
    words = (*SHORT, f"run={trained('lora_response')}", f"output={tmp_path / 'm'}", "format=merged")
    strict = "stage.difference=1e-12"
    with pytest.raises(ModelError, match=r"is above stage\.difference=1e-12; nothing is kept"):
        export.run(config(*words, strict))
    assert list(tmp_path.iterdir()) == []
    export.run(config(*words, strict, "stage.force=true"))
    assert (tmp_path / "m" / receipts.FILE).is_file()
    with pytest.raises(RunError, match="already exists"):
        export.run(config(*words))


@pytest.mark.parametrize(
    ("words", "types", "most", "told"),
    [
        ("", ("float32", "float32"), 1e-3, "auto (0.001: float32 beside float32)"),
        ("", ("float32", "int8"), 0.1, "auto (0.1: int8 beside float32)"),
        ("", ("bfloat16", "bfloat16"), 0.1, "auto (0.1: bfloat16 beside bfloat16)"),
        ("", ("bfloat16", "float32"), 0.1, "auto (0.1: float32 beside bfloat16)"),
        ("stage.difference=0.2", ("float32", "float32"), 0.2, "0.2"),
        ("stage.difference=null", ("float32", "int8"), 1.0, None),
    ],
)
def test_the_tolerance_depends_on_the_dtypes_of_both_sides(
    config: Compose, words: str, types: tuple[str, str], most: float, told: str | None
) -> None:
    stage = config(*SHORT, "run=some", "format=onnx", *words.split()).stage
    assert isinstance(stage, ExportStage)
    sides = [export.Side({"macro_f1": 0.8}, 1, 1.0, name) for name in types]
    assert export.Receipt(10, 1.0, most, *sides).faults(stage) == []
    worse = f"the largest difference {1.01 * most:.3g} is above stage.difference={told}"
    assert export.Receipt(10, 1.0, 1.01 * most, *sides).faults(stage) == ([] if told is None else [worse])


def test_an_export_is_evaluated_and_predicts_like_a_run(
    config: Compose, trained: Trained, export_of: Callable[[str, str], Path], tmp_path: Path, texts: list[str]
) -> None:
    run, folder = trained("lora_response"), export_of("lora_response", "classifier")
    (tmp_path / "in.txt").write_text("\n".join(texts), encoding="utf-8")
    for place, name in ((run, "one"), (folder, "other")):
        words = (f"run={place}", f"input={tmp_path / 'in.txt'}", f"output={tmp_path / name}.csv")
        predict.run(config("stage=predict", *words))
    one, other = (pl.read_csv(tmp_path / f"{name}.csv")["label"].to_list() for name in ("one", "other"))
    assert one == other
    again = evaluate.run(config("stage=evaluate", f"run={folder}", "tracking=none", f"output_dir={tmp_path}"))
    kept = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert again.metrics["test"]["confusion"] == kept["test"]["confusion"]


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("tfidf_lr", "format=merged", "is not a language model"),
        ("classifier", "format=classifier", "its head reads the mean over the text"),
        ("lora_response", "format=merged stage.precision=int8", "is used by format=onnx only"),
    ],
)
def test_impossible_exports_are_refused_before_weights_are_loaded(
    config: Compose, trained: Trained, monkeypatch: pytest.MonkeyPatch, method: str, words: str, message: str
) -> None:
    run = trained(method)
    monkeypatch.setattr(base, "load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(FinsaError, match=message):
        export.run(config(*SHORT, f"run={run}", *words.split()))
    assert not (run / "exports").exists()


def test_labels_of_several_tokens_have_no_score_head(tokenizer: Any) -> None:
    labels = LabelSpace(("利空", "利好"), ("看跌走势", "看涨走势"))
    renderer = Renderer(tokenizer, Prompt("文本：", "\n情感："), labels, 60)
    assert "these have several tokens: 看跌走势 (" in str(exporting.label_refusal(renderer, "classifier"))
    assert exporting.label_refusal(renderer, "onnx") is None


def test_a_missing_package_is_reported_with_its_extra(
    config: Compose, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(ModelError, match=r"format=onnx needs onnxruntime: pip install 'finsa\[export\]'"):
        export.run(config(*SHORT, f"run={trained('lora_response')}", "format=onnx"))


def test_an_export_in_a_removed_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "openvino", "tokenizer": "."}), encoding="utf-8")
    with pytest.raises(RunError, match="'openvino', which this version cannot read; export again with format=onnx"):
        predictor.read_manifest(tmp_path)


def test_format_is_required_and_checked(config: Compose) -> None:
    with pytest.raises(ConfigError, match="stage=export needs format=merged, adapter, onnx, classifier or gguf"):
        config("stage=export", "run=somewhere")
    with pytest.raises(ConfigError, match="there is no 'onx'. Did you mean 'onnx'"):
        config("stage=export", "run=somewhere", "format=onx")
