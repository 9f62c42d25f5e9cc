"""Progress of a training run: steps, loss and remaining time; throughput, memory and MFU.

Nothing here synchronizes with the device between two log records: all counts are known on the host. Several processes
sum their counts when a record is logged, and at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.measure import Measurement
from transformers import TrainerCallback

from finsa.data.rows import IGNORE
from finsa.models import flops, hardware
from finsa.runs import processes
from finsa.runs.progress import Display, Work


@dataclass
class Counts:
    """Work done by one process, or by all processes.

    Args:
        steps: number of optimizer steps.
        rows: number of rows.
        positions: tokens in forward passes, including padding.
        pairs: pairs of positions for which attention was computed.
        tokens: real tokens.
        labeled: tokens with a label; rows, if the loss is over the classes.
        projected: positions that the LM head was applied to.
        seconds: of training, without validation and saving.
    """

    steps: int = 0
    rows: int = 0
    positions: int = 0
    pairs: int = 0
    tokens: int = 0
    labeled: int = 0
    projected: int = 0
    seconds: float = 0.0

    def since(self, earlier: Counts) -> Counts:
        """The work done after `earlier`."""
        return Counts(**{name: value - getattr(earlier, name) for name, value in vars(self).items()})


class Meter:
    """Counts the batches and the time of a fit.

    Args:
        model: determines the FLOPs of a batch.
        suffix: number of label-tree tokens after every row.
        checkpointing: whether gradient checkpointing is used.
    """

    def __init__(self, model: Any, suffix: int, checkpointing: bool) -> None:
        self.costs, self.dtype = flops.estimate(model, checkpointing), flops.compute_dtype(model)
        self.reads = 0 if getattr(model, "head", None) is not None else 1 + suffix
        self.done, self.last = Counts(), Counts()
        self.rate = hardware.matmul_rate(self.dtype)  # measured before the clock starts
        self._since: float | None = None

    def count(self, rows: Sequence[dict[str, Any]], batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """Count an optimizer step of this process.

        Args:
            rows: of the step.
            batches: its micro-batches; each forwards a shared prefix once.
        """
        done = self.done
        done.steps += 1
        done.rows += len(rows)
        done.tokens += sum(len(row["input_ids"]) for row in rows)
        done.labeled += sum(
            1 if "target" in row else sum(label != IGNORE for label in row["labels"][1:]) for row in rows
        )
        for batch in batches:
            b, s = batch["input_ids"].shape
            prefix = len(batch.get("prefix", ()))
            done.positions += b * s + prefix
            if "position_ids" in batch:  # packed: each row attends to itself and to the prefix of the sequence
                lengths = batch["lengths"]
                packed_prefix = s - int(lengths.sum())
                done.pairs += int((lengths * (packed_prefix + lengths)).sum()) + packed_prefix**2
            else:
                done.pairs += b * s * (prefix + s) + prefix * prefix
            read = b * self.reads if "targets" in batch else batch["read"].numel()
            done.projected += read + len(batch.get("prefix_labels", ()))

    def start(self) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            hardware.synchronize()  # operations that are still queued on the device count
            self.done.seconds += time.monotonic() - self._since
            self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock temporarily, for validation and saving."""
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def lap(self) -> dict[str, float]:
        """Figures since the last call, for the log; all processes call this at the same step."""
        with self.paused():
            now = replace(self.done)
        since, self.last = now.since(self.last), now
        return self.figures(since)

    def facts(self) -> dict[str, float]:
        """Figures of the whole fit, and the matmul rate that MFU refers to, for ``run.json``."""
        with self.paused():
            done = self.done
        rate = processes.all_reduce(np.array([self.rate]))[0]
        return {**self.figures(done), "matmul_gflops": round(rate / 1e9, 1), "seconds": round(done.seconds, 2)}

    def figures(self, done: Counts) -> dict[str, float]:
        """Throughput over all processes, which call this at the same step.

        Args:
            done: by this process.

        Returns:
            Samples and real tokens per second, the share of real tokens that have a label, FLOPs per second over the
            measured matmul rates (MFU), and the largest peak memory of a process in GiB.
        """
        peaks = np.zeros(processes.world_size())
        peaks[processes.rank()] = hardware.peak_memory()
        values = processes.all_reduce(np.array([1, self.rate, *vars(done).values(), *peaks])).tolist()
        number, rate, summed, peak = values[0], values[1], values[2 : -len(peaks)], max(values[-len(peaks) :])
        work: dict[str, Any] = dict(zip(vars(done), summed, strict=True))
        seconds = max(work["seconds"] / number, 1e-9)
        operations = self.costs.total(work["positions"], work["pairs"], work["projected"], work["rows"])
        return {
            "samples_per_second": round(work["rows"] / seconds, 2),
            "tokens_per_second": round(work["tokens"] / seconds, 1),
            "trainable_token_share": round(work["labeled"] / max(work["tokens"], 1), 4),
            "mfu": round(operations / seconds / rate, 4),
            "peak_memory_gib": round(peak / 2**30, 3),
        }


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Displays steps with loss, throughput and remaining time, and passes on every log record.

    Args:
        meter: returns the meter of the trainer, which is created later.
        record: receives each log record with its step.
        display: displays the progress.
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
        """Close the bar at the end, also after an error."""
        with self.closed:
            yield

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, at the step from which the run is resumed."""
        self.meter().start()
        self.step = state.global_step
        work = self.display.work("training", state.max_steps, done=state.global_step, at_once=True)
        self.work = self.closed.enter_context(work)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.step = state.global_step
        if self.work is not None:
            self.work.move(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Display and pass on a record; training records get the throughput."""
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
        """As many of the figures as leave room on the line for the step, the total and the remaining time."""
        self.bar.update(work.task, numbers="")
        width = Measurement.get(self.console, self.console.options, self.bar.make_tasks_table(self.bar.tasks)).maximum
        text, room = "", self.console.width - width
        for number in numbers:
            longer = f"{text}  {number}" if text else number
            if len(longer) > room:
                break
            text = longer
        return text

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.meter().stop()
        self.closed.close()
