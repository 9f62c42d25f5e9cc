"""What a result was made with, for the record: commit, versions, machine, memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from finsa import files, processes
from finsa.config import ROOT, RunConfig
from finsa.errors import RunError

WEIGHTS = ("adapters", "mixture", "model", "baseline")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "hydra-core", "wandb", "finsa")


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes.

    Linux's own figure first: to ``getrusage`` a process begins with what its parent had when it was forked.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0])
    except (OSError, IndexError):
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory() -> int:
    """Resident memory of this process now, in bytes."""
    import psutil  # a run needs it, a wrong option does not

    return int(psutil.Process().memory_info().rss)


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a run's weights, by their paths within its folder; Markdown beside them is left out."""
    return {
        f"{part}/{name}": digest
        for part in WEIGHTS
        if (folder / part).is_dir()
        for name, digest in files.digests(folder / part).items()
        if not name.endswith(".md")
    }


def require_weights(folder: Path, facts: Mapping[str, Any]) -> None:
    """Check that a run's weights are those that it wrote.

    Args:
        folder: of the run.
        facts: of its ``run.json``; a run of an older version did not note them.

    Raises:
        RunError: naming a file that is gone or another.
    """
    noted: dict[str, str] = facts.get("weights") or {}
    for name, digest in noted.items():
        file = folder / name
        if not file.is_file() or files.digest(file) != digest:
            state = "another file than the run wrote (its checksum in run.json differs)" if file.is_file() else "gone"
            raise RunError(f"run: {file} is {state}; restore it from a copy, or repeat the run's command")


def of(cfg: RunConfig) -> dict[str, Any]:
    """What a result was made with: commit, versions, machine, number of processes, seed."""
    return {
        "stage": cfg.stage.name,
        "started": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "pid": os.getpid(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "processes": processes.world(),
        "versions": {name: _version(name) for name in PACKAGES},
        "seed": cfg.seed,
        "error": None,
    }


def _git(*words: str) -> str | None:
    if not (ROOT / ".git").exists():  # installed: a repository around it would be another one
        return None
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
