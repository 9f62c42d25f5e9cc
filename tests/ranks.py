"""Commands that several processes run together, and small runs to compare them by."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from finsa.config import ROOT

# 3608 rows in steps of 24 leave 8 for the last one, which two processes with micro-batches of 6 cannot share evenly.
FEW = ("train=smoke", "tracking=none", "stage.compare_base=false", "method.adapter.dropout=0.0", "train.log_every=1")


def started(number: int, *words: str, **variables: str) -> subprocess.Popen[str]:
    """Start ``torchrun --nproc-per-node <number> run.py <words>``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number), "--master-port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [*launcher, str(ROOT / "run.py"), *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def only_run(folder: Path) -> Path:
    """The one run folder below a folder."""
    (run,) = (file.parent for file in folder.glob("*/run.json"))
    return run


def losses(run: Path) -> list[float]:
    """Training losses by step."""
    return [record["loss"] for record in log(run) if "loss" in record]


def log(run: Path) -> list[dict[str, Any]]:
    """Records of ``log.jsonl``."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def metrics(run: Path) -> dict[str, Any]:
    """What ``metrics.json`` holds."""
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return found
