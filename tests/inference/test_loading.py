"""Scorers of exported graphs: the processes of a job divide the rows, and each gets all scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import Renderer
from finsa.inference.graphs import GraphScorer
from finsa.runs import processes


def test_two_processes_score_each_row_once_and_have_all_scores(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(tokenizer, Prompt("文本：", "\n情感："), LabelSpace(("利空", "利好"), ("利空", "利好")), 60)
    prompts, parts, scored = (
        renderer.encode(["公司大涨", "亏损" * 9, "", "会议 ABC 12", "涨"]),
        list[Any](),
        list[int](),
    )

    def graph(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Any:
        scored.append(len(ids))
        return np.stack([lengths, ids.sum(axis=1)], axis=1)

    scorer = GraphScorer(graph, renderer, 1, False)
    alone = scorer.score(prompts)
    scored.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    monkeypatch.setattr(processes, "all_reduce", lambda own: parts.append(own) or own)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        scorer.score(prompts)
    assert sum(scored) == len(prompts)
    np.testing.assert_array_equal(sum(parts), alone)
