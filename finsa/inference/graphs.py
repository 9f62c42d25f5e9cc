"""Scoring with an exported ONNX graph, without torch and transformers, which take seconds to import.

Letters: n prompts, b rows of a batch, s tokens, c classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.data.labels import LabelSpace
from finsa.data.rows import Encoded, Renderer
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.models.batches import batches
from finsa.runs import processes
from finsa.runs.progress import Moved, ignored

FloatArray = NDArray[np.float64]
Graph = Callable[[NDArray[np.int64], NDArray[np.int64]], Any]  # ids (b, s), lengths (b,) -> log-probabilities (b, c)
GRAPH = "model.onnx"


def open_graph(folder: Path, threads: int | None = None) -> Graph:
    """Open an export's ``model.onnx`` with ONNX Runtime; threads=None: ``OMP_NUM_THREADS``, or one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    return lambda ids, lengths: session.run(["log_probs"], {"input_ids": ids, "lengths": lengths})[0]


class GraphScorer:
    """Scores prompts with a graph that takes ids, padded on the right, and lengths.

    Args:
        graph: computes log-probabilities.
        renderer: of the prompts.
        batch_tokens: maximum number of padded tokens per batch; 1: one text at a time.
        pooled: whether the graph has a classification head over the text tokens, which reads no suffix.
    """

    def __init__(self, graph: Graph, renderer: Renderer, batch_tokens: int, pooled: bool) -> None:
        self.graph, self.renderer, self.batch_tokens, self.pooled = graph, renderer, batch_tokens, pooled
        answers, rule = scored_answers(renderer)
        self.tree = LabelTree.of([] if pooled else answers)
        self.rule = "classification head" if pooled else rule
        self.width = renderer.labels.outputs if pooled else len(answers)

    def score(self, prompts: Encoded, moved: Moved = ignored) -> FloatArray:
        """Score prompts in order: (n, c)."""
        log_probs = np.zeros((len(prompts), self.width))
        for rows in shared(batches((prompts.lengths + len(self.tree.tokens)).tolist(), self.batch_tokens)):
            part = [self.renderer.until_text_end(prompts[row]) if self.pooled else prompts[row] for row in rows]
            lengths = np.array([len(prompt) for prompt in part], dtype=np.int64)
            ids = np.zeros((len(part), int(lengths.max()) + len(self.tree.tokens)), dtype=np.int64)
            for number, prompt in enumerate(part):
                ids[number, : len(prompt) + len(self.tree.tokens)] = [*prompt, *self.tree.tokens]
            log_probs[rows] = self.graph(ids, lengths)
            moved(len(rows) * processes.world_size())
        return of_labels(processes.all_reduce(log_probs), self.renderer.labels)


def shared(every: Iterator[list[int]]) -> Iterator[list[int]]:
    """The batches that this process of a job scores."""
    return (rows for rows, counts in processes.shard(list(every)) if counts)


def of_labels(scores: FloatArray, labels: LabelSpace) -> FloatArray:
    """Scores as all of finsa uses them: log-probabilities of the labels or anchors, (n, c).

    With several labels per row: their log-odds, from the answers yes and no to each, (n, 2c), or unchanged, (n, c); of
    a regression head: the numbers, unchanged, (n, 1).
    """
    answered = labels.task == "multi_label" and scores.shape[1] == 2 * len(labels)
    return scores[:, 0::2] - scores[:, 1::2] if answered else scores
