"""Ctrl-C and SIGTERM: the first one during training requests a checkpoint; any other stops the command."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from finsa.errors import Stopped

WATCHED = (signal.SIGINT, signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def stopping() -> Iterator[None]:
    """Raise `Stopped` on a signal, so that open files are closed and the run is marked as stopped."""
    with _handled(_stop):
        yield


@contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Record the first signal, and raise `Stopped` on the second one.

    Yields:
        A function that returns the number of the recorded signal; None if there is none.
    """
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        if received:
            raise Stopped(number)
        received.append(number)
        print(
            "stopping after this step (and its validation, if one is due) and saving a checkpoint; a second signal "
            "stops at once",
            file=sys.stderr,
            flush=True,
        )

    with _handled(record):
        yield lambda: received[0] if received else None


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in WATCHED}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
