"""One process at a time in a folder, by filelock: the system releases a lock when its process ends, however it ends."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from finsa.errors import RunError

LOCK = ".lock"


def holder(file: Path) -> str | None:
    """Who holds a lock: ``process 123 on node7, started 2026-01-31T12:00:00+00:00``; None where nobody does."""
    if not file.is_file():
        return None
    try:
        with _probing(file), FileLock(file, blocking=False, preserve_lock_file=True):
            return None
    except Timeout:
        return _named(file)
    except OSError:  # a folder that this process may only read: the holder removes its name when it ends by itself
        return _named(file) if file.stat().st_size else None


@contextmanager
def _probing(file: Path) -> Iterator[None]:
    """Exclude other probes of a lock: within, a lock that cannot be taken is really held, not just looked at."""
    probe = file.with_name(f"{file.name}.probe")
    with FileLock(probe, poll_interval=0.002):  # held for an instant
        try:
            yield
        finally:
            with suppress(OSError):
                probe.unlink()


def _named(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(1)
            known = json.loads(stream.read())
        return f"process {known['pid']} on {known['machine']}, started {known['started']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is just being written
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
    lock, signed = _signing(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        try:
            with _probing(file):
                lock.acquire(timeout=0.05, poll_interval=0.01)  # it may have been removed while it was taken
        except Timeout:
            user = _named(file)
            raise RunError(
                f"{what} is in use by {user}. Wait for it or stop it; two would overwrite each other"
            ) from None
    with _released(lock, signed):
        yield


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
            with suppress(OSError):  # a lock that stays behind means nothing; Windows removes it on release
                file.unlink()


@contextmanager
def waited(file: Path, seconds: float = 0.05) -> Iterator[None]:
    """Hold a lock, waiting for whoever holds it."""
    lock, signed = _signing(file)
    lock.acquire(poll_interval=seconds)
    with _released(lock, signed):
        yield


def _signing(file: Path) -> tuple[FileLock, list[int]]:
    """A lock that names its holder in its file, and the descriptors it was written through."""
    signed: list[int] = []

    def sign(descriptor: int) -> None:  # behind byte 0, which Windows locks against readers as well
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        name = {"pid": os.getpid(), "machine": platform.node(), "started": started}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f" {json.dumps(name)}".encode())
        signed.append(descriptor)

    return FileLock(file, on_acquired=sign, preserve_lock_file=True), signed


@contextmanager
def _released(lock: FileLock, signed: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):  # no other process may take the name of this one for that of the next holder
            os.ftruncate(signed[-1], 0)
        lock.release()
