"""The progress bar at several widths, and throughput figures that are the same in all processes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from base_models import small
from rich.cells import cell_len

from finsa.models import hardware
from finsa.runs import processes
from finsa.runs.progress import Display
from finsa.training.progress import Meter, ProgressCallback

NUMBERS = {"samples_per_second": 1234.5, "tokens_per_second": 123456.7, "mfu": 0.37, "peak_memory_gib": 12.3}
METER: Any = SimpleNamespace(start=lambda: None, stop=lambda: None, lap=lambda: NUMBERS)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, ""),
        (80, "loss 1.234"),
        (100, "loss 1.234  1,234.5 samples/s  123,457 tokens/s"),
        (120, "loss 1.234  1,234.5 samples/s  123,457 tokens/s  12.3 GiB  MFU 37%"),
        (160, "loss 1.234  1,234.5 samples/s  123,457 tokens/s  12.3 GiB  MFU 37%"),
    ],
)
def test_the_bar_keeps_the_total_and_the_time_left(
    width: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fields that do not fit are dropped: MFU first, then memory, tokens and samples per second."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    callback = ProgressCallback(lambda: METER, lambda step, values: None, Display(every=None))
    state = SimpleNamespace(global_step=123, max_steps=12345)
    with callback.closing():
        callback.on_train_begin(None, state, None)
        callback.on_log(None, state, None, logs={"loss": 1.234})
        callback.bar.refresh()
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    line = [line for line in re.split(r"[\r\n]+", written) if "training" in line][-1]
    assert cell_len(line) <= width
    assert re.fullmatch(rf"training \S* +123/12345 {re.escape(shown)} 0:00:00 left -:--:-- *", line), line


SECONDS, RATE = 2.0, 1e7


class Job:
    """Simulated processes: first each reports its numbers, then each gets the sums."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.number, self.rank, self.told = number, 0, dict[int, np.ndarray]()
        monkeypatch.setattr(processes, "world_size", lambda: number)
        monkeypatch.setattr(processes, "rank", lambda: self.rank)
        monkeypatch.setattr(processes, "all_reduce", self.total)
        monkeypatch.setattr(hardware, "peak_memory", lambda: (1 + self.rank) * 2**30)
        monkeypatch.setattr(hardware, "matmul_rate", lambda dtype: RATE)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Record a process's numbers; after all have reported, return their sum."""
        self.told.setdefault(self.rank, values)
        return np.sum(list(self.told.values()), axis=0) if len(self.told) == self.number else values

    def laps(self, shares: list[list[int]]) -> list[dict[str, float]]:
        """A lap of each process; a share is the lengths of its rows."""
        for _ in range(2):
            found = []
            for self.rank, lengths in enumerate(shares):
                found.append(lap(lengths))
        return found


def lap(lengths: list[int]) -> dict[str, float]:
    """Count one step of rows, each with one token in the loss."""
    meter = Meter(small(), 0, False)
    rows: list[dict[str, Any]] = [{"input_ids": [1] * n, "labels": [-100] * (n - 1) + [1]} for n in lengths]
    batch = {"input_ids": torch.ones(len(lengths), max(lengths)), "read": torch.ones(len(lengths))}
    meter.count(rows, [batch])
    meter.done.seconds = SECONDS
    return meter.lap()


@pytest.mark.parametrize("shares", [[[4, 9, 9]], [[4, 9, 9], [9, 9, 9, 5, 9]]])
def test_throughput_covers_all_processes(shares: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = Job(monkeypatch, len(shares)).laps(shares)
    assert all(each == found[0] for each in found)
    rows, tokens = sum(map(len, shares)), sum(map(sum, shares))
    assert found[0]["samples_per_second"] == rows / SECONDS
    assert found[0]["tokens_per_second"] == tokens / SECONDS
    assert found[0]["trainable_token_share"] == pytest.approx(rows / tokens, abs=1e-4)
    assert found[0]["peak_memory_gib"] == len(shares)
    monkeypatch.undo()
    alone = Job(monkeypatch, 1).laps([[9] * rows])[0]  # the same work, padding included, in one process
    assert found[0]["mfu"] == pytest.approx(alone["mfu"] / len(shares), abs=1e-4)
    assert alone["mfu"] > 0.3
