"""Ctrl-C and SIGTERM: in a training the first one asks for a checkpoint and the second one ends; elsewhere one ends."""

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
    """Within it a signal raises `Stopped`, so that what is open is closed and marked."""
    with _handled(_stop):
        yield


@contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Within it the first signal is only noted, and the second one raises `Stopped`.

    Yields:
        What tells the signal that has come; None where none has.
    """
    come: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if come:
            raise Stopped(number)
        come.append(number)
        print("stopping after this step, once it is saved; again: at once", file=sys.stderr, flush=True)

    with _handled(note):
        yield lambda: come[0] if come else None


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield
        return
    before = {number: signal.signal(number, handler) for number in WATCHED}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
