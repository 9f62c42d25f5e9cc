"""Output that grows chunk by chunk and survives a kill: parts, their journals, and the joining of them.

A chunk counts once its journal line is whole on disk; what stands behind the last such chunk is cut off when the work
goes on. So no row is lost or doubled, and the finished file is the same whether the work was stopped or not.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from finsa.errors import RunError
from finsa.inference.writers import Format
from finsa.runs import files

STATE = "state.json"
KINDS = ("rows", "rejected")


@dataclass(frozen=True)
class Chunk:
    """A finished chunk of a part.

    Args:
        number: of the chunk in the input.
        read: rows of the input up to its end.
        digest: of all rows up to there, by which a changed input is noticed.
        ends: where it ends in the part's file of rows and in that of rejected ones.
        counts: what to tell about it.
    """

    number: int
    read: int
    digest: str
    ends: tuple[int, int]
    counts: dict[str, int]


def begin(folder: Path, state: Mapping[str, Any]) -> bool:
    """Begin an output's folder, or find that it was begun by this very command.

    Returns:
        Whether it was begun before.

    Raises:
        RunError: where it was begun by another command.
    """
    file = folder / STATE
    if file.is_file():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise RunError(f"output: {file} is damaged; remove {folder} to start anew") from None
        changed = [key for key in state if known.get(key) != state[key]]
        if changed:
            was, now = known.get(changed[0]), state[changed[0]]
            raise RunError(
                f"output: {folder} was begun with another {changed[0]} ({was}, now {now}); repeat that command to go "
                "on, or remove the folder to start anew"
            )
        return True
    folder.mkdir(parents=True, exist_ok=True)
    # all processes of a job may be here at once, so each has a name of its own for the same content
    temporary = folder / f".{STATE}-{os.getpid()}"
    temporary.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    files.sync(temporary)
    temporary.replace(file)
    files.sync(folder)
    return False


class Part:
    """What one process contributes.

    Args:
        folder: of the output.
        rank: of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.chunks = _journal(folder, rank)
        self.ends = self.chunks[-1].ends if self.chunks else (0, 0)
        self.done_file = folder / f"done-{rank}"
        self._files = [_reopened(_file(folder, kind, rank), end) for kind, end in zip(KINDS, self.ends, strict=True)]
        whole = "".join(json.dumps(asdict(chunk)) + "\n" for chunk in self.chunks).encode()
        (folder / f"alive-{rank}").write_text(f"{_starter()} {os.getpid()}", encoding="utf-8")
        self._lines = _reopened(folder / f"journal-{rank}.jsonl", len(whole))

    def add(self, number: int, read: int, digest: str, contents: tuple[bytes, bytes], counts: dict[str, int]) -> None:
        """Append a chunk: its contents first, its journal line last, each on disk before the next."""
        for file, content in zip(self._files, contents, strict=True):
            if content:
                _append(file, content)
        self.ends = (self.ends[0] + len(contents[0]), self.ends[1] + len(contents[1]))
        chunk = Chunk(number, read, digest, self.ends, counts)
        _append(self._lines, (json.dumps(asdict(chunk)) + "\n").encode())
        self.chunks.append(chunk)

    def finish(self, chunks: int) -> None:
        """Say that this process has done its share of an input of so many chunks."""
        for file in (*self._files, self._lines):
            file.close()
        with files.replacing(self.done_file) as temporary:
            temporary.write_text(str(chunks))


def _file(folder: Path, kind: str, rank: int) -> Path:
    return folder / f"{kind}-{rank}"


