"""Commands run by several processes, and helpers to compare small runs."""

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


# accelerate starts torchrun only for several GPUs; this option makes it do so without GPUs.
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "--master-port"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "--main_process_port"),
}


def started(number: int, *words: str, launcher: str = "torchrun", **variables: str) -> subprocess.Popen[str]:
    """Start ``torchrun --nproc-per-node <number> run.py <words>``, or the same by ``accelerate launch``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    *start, processes, place = LAUNCHERS[launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", *start, processes, str(number), place, port, str(ROOT / "run.py"), *words],
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
    """The contents of ``metrics.json``."""
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return found
