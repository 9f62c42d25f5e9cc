"""What a user sees and keeps of a training run while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from finsa import processes
from finsa.training.throughput import Meter


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows a bar with loss, throughput and time left, and passes every record on.

    Args:
        meter: gives the trainer's meter, once there is a trainer.
        record: takes each log record, with the step it belongs to.
    """

    def __init__(self, meter: Callable[[], Meter], record: Callable[[int, dict[str, float]], None]) -> None:
        self.meter, self.record, self.step = meter, record, 0
        self.console = Console(stderr=True, quiet=not processes.first())
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=28 if self.console.width >= 140 else 10),
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
        self.meter().start()
        self.step = state.global_step
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, numbers="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.step = state.global_step
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show and pass on a record; step records get their throughput."""
        logs = dict(logs or {})
        if "loss" in logs:
            logs |= self.meter().lap()
            numbers = (
                f"loss {logs['loss']:.3f}",
                f"{logs['samples_per_second']:,.1f} samples/s",
                f"{logs['tokens_per_second']:,.0f} tokens/s",
                f"{logs['peak_memory_gib']:.1f} GiB",
                f"MFU {logs['mfu']:.0%}",
            )
            self.bar.update(self.task, numbers=self._fitting(numbers))
        if "eval_loss" in logs:
            scores = "  ".join(
                f"{key.removeprefix('eval_')} {value:.4f}" for key, value in logs.items() if "eval_" in key
            )
            self.console.print(f"  step {state.global_step}/{state.max_steps}  validation: {scores}", highlight=False)
        self.record(state.global_step, logs)

    def _fitting(self, numbers: Sequence[str]) -> str:
        """The first of the numbers, as many as leave room for the step, the total and the time left."""
        self.bar.update(self.task, numbers="")
        width = Measurement.get(self.console, self.console.options, self.bar.make_tasks_table(self.bar.tasks)).maximum
        shown, room = "", self.console.width - width
        for number in numbers:
            longer = f"{shown}  {number}" if shown else number
            if len(longer) > room:
                break
            shown = longer
        return shown

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.meter().stop()
        self.bar.stop()
