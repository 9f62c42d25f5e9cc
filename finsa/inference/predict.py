"""Predictions for all rows of an input: in bounded memory, by one or several processes, resumable at any time.

Predictions are collected in a folder next to the output. Each chunk of rows becomes one file, written atomically; a
repeated command skips existing chunks. The joined file is the same whether the work was interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finsa.data.schema import Reading
from finsa.errors import FinsaError, RunError
from finsa.inference.predictor import Predictions, Predictor
from finsa.inference.row_files import Row, Stream, Writer
from finsa.runs import files, locks

STATE = "state.json"


@dataclass(frozen=True)
class Share:
    """The share of the work of one of several processes.

    Args:
        rank: rank of the process.
        processes: number of processes; chunk c belongs to rank c modulo this.
    """

    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Columns:
    """Columns that predictions add to a row.

    Args:
        label: the predicted label, or a list of several; None for numbers.
        probs: one per label.
        route: a mixture's expert; None for other models.
        number: the expected level of ordered labels, or the predicted number; None for other tasks.
        thought: what the model wrote before its answer, several separated by empty lines; None if it does not think.
        decisions: by name, the columns of ``abstain`` and ``label_set``, as far as limits are set.
    """

    label: str | None
    probs: tuple[str, ...]
    route: str | None
    number: str | None = None
    thought: str | None = None
    decisions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def added_to(
        cls,
        columns: list[str],
        labels: tuple[str, ...],
        routed: bool,
        task: str = "classification",
        thinks: bool = False,
        decisions: Sequence[str] = (),
    ) -> Columns:
        """Choose names that do not collide with the columns of the input."""

        def free(name: str) -> str:
            while name in columns:
                name = f"predicted_{name}"
            return name

        probs = tuple(free(f"p_{label}") for label in labels)
        number = {"ordinal": "level", "regression": "number"}.get(task)
        label = None if task == "regression" else free("label")
        thought = free("thought") if thinks else None
        decided = {name: free(name) for name in decisions}
        return cls(label, probs, free("route") if routed else None, free(number) if number else None, thought, decided)

    @classmethod
    def of(cls, predictor: Predictor, columns: list[str]) -> Columns:
        """The columns that a predictor adds to those of the input."""
        decisions = predictor.selection.columns if predictor.selection else ()
        routed, task, thinks = bool(predictor.experts), predictor.task, predictor.thinks
        return cls.added_to(columns, predictor.probable, routed, task, thinks, decisions)

    def types(self) -> dict[str, type]:
        """Types by name, in order."""
        route = {self.route: str} if self.route else {}
        label, number = {self.label: str} if self.label else {}, {self.number: float} if self.number else {}
        thought = {self.thought: str} if self.thought else {}
        decided = {column: bool if name == "abstain" else str for name, column in self.decisions.items()}
        return {**label, **number, **dict.fromkeys(self.probs, float), **route, **thought, **decided}

    def values(self, predictions: Predictions) -> Iterator[dict[str, Any]]:
        """The values of each text's prediction, by column."""
        routes: list[str] | list[None] = predictions.routes or [None] * len(predictions.truncated)
        numbers = next(iter(predictions.numbers.values()), [None] * len(predictions.truncated))
        thoughts = predictions.thoughts or [[]] * len(predictions.truncated)
        labels: list[Any] = predictions.predicted if predictions.sets is None else predictions.sets
        rows = zip(labels, numbers, predictions.probs, routes, thoughts, strict=True)
        for place, (label, number, probs, route, texts) in enumerate(rows):
            shares = [round(float(prob), 6) for prob in probs]
            names = (self.label, self.number, *self.probs, self.route, self.thought)
            cells = (label, number, *shares, route, "\n\n".join(texts))
            decided = {column: predictions.decisions[name][place] for name, column in self.decisions.items()}
            yield {name: cell for name, cell in zip(names, cells, strict=True) if name is not None} | decided


def predict(
    predictor: Predictor,
    stream: Stream,
    reading: Reading,
    folder: Path,
    writer: Writer,
    columns: Columns,
    share: Share,
    size: int,
) -> tuple[int, int]:
    """Predict this process's chunks of an input, except existing ones.

    Args:
        predictor: predicts texts.
        stream: the input.
        reading: extracts the text of a row.
        folder: receives one file per chunk.
        writer: of the output's format.
        columns: columns of the predictions.
        share: this process's share of the chunks.
        size: rows per chunk.

    Returns:
        Number of chunks of the whole input, and number of newly predicted rows, without rejected ones.

    Raises:
        RunError: if rows of an existing chunk have changed.
    """
    number = done = answered = 0
    with progress_bar(stream.total, shown=share.rank == 0) as show:
        for number, rows, header, known in read_chunks(stream, folder, size):
            if not known and number % share.processes == share.rank:
                encoded, rejected, counts = predict_rows(predictor, rows, reading, writer, columns)
                write_chunk(chunk_file(folder, number), {**header, "counts": counts}, encoded, rejected)
                done, answered = done + len(rows), answered + counts["answered"]
            show(stream.position, done)
            number += 1  # the number of chunks after the last one
    return number, answered


