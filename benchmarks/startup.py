"""Seconds until something is to be seen: help, a wrong option, the first training step of the embedded default.

    python benchmarks/startup.py            medians over three turns
    python benchmarks/startup.py --quick    one turn; nothing is written

Each is a fresh process, imports included; CPU seconds beside wall seconds, because the machine may be shared. The first
step is a run of one step without scoring the base: from the command to the log record of that step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "help": ("--help",),
    "unknown choice": ("method=lroa",),
    "wrong value": ("train.epochs=x",),
    "batch larger than the data": ("train.batch_size=100000", "train.micro_batch_size=10"),
    "prompt without room": ("data.max_length=10",),
}
FIRST = ("train=smoke", "train.max_steps=1", "tracking=none", "stage.compare_base=false")


def command(*words: str) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - started, used


def first_step() -> float:
    """Wall seconds from the command to the record of the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        words = [sys.executable, "run.py", *FIRST, f"output_dir={folder}"]
        subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
        log = next(Path(folder).rglob("log.jsonl")).read_text(encoding="utf-8").splitlines()
        return float(next(record["time"] for record in map(json.loads, log) if "loss" in record) - started)


def main() -> None:
    """Measure, print, write ``results/startup.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true")
    turns = 1 if (given := options.parse_args()).quick else 3
    arms = {}
    for name, words in COMMANDS.items():
        wall, used = zip(*(command(*words) for _ in range(turns)), strict=True)
        arms[name] = {"seconds": round(statistics.median(wall), 2), "cpu_seconds": round(statistics.median(used), 2)}
        print(f"{name:28} {arms[name]['seconds']:6.2f} s   {arms[name]['cpu_seconds']:6.2f} s of CPU", flush=True)
    arms["first training step"] = {"seconds": round(statistics.median(first_step() for _ in range(turns)), 2)}
    print(f"{'first training step':28} {arms['first training step']['seconds']:6.2f} s")
    if not given.quick:
        machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "load_average": os.getloadavg()[0]}
        text = json.dumps({**machine, "turns": turns, "arms": arms}, indent=1)
        (ROOT / "benchmarks" / "results" / "startup.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
