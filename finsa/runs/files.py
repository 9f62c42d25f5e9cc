"""Files that appear whole or not at all: written beside their place, brought to the disk, renamed.

A kill at any moment leaves the old file or the new one. A rename alone is not enough for a power cut: names may reach
the disk before contents, so that both are synchronised.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

# What `fsync` answers where the file system cannot synchronise at all. Anything else is a failure to write.
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
STAGING = ".saving-"  # what a kill leaves under this name is removed by whoever writes there next


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; skipped where the file system cannot do that.

    Raises:
        OSError: where it failed, such as EIO: what was written may be lost.
    """
    folder = path.is_dir()
    try:
        number = os.open(path, os.O_RDWR if os.name == "nt" and not folder else os.O_RDONLY)
    except PermissionError:
        if folder:  # it may be writable without being readable, and Windows opens no folders
            return
        raise
    try:
        sync_open(number, path)
    finally:
        os.close(number)


def sync_open(number: int, path: Path) -> None:
    """`sync` of an open file descriptor.

    Args:
        path: of the file, for the message.
    """
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a temporary file beside `file` that takes its place at the end; after an error nothing has changed.

    The temporary name keeps the ending, because figures and tables are written by it.
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
    """Write a text file, whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a temporary folder within `folder` whose entries move into it at the end, each of them whole.

    An entry that is there already is replaced.
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
    """Rename a file or folder to its place; what stands there goes away first, out of sight before it is removed."""
    if place.exists():
        remove(place)
    entry.rename(place)
    sync(place.parent)


def remove(place: Path) -> None:
    """Remove a file or folder so that nobody ever sees half of it."""
    if not place.is_dir():
        place.unlink(missing_ok=True)
        return
    hidden = place.with_name(f"{STAGING}old-{place.name}-{token_hex(2)}")
    place.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what a kill left while a folder was written."""
    for left in folder.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Bring a folder with everything in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place) / name)
        sync(Path(place))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path within it."""
    return {file.relative_to(folder).as_posix(): digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