def read_chunks(stream: Stream, folder: Path, size: int) -> Iterator[tuple[int, list[Row], dict[str, Any], bool]]:
    """Read an input in chunks.

    Returns:
        For each chunk its number, its rows, what its header has about the rows up to its end, and whether its file
        exists.

    Raises:
        RunError: if rows of an existing chunk have changed.
    """
    digest, read = hashlib.blake2b(digest_size=16), 0
    for number, rows in enumerate(stream.chunks(size)):
        for row in rows:
            digest.update(repr((row.values, row.fault)).encode("utf-8", "backslashreplace"))
        read += len(rows)
        header = {"read": read, "digest": digest.hexdigest()}
        known = read_header(chunk_file(folder, number))
        if known is not None and {name: known[name] for name in header} != header:
            raise RunError(
                f"input: its first {read:,} rows have changed since they were predicted; remove {folder} to start over"
            )
        yield number, rows, header, known is not None


def predict_rows(
    predictor: Predictor, rows: list[Row], reading: Reading, writer: Writer, columns: Columns
) -> tuple[bytes, bytes, dict[str, int]]:
    """Predict a chunk: its encoded rows, its rejected rows as JSON lines, and the counts of both."""
    texts, models = predictor.check_room([_text(row, reading, columns) for row in rows]), list[str]()
    for number, (row, (text, fault)) in enumerate(zip(rows, texts, strict=True)):
        model, missing = predictor.choose(row.values)
        texts[number] = text, fault or missing
        models += [model] if model and not fault else []
    predictions = predictor([text for text, fault in texts if fault is None], models=models or None)
    cells, encoded, rejected = columns.values(predictions), list[dict[str, Any]](), list[str]()
    for row, (_, fault) in zip(rows, texts, strict=True):
        if fault is None:
            encoded.append({**row.values, **next(cells)})
        else:
            values = {"line": row.line, "reason": fault, "row": row.values}
            rejected.append(json.dumps(values, ensure_ascii=False, default=str) + "\n")
    counts = {"answered": len(encoded), "rejected": len(rejected), "truncated": sum(predictions.truncated)}
    content = writer.encode(encoded) if encoded else b""
    return content, "".join(rejected).encode("utf-8", "backslashreplace"), counts


def _text(row: Row, reading: Reading, columns: Columns) -> tuple[str, int, str | None]:
    """A row's text, the length of its fixed part, and the reason why it cannot be used."""
    for name in columns.types():
        if name in row.values:  # a column that only later rows have
            return "", 0, f"its column '{name}', which the first rows do not have, would be overwritten"
    return ("", 0, row.fault) if row.fault is not None else reading.text_of(row.values)


@contextmanager
def progress_bar(total: int | None, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar over an input.

    Args:
        total: size of the input, see `Stream`; None if unknown.
        shown: whether it is shown, on a terminal.

    Yields:
        A function to call with the part of `total` that has been read, and the number of predicted rows.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("predict"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )
    started = time.monotonic()
    with bar:
        task = bar.add_task("predict", total=total, numbers="")

        def show(position: int, rows: int) -> None:
            speed = rows / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=position, numbers=f"{rows:,} rows, {speed:,.0f} rows/s")

        yield show


# ------------------------------------------------------------------------------------------------ chunks


