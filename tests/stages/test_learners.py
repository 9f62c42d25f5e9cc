"""Heads and quantized bases in the stages, and errors before weights are loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from few import FEW
from safetensors.torch import load_file, save_file

from finsa import cli
from finsa.config import ROOT, RunConfig
from finsa.errors import ConfigError
from finsa.runs import provenance, run_folder
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.stages import evaluate, train

Compose = Callable[..., RunConfig]
SHORT = (FEW, "train=smoke", "train.batch_size=4", "tracking=none", "stage.compare_base=false", "train.max_steps=2")
# The last is another code point for the first one's character; Unicode and this tokenizer hold them for the same.
ALIKE = {"利空": "利", "中性": "中", "利好": "\uf9dd"}


def predictions(result: Result) -> list[dict[str, Any]]:
    assert result.run_dir is not None
    lines = (result.run_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", [("classifier_label_words", "method.quantization=nf4"), ("lora_8bit",)])
def test_evaluate_restores_head_and_quantized_base(config: Compose, tmp_path: Path, method: tuple[str, ...]) -> None:
    trained = train.run(config(f"method={method[0]}", *method[1:], *SHORT, f"output_dir={tmp_path}/a"))
    run = f"run={trained.run_dir}"
    again = evaluate.run(config("stage=evaluate", run, "tracking=none", f"output_dir={tmp_path}/b"))
    assert again.metrics["test"] == trained.metrics["test"]
    for first, second in zip(predictions(trained), predictions(again), strict=True):
        assert first["probs"] == pytest.approx(second["probs"], abs=2e-5)
    rules = [json.loads((result.run_dir / "run.json").read_text())["scoring"] for result in (trained, again)]
    assert rules == ["classification head" if "classifier" in method[0] else "whole label"] * 2


def _by_command(cfg: RunConfig) -> None:
    session = Session()
    cli.run_job(cfg, session)
    raise session.errors.pop()


@pytest.mark.parametrize("run", [train.run, _by_command], ids=["stage", "command"])
def test_labels_with_equal_tokens_are_refused_before_loading_weights(
    config: Compose, tmp_path: Path, run: Callable[[RunConfig], object]
) -> None:
    """The model has a tokenizer but no weights, so a later error would be about missing weights."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((Path("data/tiny") / name).read_bytes())
    cfg = config(
        "method=lora_label", f"model.path={tmp_path}", *SHORT, f"output_dir={tmp_path}/runs", "data.cache=null"
    )
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"labels": ALIKE})})
    with pytest.raises(ConfigError, match=r"data\.labels: not all of .* have different tokens in this tokenizer"):
        run(cfg)
    assert not (tmp_path / "runs").exists()


def test_a_run_records_the_adapter_that_it_started_from_and_is_not_reused_for_another(
    config: Compose, tmp_path: Path, trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    start = Path(shutil.copytree(trained("lora_response"), tmp_path / "start"))
    file = start / "adapters" / "default" / "adapter_model.safetensors"
    cfg = config("method=lora_response", f"method.adapter.init={start}", *SHORT, f"output_dir={tmp_path}/runs")
    result = train.run(cfg)
    assert result.run_dir is not None
    facts = json.loads((result.run_dir / "run.json").read_text())
    assert facts["base_weights"]["adapter"][file.name] == provenance.fingerprint(file)
    assert run_folder.finished(cfg, facts["data_fingerprint"]) == result.run_dir
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert run_folder.finished(cfg, facts["data_fingerprint"]) is None
    assert f"{file.name} of the adapter: {facts['base_weights']['adapter'][file.name]}, now " in capsys.readouterr().out
    shutil.rmtree(start)  # what was trained does not need it
    evaluated = evaluate.run(
        config("stage=evaluate", f"run={result.run_dir}", "tracking=none", f"output_dir={tmp_path}/e")
    )
    assert evaluated.metrics["test"]["macro_f1"] == result.metrics["test"]["macro_f1"]


def test_a_run_whose_base_was_removed_is_refused_before_importing_torch(
    config: Compose, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    run = Path(shutil.copytree(trained("lora_response"), tmp_path / "run"))
    file = run / "config.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("path: data/tiny", f"path: {tmp_path}/gone"), encoding="utf-8")
    assert "gone" in file.read_text(encoding="utf-8")
    code = f"import sys; from finsa.inference import predictor\ntry: predictor.read({str(run)!r})\n"
    code += "except Exception as error: print(type(error).__name__, error, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"RunError run: {run} needs the model that it was trained on. model.path: there is no file or folder "
        f"{tmp_path}/gone. It must contain config.json, weights and a tokenizer False\n"
    )
