"""Prediction over many short rows from a pipe: rows per second, and whether memory grows with them.

The rows are made as they are piped, so no file of them is kept; each is one to three clauses of the sample's test rows
and a number that no other row has. The command is the README's, in a process of its own on the same cores; its resident
memory is read every few seconds beside the rows that it has written down. At last every id must stand in the output
once, in order, with a label.

    python benchmarks/predict.py                             # a million rows with the newest run below outputs/
    python benchmarks/predict.py --rows 50000 --run <folder>
    python benchmarks/predict.py --quick                     # 2,000 rows; nothing is written
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import kept
import polars as pl

from finsa.inference import predictor
from finsa.inference.predict import read_header
from finsa.runs import run_folder

ROOT = Path(__file__).resolve().parent.parent
EVERY = 2.0  # seconds between two looks at the memory


class Look(NamedTuple):
    """The command at a moment: rows written down so far, resident memory in MB."""

    rows: int
    memory: float


def texts(count: int, seed: int = 7) -> Iterator[str]:
    """Short texts, no two alike."""
    rows = pl.read_csv(ROOT / "data" / "sample" / "test.csv")["text"].to_list()
    clauses = sorted({clause.strip() for row in rows for clause in re.split(r"[，。！？；\s]", row) if len(clause) > 3})
    rng = random.Random(seed)
    for number in range(count):
        yield f"{'，'.join(rng.sample(clauses, rng.randint(1, 3)))}，第{number}号"


def feed(pipe: IO[str], count: int) -> int:
    """Write rows as CSV. Returns: characters of their texts."""
    writer, characters = csv.writer(pipe), 0
    writer.writerow(["id", "text"])
    for number, text in enumerate(texts(count)):
        writer.writerow([number, text])
        characters += len(text)
    return characters


def watch(process: subprocess.Popen[str], chunks: Path, looks: list[Look], every: float) -> None:
    """Look at a command until it ends."""
    while process.poll() is None:
        try:
            memory = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            newest = max(chunks.glob("chunk-*"), default=None)
            header = read_header(newest) if newest is not None else None
            looks.append(Look(header["read"] if header else 0, memory / 1e6))
        except OSError:  # it ended
            continue
        finally:
            time.sleep(every)


def command(run: Path, count: int, folder: Path, every: float) -> tuple[dict[str, Any], list[Look]]:
    """Pipe rows through the command and check what it wrote. Returns: the figures, and the looks at its memory."""
    output, looks = folder / "out.csv", list[Look]()
    words = ["stage=predict", f"run={run}", "input=-", "stage.input_format=csv", f"output={output}"]
    started = time.perf_counter()
    with (folder / "told").open("w+", encoding="utf-8") as told:
        process = subprocess.Popen(
            [sys.executable, "run.py", *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        assert process.stdin is not None
        watcher = threading.Thread(target=watch, args=(process, folder / "out.csv.partial", looks, every))
        watcher.start()
        try:
            characters = feed(process.stdin, count)
            process.stdin.close()
        except BrokenPipeError:
            characters = 0
        code = process.wait()
        wall = time.perf_counter() - started
        watcher.join()
        told.seek(0)
        said = told.read()
    found = re.search(r"predicted ([\d,]+) rows in ([\d.]+) s", said)
    if code or found is None:
        sys.exit(said)
    check(output, count)
    figures = {
        "rows": count,
        "mean_characters": round(characters / count, 1),
        "wall_seconds": round(wall, 1),
        "answering_seconds": float(found[2]),
        "rows_per_second": round(count / float(found[2]), 1),
    }
    return figures, looks


def check(output: Path, count: int) -> None:
    """Every id once, in order, with a label; no row rejected."""
    expected = 0
    with output.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["id"] != str(expected) or not row["label"]:
                sys.exit(f"row {expected} has the id {row['id']} and the label {row['label']!r}")
            expected += 1
    if expected != count:
        sys.exit(f"{expected:,} rows came back of {count:,}")
    rejected = output.with_name(f"{output.name}.rejected.jsonl")
    if rejected.is_file() and rejected.stat().st_size:
        sys.exit(f"rows were rejected: {rejected.read_text(encoding='utf-8')[:500]}")


def memory(looks: list[Look], count: int) -> dict[str, Any]:
    """Resident memory in MB: after a tenth of the rows, at the end, at most, and along the way."""
    answered = [look for look in looks if look.rows]
    if not answered:  # so few rows that none was seen written down
        return {"at_most": round(max(look.memory for look in looks), 1)}
    tenth = next((look for look in answered if look.rows >= count / 10), answered[-1])
    along = answered[:: max(1, len(answered) // 20)]
    return {
        "after_a_tenth": round(tenth.memory, 1),
        "at_the_end": round(answered[-1].memory, 1),
        "at_most": round(max(look.memory for look in looks), 1),
        "by_rows": {str(look.rows): round(look.memory, 1) for look in along},
    }


def main() -> None:
    """Measure, show, and write ``results/predict.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--run", default="latest", help="a run folder or an export; latest: the newest below outputs/")
    parser.add_argument("--quick", action="store_true", help="2,000 rows; nothing is written")
    given = parser.parse_args()
    run = run_folder.latest(str(ROOT / "outputs")) if given.run == "latest" else Path(given.run).absolute()
    count = 2000 if given.quick else given.rows
    with tempfile.TemporaryDirectory() as folder:
        figures, looks = command(run, count, Path(folder), min(EVERY, count / 10_000))
    report = {"run": predictor.read(str(run)).name, **figures, "memory_mb": memory(looks, count)}
    print(json.dumps(report, ensure_ascii=False, indent=1))
    if not given.quick:
        kept.write("predict", report)


if __name__ == "__main__":
    main()
