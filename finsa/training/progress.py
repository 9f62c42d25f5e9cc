"""What a user sees and keeps of a training run while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from finsa import processes


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows a bar with loss, tokens per second and time left, and passes every record on.

    Args:
        tokens: gives the number of real tokens trained on so far.
        record: takes each log record, with the step it belongs to.
    """

    def __init__(self, tokens: Callable[[], int], record: Callable[[int, dict[str, float]], None]) -> None:
        self.tokens, self.record = tokens, record
        self.console = Console(stderr=True, quiet=not processes.first())
        self.last: tuple[float, int] = (0.0, 0)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the bar, however the training ends."""
        try:
            yield
        finally:
            self.bar.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar where the run stands."""
        self.last = (time.monotonic(), self.tokens())
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, numbers="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show and pass on a record; step records get their throughput."""
        logs = dict(logs or {})
        if "loss" in logs:
            now, tokens = time.monotonic(), self.tokens()
            logs["tokens_per_second"] = round((tokens - self.last[1]) / max(now - self.last[0], 1e-9), 1)
            self.last = (now, tokens)
            numbers = f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,.0f} tokens/s"
            self.bar.update(self.task, numbers=numbers)
        if "eval_loss" in logs:
            scores = "  ".join(
                f"{key.removeprefix('eval_')} {value:.4f}" for key, value in logs.items() if "eval_" in key
            )
            self.console.print(f"  step {state.global_step}/{state.max_steps}  validation: {scores}", highlight=False)
        self.record(state.global_step, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.stop()
