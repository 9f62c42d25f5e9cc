"""The short version of `make trust`: each kind of command is killed at least once, without lost or changed results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from finsa.config import ROOT

KINDS = {"training", "prediction", "chain", "cache building"}  # tests/test_sweeps.py kills a sweep


def test_killed_commands_resume_to_the_same_results(tmp_path: Path) -> None:
    output = tmp_path / "trust.json"
    command = [sys.executable, "tests/trust/kills.py", "4", "--seed", "2", "--output", str(output)]
    command += ["--kinds", *sorted(KINDS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))["kinds"]
    assert found.keys() == KINDS
    assert sum(kind["tried"] for kind in found.values()) >= 4
    assert [kind for kind in found.values() if kind["survived"] != kind["tried"]] == []
