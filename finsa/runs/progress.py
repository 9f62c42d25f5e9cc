"""Progress of work that takes a while: a bar on a terminal, a line every so often where there is none."""

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

SHORT = 2.0  # seconds; work that takes less is not shown on a terminal
PREPARING = 10.0  # seconds between lines while data are read and tokenized, for which nothing is configured
Moved = Callable[[int], None]


def ignored(done: int) -> None:
    """Takes progress that nobody looks at."""


class Display:
    """Shows work on stderr; process 0 of several shows it for all.

    Args:
        every: seconds between lines where stderr is no terminal; None: no lines.
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
        """Show a piece of work for as long as this lasts; within another one, in its place.

        Args:
            title: what is done.
            total: rows or steps; None: not known.
            done: how many of them there are already.
            at_once: show a bar even if it may be over soon.

        Yields:
            What moves it on.
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
                self.bar.stop()  # what is shown at the end stays
            self.bar.remove_task(work.task)

    def innermost(self, work: Work) -> bool:
        """Whether no other work is shown within a piece of work."""
        return bool(self._open) and self._open[-1] is work


class Work:
    """A piece of work that is shown.

    Args:
        display: shows it.
        title, total, done, at_once: see `Display.work`.

    Attributes:
        numbers: what a line has besides, such as a loss.
    """

    def __init__(self, display: Display, title: str, total: int | None, done: int, at_once: bool) -> None:
        self.display, self.title, self.total, self.done, self.before = display, title, total, done, done
        self.over, self.started, self.numbers = threading.Event(), time.monotonic(), ""
        self.task: TaskID = display.bar.add_task(title, total=total, completed=done, numbers="", visible=False)

    def moved(self, by: int) -> None:
        """Note that so many rows or steps more are done."""
        self.move(self.done + by)

    def move(self, done: int) -> None:
        """Note how many rows or steps are done."""
        self.done = done
        self.display.bar.update(self.task, completed=done)

    def note(self, numbers: str, shown: str) -> None:
        """Note numbers for the lines, and what of them fits beside the bar."""
        self.numbers = numbers
        self.display.bar.update(self.task, numbers=shown)

    def show(self) -> None:
        """Show its bar from now on."""
        self.display.bar.update(self.task, visible=True)
        self.display.bar.start()

    def watch(self) -> None:
        """Show a bar once the work has taken a while, or a line every so often; runs in a thread of its own."""
        display = self.display
        if display.console.is_terminal:
            if not self.over.wait(SHORT):
                self.show()
        elif display.every is not None and processes.is_main():
            while not self.over.wait(display.every):
                if display.innermost(self):
                    display.console.print(self.line(), highlight=False, soft_wrap=True)

    def line(self) -> str:
        """How far it is, and how long it takes."""
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
