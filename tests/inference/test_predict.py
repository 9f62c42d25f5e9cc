"""Chunks of rows: unusual ones, and processes that write one output together."""

from __future__ import annotations

import json
import multiprocessing
import platform
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finsa.data.labels import LabelSpace
from finsa.data.schema import Reading
from finsa.errors import RunError
from finsa.inference import predict
from finsa.inference.predict import Columns, Share
from finsa.inference.predictor import Predictor
from finsa.inference.row_files import Row, Writer
from finsa.runs import locks


class Mixed:
    """A predictor that keeps the gates of its last call, as a mixture's scorer does."""

    experts = ("news", "forum")
    gates: Any = None

    def score(self, inputs: Sequence[str], moved: Any) -> np.ndarray:
        self.gates = np.tile([0.25, 0.75], (len(inputs), 1))
        return np.log(np.tile([0.9, 0.1], (len(inputs), 1)))


def mixture() -> Predictor:
    labels = LabelSpace(("up", "down"), ("up", "down"))
    cfg = SimpleNamespace(data=SimpleNamespace(task="classification"))
    record: Any = SimpleNamespace(cfg=cfg, facts={}, path=None, name="run", labels=labels, temperature=1.0)
    return Predictor(record, Mixed(), "whole label")


def predicted(predictor: Predictor, *rows: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    columns = Columns.added_to(["text"], predictor.labels, routed=True)
    chunk = [Row(row, number) for number, row in enumerate(rows, 1)]
    good, bad, _ = predict.predict_rows(predictor, chunk, Reading("text"), Writer(), columns)
    return [json.loads(line) for line in good.splitlines()], [json.loads(line) for line in bad.splitlines()]


def test_a_chunk_without_a_usable_text_has_no_predictions() -> None:
    """A mixture's gates are then those of the previous chunk."""
    predictor = mixture()
    good, bad = predicted(predictor, {"text": "a"}, {"text": "b"})
    assert ([row["route"] for row in good], bad) == (["forum", "forum"], [])
    good, bad = predicted(predictor, {"text": " "})
    assert (good, [row["reason"] for row in bad]) == ([], ["empty text"])


def test_a_column_that_only_later_rows_have_is_not_overwritten() -> None:
    good, bad = predicted(mixture(), {"text": "a"}, {"text": "b", "label": "mine"})
    assert [row["label"] for row in good] == ["up"]
    assert [row["row"] for row in bad] == [{"text": "b", "label": "mine"}]
    assert "its column 'label'" in bad[0]["reason"]


def _begin(folder: Path, barrier: Any, found: Any) -> None:
    for number in range(25):
        barrier.wait()
        try:
            predict.begin(folder / str(number), {"input": "rows.csv"})
        except Exception as error:
            found.put(repr(error))
    found.put(None)


def test_processes_that_start_an_output_at_once_do_not_interfere(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(2, timeout=60), context.Queue()
    both = [context.Process(target=_begin, args=(tmp_path, barrier, found)) for _ in range(2)]
    for one in both:
        one.start()
    errors = [found.get(timeout=60) for _ in both]
    for one in both:
        one.join(60)
    assert errors == [None, None]
    assert all([file.name for file in folder.iterdir()] == [predict.STATE] for folder in tmp_path.iterdir())


def test_a_lost_process_of_an_earlier_attempt_is_not_confused_with_its_replacement(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"alive-{rank}").write_text(platform.node(), encoding="utf-8")
        predict.lock_file(tmp_path, rank).touch()
    with pytest.raises(RunError, match="process 1 is no longer running"):
        predict.wait(tmp_path, 2, Share(0, 2), 60)
    with locks.held(predict.lock_file(tmp_path, 0), "output"):
        predict.enter(tmp_path, Share(0, 2))
        with pytest.raises(RunError, match="has written nothing for 0 seconds"):
            predict.wait(tmp_path, 2, Share(0, 2), 0.3)
    with locks.held(predict.lock_file(tmp_path, 1), "output"):
        predict.enter(tmp_path, Share(1, 2))
        with pytest.raises(RunError, match="has written nothing for 0 seconds"):
            predict.wait(tmp_path, 2, Share(0, 2), 0.3)
    with pytest.raises(RunError, match="process 1 is no longer running"):
        predict.wait(tmp_path, 2, Share(0, 2), 60)


def test_a_process_on_another_machine_is_lost_only_after_a_timeout(tmp_path: Path) -> None:
    (tmp_path / "alive-1").write_text("another machine", encoding="utf-8")
    with pytest.raises(RunError, match="has written nothing for 0 seconds"):
        predict.wait(tmp_path, 2, Share(0, 2), 0.3)


def test_an_incomplete_chunk_does_not_count(tmp_path: Path) -> None:
    """As after a power failure on a file system without fsync."""
    file = predict.chunk_file(tmp_path, 0)
    assert predict.read_header(file) is None
    predict.write_chunk(file, {"read": 1}, b"a row\n", b"a rejected row\n")
    assert predict.read_header(file) == {"read": 1, "bytes": [6, 15]}
    content = file.read_bytes()
    for size in (0, 5, len(content) - 1):
        file.write_bytes(content[:size])
        assert predict.read_header(file) is None
    with pytest.raises(RunError, match="is missing or damaged"):
        predict.join(tmp_path, 1, Writer(), tmp_path / "out", tmp_path / "bad")
