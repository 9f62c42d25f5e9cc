"""Seconds until something is to be seen: help, a wrong option, a first training step, and one after a kill.

    python benchmarks/startup.py            medians over three turns
    python benchmarks/startup.py --quick    one turn; nothing is written

Each is a fresh process, imports included; CPU seconds beside wall seconds, because the machine may be shared. The first
step is a run of one step without scoring the base: from the command to the log record of that step. The step after a
kill: the same from `resume=true` of a run that was killed by SIGKILL behind its checkpoint of step 4.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kept

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "help": ("--help",),
    "unknown choice": ("method=lroa",),
    "wrong value": ("train.epochs=x",),
    "batch larger than the data": ("train.batch_size=100000", "train.micro_batch_size=10"),
    "prompt without room": ("data.max_length=10",),
}
FIRST = ("train=smoke", "train.log_every=1", "tracking=none", "stage.compare_base=false")


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
        words = [sys.executable, "run.py", *FIRST, "train.max_steps=1", f"output_dir={folder}"]
        subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
        return steps_since(Path(folder), started)[0] - started


def step_after_kill() -> float:
    """Wall seconds from ``resume=true`` to the record of the first step that is made then."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            "run.py",
            *FIRST,
            "train.max_steps=8",
            "train.validate_every=4",
            f"output_dir={folder}",
        ]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(steps_since(Path(folder), 0)) < 5:  # the fifth record stands behind the checkpoint of step 4
            if process.poll() is not None:
                raise RuntimeError("the training ended before it was killed")
            time.sleep(0.02)
        process.kill()
        process.wait()
        started = time.time()
        subprocess.run([*words, "resume=true"], cwd=ROOT, capture_output=True, check=True)
        return steps_since(Path(folder), started)[0] - started


def steps_since(folder: Path, when: float) -> list[float]:
    """Times of the log's records of training steps."""
    text = "".join(file.read_text(encoding="utf-8") for file in folder.rglob("log.jsonl"))
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [float(record["time"]) for record in records if "loss" in record and record["time"] > when]


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
    for name, one in (("first training step", first_step), ("first step after a kill", step_after_kill)):
        arms[name] = {"seconds": round(statistics.median(one() for _ in range(turns)), 2)}
        print(f"{name:28} {arms[name]['seconds']:6.2f} s", flush=True)
    if not given.quick:
        kept.write("startup", {"turns": turns, "arms": arms})


if __name__ == "__main__":
    main()
