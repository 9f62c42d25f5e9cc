"""The recorded weights of a run, and detection of changed ones."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import torch as tensors_of_torch
from safetensors.numpy import save_file

from finsa.config import ROOT, RunConfig
from finsa.errors import RunError
from finsa.inference import export, predictor
from finsa.runs import files, provenance, run_folder


@pytest.fixture
def run(trained: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained("lora_response"), tmp_path / "run"))


def test_a_record_names_the_weights(run: Path) -> None:
    noted = json.loads((run / "run.json").read_text(encoding="utf-8"))["weights"]
    file = run / "adapters" / "default" / "adapter_model.safetensors"
    assert noted["adapters/default/adapter_model.safetensors"] == files.digest(file)
    assert set(noted) == {
        path.relative_to(run).as_posix() for path in (run / "adapters").rglob("*") if path.suffix not in ("", ".md")
    }


@pytest.mark.parametrize("damage", ["one bit", "missing"])
def test_other_weights_are_refused(run: Path, damage: str, tmp_path: Path) -> None:
    file = run / "adapters" / "default" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(RunError, match="has changed since the run" if damage == "one bit" else "is missing"):
        predictor.restore(str(run), 4096)
    with pytest.raises(RunError, match="restore it from a copy, or repeat"):
        export.write(predictor.read(str(run)), "adapter", "float32", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_base_that_has_changed_below_an_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    base = shutil.copytree(ROOT / "data" / "tiny", tmp_path / "base")
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    values["model"]["path"] = str(base)
    (run / "config.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    predictor.restore(str(run), 4096)  # another folder with the same content
    noted = json.loads((run / "run.json").read_text(encoding="utf-8"))["base_weights"]["model"]["model.safetensors"]
    tensors = tensors_of_torch.load_file(base / "model.safetensors")
    other = {name: -tensor for name, tensor in tensors.items()}
    tensors_of_torch.save_file(other, base / "model.safetensors", {"format": "pt"})
    place = f"model.safetensors in {base}"
    message = rf"was trained on a different base model: {place} has changed since .fingerprint {noted}, now"
    with pytest.raises(RunError, match=message):
        predictor.restore(str(run), 4096)


def test_a_run_without_training_names_the_weights_it_scored(trained: Callable[..., Path]) -> None:
    facts = json.loads((trained("zero_shot") / "run.json").read_text(encoding="utf-8"))
    assert facts["weights"] == {}
    assert facts["base_weights"] == {"model": provenance.model_files(ROOT / "data" / "tiny")}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(facts["base_weights"]["model"])


def test_a_large_file_is_identified_by_parts_of_it(tmp_path: Path) -> None:
    """In 24 MB, any changed tensor is detected; in a file without tensors, any changed 24 kB."""
    generator = np.random.default_rng(1)
    tensors = {f"t{size}": generator.standard_normal(size, np.float32) for size in (10, 1_000, 1_000_000, 5_000_000)}
    file, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, file)
    shutil.copyfile(file, other)
    assert file.stat().st_size > provenance.WHOLE
    assert provenance.fingerprint(file) == provenance.fingerprint(other)
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + np.float32(1)}, other)
        assert provenance.fingerprint(file) != provenance.fingerprint(other)
    other.write_bytes(file.read_bytes() + b"0")
    assert provenance.fingerprint(file) != provenance.fingerprint(other)
    content = bytearray(b"\xff" * 8 + generator.bytes(24_000_000))
    file.write_bytes(content)
    content[10_000_000:10_024_000] = generator.bytes(24_000)
    other.write_bytes(content)
    assert provenance.fingerprint(file) != provenance.fingerprint(other)


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ({"path": None, "hub_id": "a/b", "revision": "0" * 40}, "0" * 40),
        ({"path": None, "hub_id": "a/b", "revision": "main"}, "1" * 40),
        ({"path": None, "hub_id": "a/b", "revision": "v1"}, "unknown"),
        ({"path": None, "hub_id": "not/a/name", "revision": "main"}, "unknown"),
    ],
)
def test_weights_of_the_hub_are_identified_by_their_commit(
    source: dict[str, Any], known: str, config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: Any
) -> None:
    place = tmp_path / "models--a--b"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("1" * 40)
    (place / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (place / "snapshots" / ("1" * 40) / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cfg = config()
    model = cfg.model.model_copy(update=source)
    assert provenance.base_weights(cfg.model_copy(update={"model": model})) == {"model": {"commit": known}}
    drawn = model.model_copy(update={"weights": "random"})
    assert provenance.base_weights(cfg.model_copy(update={"model": drawn})) == {}


def test_an_untracked_configuration_file_makes_the_tree_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "config.yaml").write_text("a: 1\n")
    (tmp_path / ".gitignore").write_text("mine.yaml\n")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "notes.txt").write_text("of no run")
    assert not provenance._dirty()
    for name in ("conf/data/other.yaml", "conf/data/mine.yaml"):
        (tmp_path / name).write_text("name: other\n")
        assert provenance._dirty()
        (tmp_path / name).unlink()
    (tmp_path / "conf" / "config.yaml").write_text("a: 2\n")
    assert provenance._dirty()
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert provenance._git("rev-parse", "HEAD") is None


def test_a_run_without_recorded_weights_is_read(run: Path) -> None:
    facts = run_folder.read(str(run))[2]
    provenance.require_weights(run, facts)
    del facts["weights"]
    (run / "adapters" / "default" / "adapter_model.safetensors").unlink()
    provenance.require_weights(run, facts)
