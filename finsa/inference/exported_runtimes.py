"""Readers of exported models: the same prompts, the same scores, other libraries than torch underneath.

Letters: b rows of a batch, s tokens, c classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finsa.data.rows import Encoded, Renderer
from finsa.errors import ModelError
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.models.batches import batches, padded
from finsa.runs import processes
from finsa.runs.progress import Moved, ignored

FloatArray = NDArray[np.float64]
Run = Callable[[NDArray[np.int64], NDArray[np.int64]], Any]  # ids (b, s), lengths (b,) -> scores (b, c)
FILES = {"onnx": "model.onnx", "openvino": "model.xml"}


class GraphReader:
    """Scores prompts with a graph that takes ids, padded on the right, and lengths.

    Args:
        run: the graph.
        renderer: made the prompts.
        batch_tokens: most padded tokens of a batch; 1: a text at a time.
        pooled: whether the graph has a head over the text tokens, which reads no tail.
    """

    def __init__(self, run: Run, renderer: Renderer, batch_tokens: int, pooled: bool) -> None:
        self.run, self.renderer, self.batch_tokens, self.pooled = run, renderer, batch_tokens, pooled
        self.tree = LabelTree.of([] if pooled else scored_answers(renderer)[0])

    def score(self, prompts: Encoded, moved: Moved = ignored) -> FloatArray:
        """Score prompts, in their order: (n, c)."""
        scores = np.zeros((len(prompts), len(self.renderer.answers)))
        for rows in _own(batches((prompts.lengths + len(self.tree.tokens)).tolist(), self.batch_tokens)):
            own = [self.renderer.until_text_end(prompts[row]) if self.pooled else prompts[row] for row in rows]
            ids = padded([[*prompt, *self.tree.tokens] for prompt in own])
            scores[rows] = self.run(ids.numpy(), np.array([len(prompt) for prompt in own], dtype=np.int64))
            moved(len(rows) * processes.world())
        return processes.total(scores)


class FolderReader:
    """Scores raw texts with a sequence-classification folder, as its users do: its tokenizer puts the prompt around.

    Args:
        folder: of the export.
        batch_tokens: most padded tokens of a batch.
        temperature: by which its score head is divided already.
    """

    def __init__(self, folder: Path, batch_tokens: int, temperature: float) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.batch_tokens, self.temperature = batch_tokens, temperature

    @torch.inference_mode()
    def score(self, texts: Sequence[str], moved: Moved = ignored) -> FloatArray:
        """Score texts, in their order: (n, c), without the temperature."""
        scores = np.zeros((len(texts), self.model.config.num_labels))
        encoded = self.tokenizer(list(texts), truncation=True)["input_ids"]
        for rows in _own(batches([len(ids) for ids in encoded], self.batch_tokens)):
            filled = self.tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            logits = self.model(**filled).logits
            scores[rows] = (self.temperature * logits.double()).log_softmax(dim=1).numpy()
            moved(len(rows) * processes.world())
        return processes.total(scores)


def _own(every: Iterator[list[int]]) -> Iterator[list[int]]:
    """The batches that this one of a job's processes scores."""
    return (rows for rows, counts in processes.share(list(every)) if counts)


def open_reader(
    folder: Path, values: dict[str, Any], renderer: Renderer, batch_tokens: int, threads: int | None
) -> Any:
    """The reader of an export's format.

    Raises:
        ModelError: where its file is missing or damaged.
    """
    try:
        if values["format"] == "classifier":
            # an export of an older version has it in the manifest alone
            applied = values["temperature"] if values.get("temperature_applied") else 1.0
            return FolderReader(folder, batch_tokens, float(applied))
        start = {"onnx": _onnx, "openvino": _openvino}[values["format"]]
        # int8 scales a whole batch at once, so what stands beside a text would change its answer
        most = 1 if values["precision"] == "int8" else batch_tokens
        return GraphReader(start(folder, threads), renderer, most, bool(values["pooled"]))
    except Exception as error:  # each library fails in ways of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"run: {folder} cannot be opened as {values['format']}: {reason}") from None


def _onnx(folder: Path, threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    file = str(folder / FILES["onnx"])
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda ids, lengths: session.run(["log_probs"], {"input_ids": ids, "lengths": lengths})[0]


def _openvino(folder: Path, threads: int | None) -> Run:
    import openvino

    # bf16, which it takes by itself where the machine has it, would not be what the receipt was written for
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    model = openvino.Core().compile_model(folder / FILES["openvino"], "CPU", settings)
    return lambda ids, lengths: model({"input_ids": ids, "lengths": lengths})[0]
