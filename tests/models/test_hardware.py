"""Measuring the speed of the machine takes a bounded amount of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finsa.models import hardware


class Machine:
    """An infinitely fast machine with this much memory: factors have shapes but no contents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
        self.memory, self.peak = memory, 0
        torch.ones(1, 1, device="meta") @ torch.ones(1, 1, device="meta")  # the first one imports modules
        monkeypatch.setattr(hardware.torch, "ones", self.ones)

    def ones(self, rows: int, columns: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        made = torch.empty(rows, columns, dtype=dtype, device="meta")
        if columns > rows:  # the second factor: the first is there, and the product will have its size
            taken = made.nbytes // 4 + 2 * made.nbytes
            if taken > self.memory:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            self.peak = max(self.peak, taken)
        return made


@pytest.mark.parametrize(("dtype", "peak"), [(torch.float32, 144), (torch.bfloat16, 288)])
def test_timing_takes_little_memory_on_fast_machines(
    dtype: torch.dtype, peak: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, memory=80 * 2**30)
    assert hardware.matmul_rate.__wrapped__(dtype) > 0
    assert machine.peak == peak * 2**20


def test_timing_stops_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, memory=40 * 2**20)
    assert hardware.matmul_rate.__wrapped__(torch.float32) > 0
    assert machine.peak == 36 * 2**20
