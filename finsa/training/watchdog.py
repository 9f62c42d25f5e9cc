"""A heartbeat to monitor long runs, and a watchdog for training steps that stall."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback

from finsa.config import Train
from finsa.runs import files, processes, provenance
from finsa.runs.progress import Display

T = TypeVar("T")
HEARTBEAT, BEATS, STACKS = "heartbeat.json", "heartbeat.jsonl", "stalled.txt"


class Watch(TrainerCallback):  # type: ignore[misc]
    """Writes ``heartbeat.json`` every few seconds, appends it to ``heartbeat.jsonl``, and reports a step that stalls.

    This is done in a separate thread, because the main thread may be waiting for a data loader or a device.

    Args:
        train: its ``heartbeat_seconds``, ``stall_seconds`` and ``stall_ends``.
        folder: the files are written here.

    Attributes:
        display: displays the progress of the run.
    """

    def __init__(self, train: Train, folder: Path) -> None:
        self.train, self.folder, self.display = train, folder, Display(train.progress_seconds)
        self.step, self.moved, self.paused, self.reported = 0, time.monotonic(), True, False
        self.beating = False
        self.over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Write the heartbeat; nested use, by a fit within a run, has no effect."""
        waits = [seconds for seconds in (self.train.heartbeat_seconds, self.train.stall_seconds) if seconds]
        if self.beating or not waits or not processes.is_main():
            yield self
            return
        thread = threading.Thread(target=self._monitor, args=(min(waits),), name="finsa heartbeat", daemon=True)
        self._moved(0)
        self.beating = True
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            thread.join()
            self.beating = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Watch the duration of steps; outside of this, loading and scoring may take long."""
        self._moved(self.step)
        self.paused = False
        try:
            yield
        finally:
            self.paused = True

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not watch: validation and checkpoints may take long."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False
            self._moved(self.step)

    def pausing(self, act: Callable[[Any], T]) -> Callable[[Any], T]:
        """Wrap a function during which steps are not watched."""

        def paused(given: Any) -> T:
            with self.pause():
                return act(given)

        return paused

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record that a step has ended."""
        self._moved(state.global_step)

    def _moved(self, step: int) -> None:
        self.step, self.moved, self.reported = step, time.monotonic(), False

    def _monitor(self, wait: float) -> None:
        beat = 0.0
        while not self.over.wait(min(wait, 1.0)):
            now, still = time.monotonic(), time.monotonic() - self.moved
            if self.train.heartbeat_seconds and now - beat >= self.train.heartbeat_seconds:
                beat = now
                self._beat(still)
            if self.train.stall_seconds and still > self.train.stall_seconds and not (self.paused or self.reported):
                self.reported = True
                self._report(still)

    def _beat(self, still: float) -> None:
        values = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "step": self.step,
            "seconds_since_step": round(still, 1),
            "stepping": not self.paused,
            "memory_bytes": provenance.memory(),
        }
        line = json.dumps(values) + "\n"
        with suppress(OSError):  # a full disk is reported when a checkpoint is written
            with files.replacing(self.folder / HEARTBEAT) as temporary:
                temporary.write_text(line, encoding="utf-8")
            with (self.folder / BEATS).open("a", encoding="utf-8") as log:  # 0.5 MB per day at one record in 30 s
                log.write(line)

    def _report(self, still: float) -> None:
        """Write the stack of every thread; stop the training if that is configured."""
        file = self.folder / STACKS
        with suppress(OSError), file.open("w", encoding="utf-8") as stream:
            print(f"step {self.step + 1} has taken {still:.0f} s so far", file=stream, flush=True)
            faulthandler.dump_traceback(stream)
        ends = "; stopping it (train.stall_ends=true)" if self.train.stall_ends else "; still waiting"
        print(
            f"step {self.step + 1} has not ended for {still:.0f} s, more than train.stall_seconds="
            f"{self.train.stall_seconds:g}{ends}. The stack of each thread: {file}",
            file=sys.stderr,
            flush=True,
        )
        if self.train.stall_ends:
            for _ in range(2):  # the first one requests a checkpoint, which a stalled step never reaches
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
