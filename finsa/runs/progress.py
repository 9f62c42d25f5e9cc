"""Progress of long-running work: a bar on a terminal, otherwise a line at regular intervals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from finsa.runs import processes

SHORT = 2.0  # seconds; shorter work is not displayed on a terminal
PREPARING = 10.0  # seconds between lines while data are read and tokenized; not configurable
Moved = Callable[[int], None]


def ignored(done: int) -> None:
    """Discard progress."""


class Display:
    """Displays progress on stderr, in process 0 only.

    Args:
        every: seconds between lines if stderr is not a terminal; None: no lines.
    """

    def __init__(self, every: float | None) -> None:
        self.every = every
        self.console = Console(stderr=True, quiet=not processes.is_main())
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28 if self.console.width >= 140 else 10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._open: list[Work] = []

    @contextmanager
    def work(self, title: str, total: int | None, done: int = 0, at_once: bool = False) -> Iterator[Work]:
        """Display the progress of a task while it runs; a task within another one is displayed instead of it.

        Args:
            title: description of the task.
            total: number of rows or steps; None: unknown.
            done: how many of them are already done.
            at_once: display the bar immediately, even if the task may be short.

        Yields:
            The task, which is to be updated.
        """
        work = Work(self, title, total, done, at_once)
        self._open.append(work)
        if at_once:
            work.show()
        thread = threading.Thread(target=work.watch, name="finsa progress", daemon=True)
        thread.start()
        try:
            yield work
        finally:
            work.over.set()
            thread.join()
            self._open.remove(work)
            if not self._open and self.console.is_terminal:
                self.bar.stop()  # the last state stays on the terminal
            self.bar.remove_task(work.task)

    def innermost(self, work: Work) -> bool:
        """Whether no other task is running within this one."""
        return bool(self._open) and self._open[-1] is work


class Work:
    """A task whose progress is displayed.

    Args:
        display: displays it.
        title, total, done, at_once: see `Display.work`.

    Attributes:
        numbers: further figures for the line, such as the loss.
    """

    def __init__(self, display: Display, title: str, total: int | None, done: int, at_once: bool) -> None:
        self.display, self.title, self.total, self.done, self.before = display, title, total, done, done
        self.over, self.started, self.numbers = threading.Event(), time.monotonic(), ""
        self.task: TaskID = display.bar.add_task(title, total=total, completed=done, numbers="", visible=False)

    def moved(self, by: int) -> None:
        """Advance by a number of rows or steps."""
        self.move(self.done + by)

    def move(self, done: int) -> None:
        """Set the number of rows or steps that are done."""
        self.done = done
        self.display.bar.update(self.task, completed=done)

    def note(self, numbers: str, short: str) -> None:
        """Set the further figures: all of them for lines, and those that fit next to the bar."""
        self.numbers = numbers
        self.display.bar.update(self.task, numbers=short)

    def show(self) -> None:
        """Display the bar from now on."""
        self.display.bar.update(self.task, visible=True)
        self.display.bar.start()

    def watch(self) -> None:
        """Display a bar once the task has taken `SHORT` seconds, or a line at intervals; runs in a separate thread."""
        display = self.display
        if display.console.is_terminal:
            if not self.over.wait(SHORT):
                self.show()
        elif display.every is not None and processes.is_main():
            while not self.over.wait(display.every):
                if display.innermost(self):
                    display.console.print(self.line(), highlight=False, soft_wrap=True)

    def line(self) -> str:
        """Format the progress as a line: count, figures, elapsed and remaining time."""
        seconds = time.monotonic() - self.started
        words = [f"{self.done:,} of {self.total:,}"] if self.total is not None else []
        words += [self.numbers] if self.numbers else []
        words += [f"{_clock(seconds)} elapsed"]
        new = self.done - self.before
        if self.total is not None and new > 0:
            words += [f"about {_clock(seconds / new * (self.total - self.done))} left"]
        return f"  {self.title}: {', '.join(words)}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
