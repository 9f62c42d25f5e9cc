"""Atomic writes: a file is written under a temporary name, synchronized to disk, and renamed.

A kill at any moment leaves the old file or the new one. A rename alone does not survive a power failure: names may
reach the disk before contents, so both are synchronized.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from finsa.errors import RunError

# Errors of `fsync` on file systems that do not support it. Any other error means that a write failed.
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
STAGING = ".saving-"  # prefix of temporary names; the next process that writes to a folder removes leftovers


def require_new(output: Path, kind: str = "folder") -> None:
    """Check that an output does not exist yet, or is an empty folder.

    Args:
        output: path of a file or folder to be written.
        kind: ``file`` or ``folder``.

    Raises:
        RunError: if it exists, or one of its parents is a file.
    """
    if output.is_file() or (output.is_dir() and (kind == "file" or any(output.iterdir()))):
        raise RunError(f"output: {output} already exists; name another {kind}, or remove it")
    if any(parent.is_file() for parent in output.parents):
        raise RunError(f"output: {output} is below a file; name another {kind}")


def sync(path: Path) -> None:
    """Synchronize a file, or the names in a folder, to disk; skipped if the file system does not support it.

    Raises:
        OSError: if that failed, for instance with EIO: data may be lost.
    """
    folder = path.is_dir()
    try:
        number = os.open(path, os.O_RDWR if os.name == "nt" and not folder else os.O_RDONLY)
    except PermissionError:
        if folder:  # it may be writable but not readable, and Windows does not open folders
            return
        raise
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(number)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Replace a file by the temporary file that this yields; after an error the old file is unchanged.

    The temporary name keeps the suffix, because libraries choose the format by it.
    """
    temporary = file.with_name(f".{file.stem}.part{file.suffix}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def json_lines(file: Path) -> list[Any]:
    """Read a JSON Lines file; unlike `str.splitlines`, lines end only at line feeds, so texts may contain U+2028.

    Raises:
        ValueError: for a line that is not valid JSON.
    """
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose entries are moved into `folder` at the end, each of them atomically.

    Existing entries of the same name are replaced.
    """
    clear(folder)
    temporary = folder / f"{STAGING}{os.getpid()}-{token_hex(2)}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        for entry in sorted(temporary.iterdir()):
            move(entry, folder / entry.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move(entry: Path, place: Path) -> None:
    """Rename a file or folder to its final place; what exists there is removed first, see `remove`."""
    if place.exists():
        remove(place)
    entry.rename(place)
    sync(place.parent)


def remove(place: Path) -> None:
    """Remove a file or folder; a folder is renamed first, so that no process sees it half removed."""
    if not place.is_dir():
        place.unlink(missing_ok=True)
        return
    hidden = place.with_name(f"{STAGING}old-{place.name}-{token_hex(2)}")
    place.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove temporary folders that a killed process left behind."""
    for left in folder.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Synchronize a folder with all its contents to disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place) / name)
        sync(Path(place))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path relative to it."""
    return {file.relative_to(folder).as_posix(): digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
