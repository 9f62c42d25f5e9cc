"""Train the embedded default for a number of minutes, and report the growth of its memory.

    python tests/trust/soak.py 120

The command is an ordinary ``run.py`` with enough epochs; at the end it gets SIGTERM and must save, print how to
resume, and end with exit code 143. Memory is read from ``heartbeat.json``; growth is the slope of a straight line
through the beats after the first quarter, in which caches fill.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
WORDS = ["train.epochs=1e6", "train.patience=null", "train.heartbeat_seconds=1", "train.validate_every=100"]
WORDS += ["train.validation_rows=64", "stage.compare_base=false", "tracking=none"]


def beats(folder: Path, process: subprocess.Popen[str], seconds: float) -> list[tuple[float, int, int]]:
    """Time, step and bytes of every heartbeat until the time is over."""
    found: list[tuple[float, int, int]] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and process.poll() is None:
        for file in folder.rglob("heartbeat.json"):
            beat = json.loads(file.read_text(encoding="utf-8"))
            if beat["step"] > 0 and (not found or beat["step"] != found[-1][1]):
                found.append((time.monotonic(), beat["step"], beat["memory_bytes"]))
        time.sleep(0.5)
    return found


def main() -> None:
    """Run, observe, stop and report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("minutes", type=float)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="finsa-soak-") as folder:
        command = [sys.executable, "run.py", *WORDS, f"output_dir={folder}"]
        process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        found = beats(Path(folder), process, 60 * given.minutes)
        os.kill(process.pid, signal.SIGTERM)
        _, told = process.communicate(timeout=120)
        kept = len(list(Path(folder).rglob("checkpoint-*/manifest.json")))
    assert process.returncode == 143, told[-2000:]
    assert "resume=true" in told, told[-2000:]
    assert kept <= 2, f"{kept} checkpoints are left"
    times, steps, memory = (np.array(column, dtype=float) for column in zip(*found, strict=True))
    later = times >= times[0] + (times[-1] - times[0]) / 4
    slope = np.polyfit(times[later] / 3600, memory[later] / 2**20, 1)[0]
    summary = {
        "minutes": round((times[-1] - times[0]) / 60, 1),
        "steps": int(steps[-1]),
        "beats": len(found),
        "memory_mb_after_first_quarter": round(float(memory[later][0]) / 2**20, 1),
        "memory_mb_at_the_end": round(float(memory[-1]) / 2**20, 1),
        "growth_mb_per_hour": round(float(slope), 1),
        "growth_mb_per_1000_steps": round(float(np.polyfit(steps[later] / 1000, memory[later] / 2**20, 1)[0]), 2),
    }
    given.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
