"""The progress bar of a training run on a real console, at several widths."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len

from finsa.runs.progress import Display
from finsa.training.progress import ProgressCallback

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
    """What does not fit is dropped: MFU first, then memory, tokens and samples per second."""
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
