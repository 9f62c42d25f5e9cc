"""Answers to all rows of an input, in constant memory, by one process or several, stopped and gone on with at will."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finsa.data.reading import Reading
from finsa.errors import RunError
from finsa.inference import shards
from finsa.inference.predictor import Answerer, Answers
from finsa.inference.row_streams import Item, Stream
from finsa.inference.writers import Format


@dataclass(frozen=True)
class Share:
    """What one of several processes does.

    Args:
        rank: its number.
        processes: how many there are; chunk c belongs to the process c modulo this.
    """

    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Added:
    """Columns that answers add to a row.

    Args:
        label: the answer.
        probabilities: one per label.
        route: a mixture's expert; None elsewhere.
    """

    label: str
    probabilities: tuple[str, ...]
    route: str | None

    @classmethod
    def beside(cls, columns: list[str], labels: tuple[str, ...], routed: bool) -> Added:
        """Names that the input's own columns leave free."""
        taken = set(columns)

        def free(name: str) -> str:
            while name in taken:
                name = f"predicted_{name}"
            return name

        probabilities = tuple(free(f"p_{label}") for label in labels)
        return cls(free("label"), probabilities, free("route") if routed else None)

    def kinds(self) -> dict[str, type]:
        """Types by name, in their order."""
        route = {self.route: str} if self.route else {}
        return {self.label: str, **dict.fromkeys(self.probabilities, float), **route}


def predict(
    answerer: Answerer,
    stream: Stream,
    reading: Reading,
    part: shards.Part,
    form: Format,
    added: Added,
    share: Share,
    size: int,
) -> int:
    """Answer this process's chunks of an input and write them into its part.

    Args:
        answerer: answers texts.
        stream: the input.
        reading: finds the text of a row.
        part: takes finished chunks; those that it has are passed over.
        form: of the output.
        added: columns of the answers.
        share: which chunks are this process's.
        size: rows of a chunk.

    Returns:
        Rows answered now.

    Raises:
        RunError: where rows that were answered before have changed.
    """
    digest, read, answered, number = hashlib.blake2b(digest_size=16), 0, 0, 0
    before = {chunk.number: chunk for chunk in part.chunks}
    with _bar(stream, shown=share.rank == 0) as step:
        while items := list(islice(stream.items, size)):
            for item in items:
                digest.update(repr((item.values, item.fault)).encode("utf-8", "backslashreplace"))
            read += len(items)
            known = before.get(number)
            if known is not None and (known.read, known.digest) != (read, digest.hexdigest()):
                raise RunError(
                    f"input: its first {read:,} rows are not those that were answered before; remove {part.folder} to "
                    "start anew"
                )
            if known is None and number % share.processes == share.rank:
                contents, counts = _answered(answerer, items, reading, form, added)
                part.add(number, read, digest.hexdigest(), contents, counts)
                answered += len(items)
            step(answered)
            number += 1
    part.finish(number)
    return answered


def _answered(
    answerer: Answerer, items: list[Item], reading: Reading, form: Format, added: Added
) -> tuple[tuple[bytes, bytes], dict[str, int]]:
    """A chunk as it is written: rows and rejected ones; and what to tell about it."""
    read = answerer.fitting([_text(item, reading, added) for item in items])
    good = [item for item, (_, fault) in zip(items, read, strict=True) if fault is None]
    answers = answerer([text for text, fault in read if fault is None])
    rows = [{**item.values, **found} for item, found in zip(good, records(answers, added), strict=True)]
    bad = [
        {"line": item.line, "reason": fault, "row": item.values}
        for item, (_, fault) in zip(items, read, strict=True)
        if fault is not None
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in bad)
    counts = {"answered": len(rows), "rejected": len(bad), "cut": sum(answers.cut)}
    return (form.chunk(rows) if rows else b"", lines.encode("utf-8", "backslashreplace")), counts


def _text(item: Item, reading: Reading, added: Added) -> tuple[str, int, str | None]:
    """A row's text, the length of its fixed part, and why it cannot be answered."""
    for name in (added.label, *added.probabilities, added.route):
        if name in item.values:  # a column that only later rows have may bear an added one's name
            return "", 0, f"its own column '{name}', which the first rows do not have, would be overwritten"
    return ("", 0, item.fault) if item.fault is not None else reading.text_of(item.values)


def records(answers: Answers, added: Added) -> Iterator[dict[str, Any]]:
    """Label, probabilities and route of each text, under the names they are written with."""
    routes: list[str] | list[None] = answers.routes or [None] * len(answers.cut)
    for label, shares, route in zip(answers.chosen, answers.probabilities, routes, strict=True):
        values = {name: round(float(share), 6) for name, share in zip(added.probabilities, shares, strict=True)}
        yield {added.label: label, **values, **({added.route: route} if added.route else {})}


def wait(folder: Path, share: Share, patience: float) -> None:
    """Wait until every process has done its share.

    Args:
        folder: of the output.
        share: this process's.
        patience: seconds without anything written by the others after which they count as lost.

    Raises:
        RunError: where another process is gone, or silent for too long.
    """
    told = moved = time.monotonic()
    written = shards.written(folder)
    while not shards.finished(folder, share.processes):
        time.sleep(0.1)
        now = time.monotonic()
        if (found := shards.written(folder)) != written:
            written, moved = found, now
        gone = shards.gone(folder, share.processes)
        if gone or now - moved > patience:
            said = "is gone" if gone else f"has written nothing for {patience:.0f} seconds (train.process_timeout)"
            raise RunError(
                f"process {', '.join(map(str, gone)) or 'of another number'} {said}; what was answered is kept in "
                f"{folder}, and the same command goes on from there"
            )
        if now - told > 30:
            told = now
            print(f"waiting for the other {share.processes - 1} processes", flush=True)


@contextmanager
def _bar(stream: Stream, shown: bool) -> Iterator[Any]:
    """A bar over the input with rows per second and time left; gives what moves it on to so many answered rows."""
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
        task = bar.add_task("predict", total=stream.total, numbers="")

        def step(rows: int) -> None:
            speed = rows / max(time.monotonic() - started, 1e-9)
            place = stream.position() if stream.position is not None else None
            bar.update(task, completed=place, numbers=f"{rows:,} rows, {speed:,.0f} rows/s")

        yield step
