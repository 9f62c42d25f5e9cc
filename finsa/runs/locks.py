"""File locks, so that one process at a time writes to a folder; the system releases them when a process ends."""

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
    """The holder of a lock: ``process 123 on node7, started 2026-01-31T12:00:00+00:00``; None if it is free."""
    if not file.is_file():
        return None
    try:
        with _probing(file), FileLock(file, blocking=False, preserve_lock_file=True):
            return None
    except Timeout:
        return _read_holder(file)
    except OSError:  # the folder is read-only for this process; a holder that ended normally has removed its name
        return _read_holder(file) if file.stat().st_size else None


@contextmanager
def _probing(file: Path) -> Iterator[None]:
    """Exclude other processes that only probe a lock: within, a lock that cannot be acquired is really held."""
    probe = file.with_name(f"{file.name}.probe")
    with FileLock(probe, poll_interval=0.002):  # held for a moment only
        try:
            yield
        finally:
            with suppress(OSError):
                probe.unlink()


def _read_holder(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(1)
            known = json.loads(stream.read())
        return f"process {known['pid']} on {known['machine']}, started {known['started']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is being written right now
        return "another process"


@contextmanager
def held(file: Path, what: str) -> Iterator[None]:
    """Hold a lock.

    Args:
        file: the lock file, in an existing folder; it is not removed afterwards.
        what: what is locked, for the message.

    Raises:
        RunError: if another process holds it, with that process.
    """
    lock, descriptors = _lock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        try:
            with _probing(file):
                lock.acquire(timeout=0.05, poll_interval=0.01)  # in case the file was removed meanwhile
        except Timeout:
            user = _read_holder(file)
            raise RunError(
                f"{what} is in use by {user}. Wait for it or stop it; two would overwrite each other"
            ) from None
    with _released(lock, descriptors):
        yield


@contextmanager
def creating(output: Path) -> Iterator[None]:
    """Hold the lock of an output that does not exist yet: a file next to it, which is removed at the end.

    Args:
        output: file or folder; its parent folder is created.

    Raises:
        RunError: if another process is creating it, with that process.
    """
    file = output.with_name(f".{output.name}{LOCK}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with held(file, f"output {output}"):
        try:
            yield
        finally:
            with suppress(OSError):  # a leftover lock file has no effect; Windows removes it on release
                file.unlink()


@contextmanager
def waiting(file: Path, seconds: float = 0.05) -> Iterator[None]:
    """Hold a lock, after waiting for the process that holds it; `seconds` between attempts."""
    lock, descriptors = _lock(file)
    lock.acquire(poll_interval=seconds)
    with _released(lock, descriptors):
        yield


def _lock(file: Path) -> tuple[FileLock, list[int]]:
    """A lock that writes its holder into its file, and a list that receives the file descriptors."""
    descriptors: list[int] = []

    def write_holder(descriptor: int) -> None:  # after byte 0, which Windows locks against readers as well
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "machine": platform.node(), "started": started}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f" {json.dumps(holder)}".encode())
        descriptors.append(descriptor)

    return FileLock(file, on_acquired=write_holder, preserve_lock_file=True), descriptors


@contextmanager
def _released(lock: FileLock, descriptors: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):  # so that this process is not mistaken for the next holder
            os.ftruncate(descriptors[-1], 0)
        lock.release()
