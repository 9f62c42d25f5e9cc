"""What a run gets done: samples and real tokens per second, memory, and its share of what the machine can compute.

Nothing here waits for the device while steps run: all that is counted is known on the host. Several processes add up
their counts when a record is logged, and at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finsa.data.rows import IGNORE
from finsa.models import flops, hardware
from finsa.runs import processes


@dataclass
class Done:
    """Work of a process, or of all of them.

    Args:
        steps: of the optimiser.
        rows: their number.
        positions: tokens with padding that were forwarded.
        pairs: of positions that attention looked at.
        tokens: real tokens.
        learnt: tokens with a label, or rows where a class is chosen.
        projected: positions that the LM head was applied to.
        seconds: of training, without validation and saving.
    """

    steps: int = 0
    rows: int = 0
    positions: int = 0
    pairs: int = 0
    tokens: int = 0
    learnt: int = 0
    projected: int = 0
    seconds: float = 0.0

    def since(self, earlier: Done) -> Done:
        """What was done after `earlier`."""
        return Done(**{name: value - getattr(earlier, name) for name, value in vars(self).items()})


class Meter:
    """Counts a fit's batches and its time.

    Args:
        model: it tells the operations that a batch takes.
        suffix: number of label-tree tokens behind every row.
        checkpointing: whether layers run forward twice.
    """

    def __init__(self, model: Any, suffix: int, checkpointing: bool) -> None:
        self.costs, self.dtype = flops.of(model, checkpointing), flops.dtype_of(model)
        self.reads = 0 if getattr(model, "head", None) is not None else 1 + suffix
        self.done, self.last = Done(), Done()
        self.rate = hardware.matmul_rate(self.dtype)  # measured before the clock runs
        self._since: float | None = None

    def count(self, rows: Sequence[dict[str, Any]], batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """Count an optimiser step of this process; nothing on a device is looked at.

        Args:
            rows: its rows.
            batches: they, as they are cut; a prefix that rows share is forwarded once for each.
        """
        done = self.done
        done.steps += 1
        done.rows += len(rows)
        done.tokens += sum(len(row["input_ids"]) for row in rows)
        done.learnt += sum(
            1 if "target" in row else sum(label != IGNORE for label in row["labels"][1:]) for row in rows
        )
        for batch in batches:
            b, s = batch["input_ids"].shape
            before = len(batch.get("prefix", ()))
            done.positions += b * s + before
            done.pairs += (
                _pairs(batch["lengths"], s)
                if "segments" in batch and "lengths" in batch
                else (b * s * (before + s) + before * before)
            )
            read = b * self.reads if "targets" in batch else batch["read"].numel()
            done.projected += read + len(batch.get("prefix_labels", ()))

    def start(self) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            hardware.wait()  # what the device has still to do is part of the time
            self.done.seconds += time.monotonic() - self._since
            self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for what is no training: validation, saving."""
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def lap(self) -> dict[str, float]:
        """Figures since the last lap, for the log; all processes take their laps together."""
        with self.paused():
            now = replace(self.done)
        found, self.last = self.figures(now.since(self.last)), now
        return found

    def facts(self) -> dict[str, float]:
        """Figures of the whole fit, and what the share is of, for the run's record."""
        with self.paused():
            done = self.done
        rate = processes.total(np.array([self.rate]))[0]
        return {**self.figures(done), "matmul_gflops": round(rate / 1e9, 1), "seconds": round(done.seconds, 2)}

    def figures(self, done: Done) -> dict[str, float]:
        """Rates of finished work; all processes ask together.

        Args:
            done: by this process.

        Returns:
            of all processes samples and real tokens per second, the share of real tokens that are learnt, and the
            operations done per second over the measured rates of matrix products (MFU); peak memory in GiB of the
            process that has taken most.
        """
        done, rate, peak = _together(done, self.rate, hardware.peak_memory())
        seconds = max(done.seconds, 1e-9)
        work = self.costs.total(done.positions, done.pairs, float(done.projected), done.rows)
        return {
            "samples_per_second": round(done.rows / seconds, 2),
            "tokens_per_second": round(float(done.tokens) / seconds, 1),
            "trainable_token_share": round(float(done.learnt) / max(float(done.tokens), 1), 4),
            "mfu": round(work / seconds / rate, 4),
            "peak_memory_gib": round(peak / 2**30, 3),
        }


def _pairs(rows: torch.Tensor, width: int) -> int:
    """Pairs of positions in one line of rows of such lengths: each row sees itself and the line's head."""
    head = width - int(rows.sum())
    return int((rows * (head + rows)).sum()) + head * head


def _together(done: Done, rate: float, peak: float) -> tuple[Done, float, float]:
    """Add up what the processes have done in the same time.

    Returns:
        The work, its seconds those of one process; the sum of the rates; the largest peak.
    """
    peaks = np.zeros(processes.world())
    peaks[processes.rank()] = peak
    number, rate, *values = processes.total(np.array([1, rate, *vars(done).values(), *peaks])).tolist()
    summed: dict[str, Any] = dict(zip(vars(done), values, strict=False))
    return Done(**{**summed, "seconds": summed["seconds"] / number}), rate, max(values[len(summed) :])