def _append(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    files.sync_open(file.fileno(), Path(file.name))


def _reopened(path: Path, end: int) -> BinaryIO:
    """Open a file for appending behind `end`, without what a kill left there."""
    file = path.open("r+b" if path.is_file() else "w+b")
    if file.seek(0, os.SEEK_END) < end:
        raise RunError(f"output: {path} is shorter than its journal says; remove {path.parent} to start anew")
    file.truncate(end)
    file.seek(end)
    return file


def _journal(folder: Path, rank: int) -> list[Chunk]:
    """The finished chunks of a part; a last line that a kill cut off does not count."""
    file, chunks = folder / f"journal-{rank}.jsonl", list[Chunk]()
    for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        chunks.append(Chunk(**{**values, "ends": tuple(values["ends"])}))
    return chunks


def gone(folder: Path, processes: int) -> list[int]:
    """Numbers of processes on this machine that ended without having done their share."""
    return [
        rank
        for rank in range(processes)
        if not _done(folder, rank)
        and _ended(folder / f"alive-{rank}")
        and not _done(folder, rank)  # it may have come to its end in between
    ]


def forget(folder: Path) -> None:
    """Forget the processes of an earlier attempt: their successors may still be on their way."""
    for file in folder.glob("alive-*"):
        if _ended(file):
            file.unlink(missing_ok=True)


def _done(folder: Path, rank: int) -> bool:
    return (folder / f"done-{rank}").is_file()


def _ended(file: Path) -> bool:
    """Whether a process that wrote this file was started as this one was, and runs no more."""
    if not file.is_file():
        return False
    starter, _, pid = file.read_text(encoding="utf-8").rpartition(" ")
    return starter == _starter() and pid.isdecimal() and not _alive(int(pid))


def _starter() -> str:
    """Machine and process that started this one; what an earlier attempt left behind has another."""
    return f"{socket.gethostname()} {os.getppid()}"


def _alive(pid: int) -> bool:
    try:
        # one that has ended and whose parent has not asked for its exit code is still listed
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def written(folder: Path) -> int:
    """Bytes of all journals, by which progress shows."""
    return sum(file.stat().st_size for file in folder.glob("journal-*.jsonl"))


def finished(folder: Path, processes: int) -> bool:
    """Whether every process has done its share."""
    return all((folder / f"done-{rank}").is_file() for rank in range(processes))


def join(folder: Path, processes: int, form: Format, output: Path, rejected: Path) -> dict[str, int]:
    """Put the parts together in the input's order, and the output in its place; done twice it gives the same.

    Returns:
        The sums of the chunks' counts.

    Raises:
        RunError: where a chunk is missing.
    """
    whole = [(chunk, rank, start) for rank in range(processes) for chunk, start in _spans(_journal(folder, rank))]
    whole.sort(key=lambda entry: entry[0].number)
    expected = int((folder / "done-0").read_text())
    if [chunk.number for chunk, _, _ in whole] != list(range(expected)):
        raise RunError(f"output: {folder} lacks some of its {expected:,} chunks; remove it to start anew")
    counts: dict[str, int] = {}
    for chunk, _, _ in whole:
        counts = {key: counts.get(key, 0) + value for key, value in chunk.counts.items()}
    lost = any(chunk.ends[1] > start[1] for chunk, _, start in whole)
    with (folder / "rejected").open("wb") as file:
        for content in _contents(folder, whole, 1):
            file.write(content)
    form.join(folder / "joined", _contents(folder, whole, 0))
    for name in ("rejected", "joined"):
        files.sync(folder / name)
    if lost:
        (folder / "rejected").replace(rejected)
    (folder / "joined").replace(output)
    files.sync(output.parent)
    files.remove(folder)
    return counts


def _spans(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, tuple[int, int]]]:
    start = (0, 0)
    for chunk in chunks:
        yield chunk, start
        start = chunk.ends


def _contents(folder: Path, whole: Sequence[tuple[Chunk, int, tuple[int, int]]], kind: int) -> Iterator[bytes]:
    opened = {rank: _file(folder, KINDS[kind], rank).open("rb") for _, rank, _ in whole}
    try:
        for chunk, rank, start in whole:
            opened[rank].seek(start[kind])
            yield opened[rank].read(chunk.ends[kind] - start[kind])
    finally:
        for file in opened.values():
            file.close()