def begin(folder: Path, state: Mapping[str, Any]) -> None:
    """Create the folder of an output, or check that it belongs to this command.

    Raises:
        RunError: if it belongs to another command.
    """
    file = folder / STATE
    if file.is_file():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise RunError(f"output: {file} is damaged; remove {folder} to start over") from None
        changed = [key for key in state if known.get(key) != state[key]]
        if changed:
            before, now = known.get(changed[0]), state[changed[0]]
            raise RunError(
                f"output: {folder} was started with another {changed[0]} ({before}, now {now}); repeat that command to "
                "resume, or remove the folder to start over"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    # all processes may get here at once, so each writes the same content under a different name
    temporary = folder / f".{STATE}-{os.getpid()}"
    temporary.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    files.sync(temporary)
    temporary.replace(file)
    files.sync(folder)


@contextmanager
def undone(folder: Path, share: Share) -> Iterator[None]:
    """Remove the folder after an error before the first chunk, so that a corrected command can start."""
    try:
        yield
    except FinsaError:
        if share.processes == 1 and not any(folder.glob("chunk-*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def chunk_file(folder: Path, number: int) -> Path:
    """The file of a chunk: a JSON header line, the encoded rows, the rejected rows."""
    return folder / f"chunk-{number:08d}"


def write_chunk(file: Path, header: Mapping[str, Any], rows: bytes, rejected: bytes) -> None:
    """Write a chunk atomically."""
    line = json.dumps({**header, "bytes": [len(rows), len(rejected)]}) + "\n"
    with files.replacing(file) as temporary:
        temporary.write_bytes(line.encode() + rows + rejected)


def read_header(file: Path) -> dict[str, Any] | None:
    """The header of a chunk; None if the file is missing or incomplete."""
    try:
        with file.open("rb") as stream:
            line = stream.readline()
            header: dict[str, Any] = json.loads(line)
            return header if len(line) + sum(header["bytes"]) == os.fstat(stream.fileno()).st_size else None
    except (FileNotFoundError, ValueError):
        return None


def enter(folder: Path, share: Share) -> None:
    """Record that this process, which holds its lock, has started; rank 0 clears the records of an earlier attempt."""
    if share.rank == 0:
        for rank in range(1, share.processes):
            if _is_gone(folder, rank):  # its replacement may still be starting
                (folder / f"alive-{rank}").unlink(missing_ok=True)
    (folder / f"alive-{share.rank}").write_text(platform.node(), encoding="utf-8")


def lock_file(folder: Path, rank: int) -> Path:
    """The lock that a process holds while it works on its share."""
    return folder / f"lock-{rank}"


def _is_gone(folder: Path, rank: int) -> bool:
    """Whether a process of this machine has started and is no longer running, however it ended."""
    alive = folder / f"alive-{rank}"
    here = alive.is_file() and alive.read_text(encoding="utf-8") == platform.node()
    return here and locks.holder(lock_file(folder, rank)) is None


def wait(folder: Path, chunks: int, share: Share, patience: float) -> None:
    """Wait until all chunks exist.

    Args:
        folder: of the output.
        chunks: of the input.
        share: this process's share.
        patience: seconds without a new chunk after which the other processes are considered lost.

    Raises:
        RunError: if another process has ended, or has written nothing for too long.
    """
    reported = moved = time.monotonic()
    missing = list(range(chunks))
    while True:
        ranks = {number % share.processes for number in missing}
        gone = [rank for rank in sorted(ranks) if rank != share.rank and _is_gone(folder, rank)]
        left = [number for number in missing if read_header(chunk_file(folder, number)) is None]
        gone = [rank for rank in gone if any(number % share.processes == rank for number in left)]
        if not left:
            return
        now = time.monotonic()
        moved, missing = (now if len(left) < len(missing) else moved), left
        if gone or now - moved > patience:
            ended = f"process {', '.join(map(str, gone))} is no longer running"
            silent = f"another process has written nothing for {patience:.0f} seconds (train.process_timeout)"
            raise RunError(
                f"{ended if gone else silent}; finished rows are kept in {folder}, "
                "and the same command resumes from there"
            )
        if now - reported > 30:
            reported = now
            print(f"waiting for the other {share.processes - 1} processes", flush=True)
        time.sleep(0.1)


def join(folder: Path, chunks: int, writer: Writer, output: Path, rejected: Path) -> dict[str, int]:
    """Join all chunks in the order of the input and move the output into place; can be repeated if interrupted.

    Returns:
        The sums of the chunks' counts.

    Raises:
        RunError: if a chunk is missing or damaged.
    """
    counts = Counter[str]()
    with (folder / "rejected").open("wb") as bad:

        def contents() -> Iterator[bytes]:
            for number in range(chunks):
                file = chunk_file(folder, number)
                header = read_header(file)
                if header is None:
                    raise RunError(f"output: {file} is missing or damaged; repeat the command to predict it again")
                counts.update(header["counts"])
                with file.open("rb") as stream:
                    stream.readline()
                    yield stream.read(header["bytes"][0])
                    bad.write(stream.read())

        writer.join(folder / "joined", contents())
    for name in ("rejected", "joined"):
        files.sync(folder / name)
    if counts["rejected"]:
        (folder / "rejected").replace(rejected)
    (folder / "joined").replace(output)
    files.sync(output.parent)
    files.remove(folder)
    return dict(counts)
