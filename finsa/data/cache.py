"""What was computed once, kept on disk under a hash of everything that it depends on.

An entry is a folder that appears whole, by a rename; whoever comes second throws the own copy away. The name is made of
the content of the input, the settings and the source code that makes the entry, so a stale one is never found.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from finsa.data.labels import LabelSpace
from finsa.data.ledger import Ledger

if TYPE_CHECKING:
    from finsa.data.table import Table


def key(*parts: object) -> str:
    """Hash of parts and of the code in this package, as 32 hexadecimal digits."""
    digest = hashlib.sha256(_code().encode())
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:32]


@lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the source code that turns files into rows and tokens, and of the libraries that do the work."""
    digest = hashlib.sha256(f"polars {pl.__version__}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(frame: pl.DataFrame) -> str:
    """Hash of a frame's rows in their order, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in frame.iter_slices(100_000):
        lines = part.select(pl.concat_str(pl.all().cast(pl.String), separator="\x1f")).to_series()
        digest.update("".join(f"{line}\x1e" for line in lines).encode())
    return digest.hexdigest()[:16]


def entry(place: Path, build: Callable[[Path], None]) -> Path:
    """Find an entry, or build it.

    Args:
        place: the entry's folder.
        build: writes the files into the folder it is given.

    Returns:
        The folder. Where it cannot be written (a full disk, a read-only folder), the error is the caller's to see.
    """
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            build(made)
            try:
                made.rename(place)
            except OSError:  # another process was faster; its entry has the same content
                if not place.is_dir():
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    os.utime(place)  # so that entries which nobody uses any more can be told by their age
    return place


# ------------------------------------------------------------------------------------------------ tables


def table(folder: str, settings: str, files: Iterable[Path], build: Callable[[], Table]) -> Table:
    """Read a table from the cache; build and keep it where it is not there."""
    name = key("table", settings, *(f"{file} {file_hash(file)}" for file in files))
    made: list[Table] = []

    def write(place: Path) -> None:
        made.append(build())
        _write_table(made[0], place)

    place = entry(Path(folder).absolute() / f"table-{name}", write)
    return made[0] if made else _read_table(place)


def _write_table(table: Table, place: Path) -> None:
    for split, frame in table.splits.items():
        frame.write_ipc(place / f"{split}.arrow")
    table.dropped.write_ipc(place / "dropped.arrow")
    facts = {"ledger": vars(table.ledger), "labels": asdict(table.labels), "fingerprint": table.fingerprint}
    (place / "table.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _read_table(place: Path) -> Table:
    from finsa.data.splits import SPLITS
    from finsa.data.table import Table

    facts = json.loads((place / "table.json").read_text(encoding="utf-8"))
    ledger = Ledger(**facts["ledger"])
    ledger.read, ledger.buckets = Counter(ledger.read), Counter(ledger.buckets)
    parts = {split: pl.read_ipc(place / f"{split}.arrow") for split in SPLITS}
    labels = LabelSpace(**{name: tuple(words) for name, words in facts["labels"].items()})
    return Table(parts, labels, ledger, facts["fingerprint"], pl.read_ipc(place / "dropped.arrow"))


# ------------------------------------------------------------------------------------------------ arrays


def arrays(place: Path, build: Callable[[], dict[str, np.ndarray[Any, Any]]]) -> dict[str, np.ndarray[Any, Any]]:
    """Read arrays from the cache, mapped into memory; build and keep them where they are not there."""

    def write(folder: Path) -> None:
        for name, values in build().items():
            np.save(folder / f"{name}.npy", values, allow_pickle=False)

    files = sorted(entry(place, write).glob("*.npy"))
    return {file.stem: np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None) for file in files}
