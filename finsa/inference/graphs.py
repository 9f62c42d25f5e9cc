"""Scoring with an exported ONNX graph or GGUF file, without torch, which takes seconds to import.

Letters: n prompts, b rows of a batch, s tokens, c classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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
GRAPH, LLAMA_FILE = "model.onnx", "model.gguf"


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


class LlamaScorer:
    """Scores prompts with llama.cpp, one after another; their common prefix is evaluated once.

    Args:
        file: a GGUF file.
        renderer: of the prompts.
        threads: number of threads; None: ``OMP_NUM_THREADS``, or one per core.
        half: keep keys and values in float16, the default of llama.cpp, instead of float32.
    """

    def __init__(self, file: Path, renderer: Renderer, threads: int | None, half: bool) -> None:
        import llama_cpp

        self.renderer, (self.answers, self.rule) = renderer, scored_answers(renderer)
        longest = len(renderer.prefix) + renderer.room + len(renderer.suffix) + max(map(len, self.answers))
        threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count()
        kind = llama_cpp.GGML_TYPE_F16 if half else llama_cpp.GGML_TYPE_F32
        self._last_logits = llama_cpp.llama_get_logits_ith
        self.model: Any = llama_cpp.Llama(
            str(file),
            n_ctx=longest,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )

    def score(self, prompts: Encoded, moved: Moved = ignored) -> FloatArray:
        """Score prompts in order: (n, c)."""
        nodes = sorted({answer[:n] for answer in self.answers for n in range(len(answer))})  # the first one is empty
        scores, before = np.zeros((len(prompts), len(self.answers))), list[int]()
        for number, prompt in enumerate(prompts):
            common = self.model.longest_token_prefix(before, prompt[:-1])
            self.model.n_tokens, before = common, prompt
            log_probs = {nodes[0]: self._log_probs(prompt[common:])}
            for node in nodes[1:]:
                self.model.n_tokens = len(prompt)  # what follows is evaluated again
                log_probs[node] = self._log_probs(node)
            for column, answer in enumerate(self.answers):
                scores[number, column] = sum(log_probs[answer[:n]][token] for n, token in enumerate(answer))
            moved(1)
        return of_labels(scores, self.renderer.labels)

    def _log_probs(self, tokens: Sequence[int]) -> FloatArray:
        """Evaluate further tokens; the log-probabilities of the next one, (v,)."""
        self.model.eval(tokens)
        logits = np.ctypeslib.as_array(self._last_logits(self.model.ctx, -1), shape=(self.model.n_vocab(),))
        logits = logits.astype(np.float64)
        return logits - np.logaddexp.reduce(logits)

    def same_tokens(self, prompts: Encoded) -> float:
        """Share of the prompts that llama.cpp tokenizes in the same way when it is given their text."""
        decode, special = self.renderer.tokenizer.decode, self.renderer.tokenizer.bos_token_id
        adds = bool(self.model._model.add_bos_token())
        same = []
        for prompt in prompts:
            text = decode(prompt[1:] if adds and prompt[0] == special else prompt, skip_special_tokens=False)
            same.append(self.model.tokenize(text.encode(), add_bos=adds, special=True) == prompt)
        return float(np.mean(same))


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
