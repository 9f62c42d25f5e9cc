"""A cache of computed results on disk; the name of an entry is a hash of everything that it depends on.

An entry is a folder that is created by a rename; the second of two processes discards its copy. The name depends on
the content of the input, the settings and the source code that computes the entry, so a stale one is never read. An
entry whose files have changed or cannot be read is discarded and rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import numpy as np
import polars as pl

from finsa import synthetic
from finsa.errors import DataError
from finsa.runs import files, locks

T = TypeVar("T")
Arrays = dict[str, np.ndarray[Any, Any]]
SIZES = "sizes.json"  # of an entry's other files, in bytes
MANY_BYTES = 4 << 20  # minimum size of the files for a data set to be cached
MANY_TEXTS = 20_000  # minimum number of texts for the tokens of a split to be cached
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(pl.exceptions.PolarsError, pl.exceptions.PanicException),
)


def code(*folders: Path) -> str:
    """Hash of the source code that turns files into rows and tokens, and of the versions of its libraries."""
    digest = hashlib.sha256(" ".join(map(version, ("polars", "tokenizers", "scikit-learn", "numpy"))).encode())
    files = (file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in (".py", ".yaml"))
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


# Computed when this module is loaded: a file edited later is not the code that runs.
CODE = code(Path(__file__).parent, Path(synthetic.__file__).parent)


def key(*parts: object) -> str:
    """Hash of the parts and of the code in this package, 32 hexadecimal digits."""
    digest = hashlib.sha256(CODE.encode())
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:32]


def worthwhile(files: Iterable[Path]) -> bool:
    """Whether the files are so large that the cache is faster than reading them."""
    return sum(file.stat().st_size for file in files) >= MANY_BYTES


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data.files: {file} cannot be read: {error.strerror}") from None


def fingerprint(frame: pl.DataFrame) -> str:
    """Hash of the rows of a frame, in order, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in frame.iter_slices(100_000):
        lines = part.select(pl.concat_str(pl.all().cast(pl.String), separator="\x1f")).to_series()
        digest.update("".join(f"{line}\x1e" for line in lines).encode())
    return digest.hexdigest()[:16]


def text_hash(texts: pl.Series) -> str:
    """Hash of texts and of their lengths."""
    column = texts.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())  # one buffer of offsets, one of characters
    _, ends, characters = column.buffers()
    offsets = np.zeros(1, np.int64)
    if len(column):
        offsets = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
    digest = hashlib.sha256((offsets - offsets[0]).tobytes())
    if characters is not None:
        digest.update(memoryview(characters)[offsets[0] : offsets[-1]])
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ entries


def kept(place: Path, build: Callable[[], T], write: Callable[[T, Path], None], read: Callable[[Path], T]) -> T:
    """Read an entry; if it does not exist or is damaged, build and write it.

    Args:
        place: the entry's folder.
        build: computes the result.
        write: writes it into a folder.
        read: reads it from one.

    Raises:
        DataError: if the folder cannot be written.
    """
    found = _found(place, read)
    if found is not None:
        return found
    with ExitStack() as stack:
        with _writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.waiting(place.parent / f"{locks.LOCK}-{place.name}"))
        found = _found(place, read)  # written by the process that held the lock
        if found is not None:
            return found
        for leftover in place.parent.glob(f".{place.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed while building this entry
        built = build()
        with _writing(place):
            _add(place, lambda folder: write(built, folder))
    again = _found(place, read)  # arrays are now mapped from the disk, and what was built is freed
    return built if again is None else again


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Convert disk errors to an error that names the setting."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.cache: {place.parent} cannot be written: {reason}. Set data.cache=<another folder>, or "
            "data.cache=null to keep nothing"
        ) from None


def _found(place: Path, read: Callable[[Path], T]) -> T | None:
    if not place.is_dir():
        return None
    try:
        if json.loads((place / SIZES).read_text(encoding="utf-8")) == _sizes(place):
            found = read(place)
            with suppress(OSError):  # the folder may belong to another user
                os.utime(place)  # so that unused entries can be recognized by their age
            return found
    except UNREADABLE:
        pass
    shutil.rmtree(place, ignore_errors=True)
    return None


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != SIZES}


def _add(place: Path, write: Callable[[Path], None]) -> None:
    prepared = place.parent / f".{place.name}-{os.getpid()}-{token_hex(4)}"
    prepared.mkdir(parents=True)
    try:
        write(prepared)
        (prepared / SIZES).write_text(json.dumps(_sizes(prepared)), encoding="utf-8")
        files.sync_tree(prepared)
        try:
            prepared.rename(place)
        except OSError:  # another process was faster; its entry is the same
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(prepared, ignore_errors=True)


def folder_of(cache: str, name: str) -> Path:
    """The folder of an entry of ``data.cache``."""
    return Path(cache).expanduser().absolute() / name


def arrays(place: Path, build: Callable[[], Arrays]) -> Arrays:
    """Memory-map arrays from the cache; if they are not cached, build and write them."""

    def write(built: Arrays, folder: Path) -> None:
        for name, values in built.items():
            np.save(folder / f"{name}.npy", values, allow_pickle=False)

    def read(folder: Path) -> Arrays:
        # An array without elements, whose file is a header of 128 bytes, cannot be mapped.
        found = sorted(folder.glob("*.npy"))
        return {file.stem: np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None) for file in found}

    return kept(place, build, write, read)
