from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finsa.config import ROOT, RunConfig
from finsa.stages import generate

Compose = Callable[..., RunConfig]


def test_the_committed_sample_is_what_the_command_writes(config: Compose, tmp_path: Path) -> None:
    generate.run(config("stage=generate", "data=generated", f"output={tmp_path}"))
    committed = ROOT / "data" / "sample"
    names = sorted(file.name for file in tmp_path.iterdir())
    assert (
        names
        == sorted(file.name for file in committed.iterdir())
        == [
            "recipe.json",
            "test.csv",
            "train.csv",
            "valid.csv",
        ]
    )
    for name in names:
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes()
