"""Start, stop and resume runs through a board, and count those that are lost.

    python tests/trust/boards.py 10

Every run is started by a board, stopped there (Ctrl-C) at a random moment of its training, and resumed by another one.
A run is lost unless it ends as one complete run folder with all its steps. Also reports the
seconds from the command to the page, and the resident memory of the board. The runs train one after another.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from finsa.board import runs

WORDS = "tracking=none stage.compare_base=false train.max_steps=80 train.epochs=9 train.log_every=1"


class Board:
    """A board and what a browser sends to it.

    Args:
        output: its output folder.
    """

    def __init__(self, output: Path) -> None:
        started = time.monotonic()
        command = [sys.executable, "run.py", "stage=board", "port=0", f"output_dir={output}"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = next(line.split()[2] for line in self.process.stdout if line.startswith("board at "))
        self.client = httpx.Client(base_url=f"{self.url}/en/", timeout=60, trust_env=False)
        self.client.get("").raise_for_status()
        self.seconds = time.monotonic() - started
        self.config: dict[str, Any] = self.client.get("config").json()
        self.ids = {one["props"].get("elem_id"): one["id"] for one in self.config["components"]}

    def send(self, name: str, event: str, values: dict[str, Any] | None = None, data: Any = None) -> None:
        """Send an event of a component, with values of others, as a browser does, and wait for the answer."""
        call = next(one for one in self.config["dependencies"] if [self.ids[name], event] in one["targets"])
        names = {number: name for name, number in self.ids.items()}
        shown = {one["id"]: one["props"].get("value") for one in self.config["components"]}
        given = [(values or {}).get(str(names.get(number)), shown[number]) for number in call["inputs"]]
        body = {"data": given, "fn_index": call["id"], "session_hash": "x", "event_data": data}
        self.client.post("gradio_api/queue/join", json=body).raise_for_status()
        with self.client.stream("GET", "gradio_api/queue/data?session_hash=x") as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ") or "{}")
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return
        raise AssertionError("no answer")

    @property
    def memory(self) -> float:
        """Its resident memory in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def close(self) -> None:
        """Stop the board."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(30) == 0


def main() -> None:
    """Run, stop, resume, count and report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("number", type=int)
    parser.add_argument("--words", default=WORDS, help="overrides of every run")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rng, stopped, kept = random.Random(1), list[int](), 0
    with tempfile.TemporaryDirectory(prefix="finsa-boards-") as folder:
        output = Path(folder)
        first = Board(output)
        for number in range(given.number):
            first.send("start", "click", {"train": "smoke", "overrides": f"{given.words} seed={number}"})
            step = rng.randint(1, 60)
            _wait(output, number, lambda one, least=step: _step(one) >= least)
            first.send("stop", "click")
            entry = _wait(output, number, lambda one: one.resumable)
            stopped.append(int(str(entry.facts["error"]).rpartition("step ")[2].split()[0]))
        before = first.memory
        first.close()
        second = Board(output)
        for number in range(given.number):
            entry = _wait(output, number, lambda one: one.resumable)
            second.send("list", "select", data={"shown": entry.name})
            second.send("resume", "click")
            entry = _wait(output, number, lambda one: one.status in ("complete", "failed"))
            kept += (entry.status, _step(entry), entry.facts["sittings"]) == ("complete", 80, 2)
        found = {
            "runs": given.number,
            "kept": kept,
            "in the list": len(runs.listed(output)),
            "stopped at step": stopped,
            "seconds to the page": [round(first.seconds, 1), round(second.seconds, 1)],
            "MiB at the end": [round(before), round(second.memory)],
        }
        second.close()
    print(json.dumps(found, indent=1))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _step(entry: runs.Entry) -> int:
    made = runs.progress(entry)
    return made.step if made else 0


def _wait(output: Path, seed: int, done: Any) -> runs.Entry:
    ends = time.monotonic() + 240
    while time.monotonic() < ends:
        for entry in runs.listed(output):
            if entry.facts.get("seed") == seed and done(entry):
                return entry
        time.sleep(0.1)
    raise AssertionError(f"run {seed} did not get there")


if __name__ == "__main__":
    main()
