"""What a record says of a run's weights, and that others are not taken for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finsa import files, provenance, runs
from finsa.errors import RunError
from finsa.inference import answering, exporting


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


@pytest.mark.parametrize("damage", ["one bit", "gone"])
def test_other_weights_are_refused(run: Path, damage: str, tmp_path: Path) -> None:
    file = run / "adapters" / "default" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(RunError, match="is another file than the run wrote" if damage == "one bit" else "is gone"):
        answering.restore(str(run), 4096)
    with pytest.raises(RunError, match="restore it from a copy, or repeat"):
        exporting.write(answering.read(str(run)), "adapter", "float32", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_run_that_noted_none_is_read(run: Path) -> None:
    facts = runs.read(str(run))[2]
    provenance.require_weights(run, facts)
    del facts["weights"]
    (run / "adapters" / "default" / "adapter_model.safetensors").unlink()
    provenance.require_weights(run, facts)
