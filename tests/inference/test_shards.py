"""Processes that write one output together."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from finsa.inference import shards


def _begin(folder: Path, barrier: Any, found: Any) -> None:
    for number in range(25):
        barrier.wait()
        try:
            shards.begin(folder / str(number), {"input": "rows.csv"})
        except Exception as error:
            found.put(repr(error))
    found.put(None)


def test_processes_that_begin_an_output_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(2, timeout=60), context.Queue()
    both = [context.Process(target=_begin, args=(tmp_path, barrier, found)) for _ in range(2)]
    for one in both:
        one.start()
    said = [found.get(timeout=60) for _ in both]
    for one in both:
        one.join(60)
    assert said == [None, None]
    assert all([file.name for file in folder.iterdir()] == [shards.STATE] for folder in tmp_path.iterdir())
