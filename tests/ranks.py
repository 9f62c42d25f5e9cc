"""Commands run by several processes, and helpers to compare small runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from commands import Command

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
    *start, processes, place = LAUNCHERS[launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", *start, processes, str(number), place, _free_port(), str(ROOT / "run.py"), *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_two_nodes(*words: str) -> list[subprocess.Popen[str]]:
    """Start ``run.py <words>`` by two torchruns, as on two machines, which find each other by an address."""
    place = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{_free_port()}")
    start = [sys.executable, "-m", "torch.distributed.run", *place, "--local-addr", "127.0.0.1"]
    return [
        subprocess.Popen(
            [*start, "--nproc-per-node", "1", str(ROOT / "run.py"), *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]


def forked(number: int, *words: str) -> list[Command]:
    """Start the ranks of ``run.py <words>`` as `commands` starts a command, with the variables that torchrun sets."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    size = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    return [
        Command(*words, environment={**os.environ, **place, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(number)
    ]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


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
