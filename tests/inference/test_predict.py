"""Rows and chunks that are not like the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from finsa.data.reading import Reading
from finsa.inference.predict import Added, _answered
from finsa.inference.predictor import Answerer
from finsa.inference.row_streams import Item
from finsa.inference.writers import JsonLines


class Mixed:
    """A reader that keeps the gates of what it scored last, as a mixture's scorer does."""

    experts = ("news", "forum")
    gates: Any = None

    def score(self, inputs: Sequence[str], moved: Any) -> np.ndarray:
        self.gates = np.tile([0.25, 0.75], (len(inputs), 1))
        return np.log(np.tile([0.9, 0.1], (len(inputs), 1)))


def answerer() -> Answerer:
    labels = SimpleNamespace(names=("up", "down"))
    record: Any = SimpleNamespace(cfg=None, facts={}, path=None, name="run", labels=labels, temperature=1.0)
    return Answerer(record, Mixed(), "whole label")


def answered(asked: Answerer, *rows: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    added = Added.beside(["text"], asked.labels, routed=True)
    items = [Item(row, number) for number, row in enumerate(rows, 1)]
    (good, bad), _ = _answered(asked, items, Reading("text"), JsonLines(), added)
    return [json.loads(line) for line in good.splitlines()], [json.loads(line) for line in bad.splitlines()]


def test_a_chunk_without_a_usable_text_is_answered_by_nothing() -> None:
    """A mixture's gates are then those of the chunk before."""
    asked = answerer()
    good, bad = answered(asked, {"text": "a"}, {"text": "b"})
    assert ([row["route"] for row in good], bad) == (["forum", "forum"], [])
    good, bad = answered(asked, {"text": " "})
    assert (good, [row["reason"] for row in bad]) == ([], ["empty text"])


def test_a_column_that_comes_late_is_not_overwritten() -> None:
    good, bad = answered(answerer(), {"text": "a"}, {"text": "b", "label": "mine"})
    assert [row["label"] for row in good] == ["up"]
    assert [row["row"] for row in bad] == [{"text": "b", "label": "mine"}]
    assert "own column 'label'" in bad[0]["reason"]
