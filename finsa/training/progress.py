"""What a user sees and keeps of a training run while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.measure import Measurement
from transformers import TrainerCallback

from finsa.runs.progress import Display, Work
from finsa.training.throughput import Meter


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows steps with loss, throughput and time left, and passes every record on.

    Args:
        meter: gives the trainer's meter, once there is a trainer.
        record: takes each log record, with the step it belongs to.
        display: shows them.
    """

    def __init__(
        self, meter: Callable[[], Meter], record: Callable[[int, dict[str, float]], None], display: Display
    ) -> None:
        self.meter, self.record, self.step, self.display = meter, record, 0, display
        self.console, self.bar = display.console, display.bar
        self.work: Work | None = None
        self.closed = ExitStack()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the bar, however the training ends."""
        with self.closed:
            yield

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar where the run stands."""
        self.meter().start()
        self.step = state.global_step
        shown = self.display.work("training", state.max_steps, done=state.global_step, at_once=True)
        self.work = self.closed.enter_context(shown)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.step = state.global_step
        if self.work is not None:
            self.work.move(state.global_step)

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
            if self.work is not None:
                self.work.note("  ".join(numbers), self._fitting(self.work, numbers))
        if "eval_loss" in logs:
            scores = "  ".join(
                f"{key.removeprefix('eval_')} {value:.4f}" for key, value in logs.items() if "eval_" in key
            )
            self.console.print(f"  step {state.global_step}/{state.max_steps}  validation: {scores}", highlight=False)
        self.record(state.global_step, logs)

    def _fitting(self, work: Work, numbers: Sequence[str]) -> str:
        """The first of the numbers, as many as leave room for the step, the total and the time left."""
        self.bar.update(work.task, numbers="")
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
        self.closed.close()
