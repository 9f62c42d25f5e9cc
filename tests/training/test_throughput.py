"""What several processes get done is told of the whole job, the same in each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from base_models import small

from finsa.models import hardware
from finsa.runs import processes
from finsa.training.throughput import Meter

SECONDS, RATE = 2.0, 1e7


class Job:
    """Processes one after another: first each tells its numbers, then each asks for the sums."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.number, self.rank, self.told = number, 0, dict[int, np.ndarray]()
        monkeypatch.setattr(processes, "world", lambda: number)
        monkeypatch.setattr(processes, "rank", lambda: self.rank)
        monkeypatch.setattr(processes, "total", self.total)
        monkeypatch.setattr(hardware, "peak_memory", lambda: (1 + self.rank) * 2**30)
        monkeypatch.setattr(hardware, "matmul_rate", lambda dtype: RATE)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Note a process's numbers; once all have told theirs, their sum."""
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
    """Count one step of rows, each with one token that is learnt."""
    meter = Meter(small(), 0, False)
    rows: list[dict[str, Any]] = [{"input_ids": [1] * n, "labels": [-100] * (n - 1) + [1]} for n in lengths]
    batch = {"input_ids": torch.ones(len(lengths), max(lengths)), "read": torch.ones(len(lengths))}
    meter.count(rows, [batch])
    meter.done.seconds = SECONDS
    return meter.lap()


@pytest.mark.parametrize("shares", [[[4, 9, 9]], [[4, 9, 9], [9, 9, 9, 5, 9]]])
def test_figures_are_those_of_all_processes(shares: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
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
