"""One process at a time in a folder. The kernel gives a lock back when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from finsa.errors import RunError

LOCK = ".lock"


def holder(file: Path) -> str | None:
    """Who holds a lock: ``process 123, started 2026-01-31T12:00:00+00:00``; None where nobody does."""
    if not file.is_file():
        return None
    with file.open("r", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _named(stream.read())
    return None


def _named(text: str) -> str:
    try:
        known = json.loads(text)
        return f"process {known['pid']} on {known['machine']}, started {known['started']}"
    except (ValueError, LookupError, TypeError):  # it is just being written
        return "another process"


@contextmanager
def held(file: Path, what: str) -> Iterator[None]:
    """Hold a lock; its folder is there.

    Args:
        file: the lock; it stays behind, and means nothing without a process.
        what: what is locked, for the message.

    Raises:
        RunError: where another process holds it, naming it.
    """
    while True:
        with _opened(file) as stream:
            if not _take(stream):
                user = _named(stream.read())
                raise RunError(f"{what} is in use by {user}. Wait for it or stop it; two would overwrite each other")
            if not _there(file, stream):
                continue
            _sign(stream)
            yield
            return


@contextmanager
def making(output: Path) -> Iterator[None]:
    """Hold the lock of an output that is not there yet; it lies beside the output, and goes away at the end.

    Args:
        output: file or folder; the folder that it lies in is made.

    Raises:
        RunError: where another process is making it, naming that process.
    """
    file = output.with_name(f".{output.name}{LOCK}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with held(file, f"output {output}"):
        try:
            yield
        finally:
            with suppress(OSError):  # a lock that stays behind means nothing
                file.unlink()


@contextmanager
def waited(file: Path, seconds: float = 0.05) -> Iterator[None]:
    """Hold a lock, waiting for whoever holds it."""
    with _opened(file) as stream:
        while not _take(stream):
            time.sleep(seconds)
        _sign(stream)
        yield


def _opened(file: Path) -> IO[str]:
    return os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")


def _take(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _there(file: Path, stream: IO[str]) -> bool:
    """Whether a lock is still the file of its name: who held it before may have removed it since it was opened."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _sign(stream: IO[str]) -> None:
    stream.seek(0)
    stream.truncate()
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    stream.write(json.dumps({"pid": os.getpid(), "machine": os.uname().nodename, "started": started}))
    stream.flush()
