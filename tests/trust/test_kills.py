"""The short version of `make trust`: each kind of command is killed at least once, without lost or changed results."""

from __future__ import annotations

import json
from pathlib import Path

import commands

KINDS = {
    "training",
    "preference",
    "reward",
    "prediction",
    "chain",
    "cache building",
}  # tests/test_sweeps.py kills a sweep


def test_killed_commands_resume_to_the_same_results(tmp_path: Path) -> None:
    output = tmp_path / "trust.json"
    words = ["6", "--seed", "2", "--output", str(output), "--kinds", *sorted(KINDS)]
    done = commands.run(*words, script="tests/trust/kills.py")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))["kinds"]
    assert found.keys() == KINDS
    assert sum(kind["tried"] for kind in found.values()) >= 6
    assert [kind for kind in found.values() if kind["survived"] != kind["tried"]] == []
