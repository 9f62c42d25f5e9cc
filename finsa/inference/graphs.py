"""A model as one graph from ids and lengths to the labels' log-probabilities and probabilities, as ONNX or OpenVINO.

Letters: b rows of a batch, s tokens, c classes, m nodes of the label tree, k = 1 + m positions read.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from finsa.data.rows import Renderer
from finsa.errors import ModelError
from finsa.inference.exported_runtimes import FILES
from finsa.inference.label_tree import LabelTree, scored_answers, tree_inputs
from finsa.models.classifier import Classifier, causal


class LabelGraph(torch.nn.Module):
    """Whole-label log-probabilities (b, c), as `finsa.inference.scoring.label_log_probs` has them, and probabilities.

    Args:
        model: a causal language model without an adapter.
        renderer: knows the labels.
        temperature: of the probabilities.
    """

    def __init__(self, model: Any, renderer: Renderer, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.tree = LabelTree.of(scored_answers(renderer)[0])

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score rows (b, s): prompts of the given lengths (b,), each followed by the tree's tokens and any padding."""
        m = len(self.tree.tokens)
        given = tree_inputs(self.tree, lengths, input_ids.shape[1], torch.float32) if m else _causal(input_ids)
        states = self.model.base_model(input_ids=input_ids, use_cache=False, **given).last_hidden_state
        read = lengths[:, None] - 1 + torch.arange(m + 1)
        picked = states.gather(1, read[:, :, None].expand(-1, -1, states.shape[2]))
        log_probs = self.model.get_output_embeddings()(picked).float().log_softmax(-1)  # (b, k, v)
        columns = [torch.stack([log_probs[:, at, token] for at, token in steps]).sum(0) for steps in self.tree.steps]
        return _outputs(torch.stack(columns, dim=1), self.temperature)


class PooledGraph(torch.nn.Module):
    """Class log-probabilities (b, c) of a classification head over the text tokens, and probabilities.

    Args:
        model: a classifier whose base has no adapter.
        renderer: knows where the text begins.
        temperature: of the probabilities.
    """

    def __init__(self, model: Classifier, renderer: Renderer, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.body, self.head, self.start = causal(model.backbone).base_model, model.head, len(renderer.prefix)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score rows (b, s): head and text, of the given lengths (b,), and any padding."""
        states = self.body(input_ids=input_ids, use_cache=False, **_causal(input_ids)).last_hidden_state
        place = torch.arange(input_ids.shape[1])
        inside = ((place >= self.start) & (place < lengths[:, None])).float()[:, :, None]
        pooled = (states.float() * inside).sum(1) / inside.sum(1).clamp(min=1)
        return _outputs(self.head(pooled).log_softmax(dim=1), self.temperature)


def _outputs(log_probs: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of a graph: ``log_probs`` and the calibrated ``probs``, both (b, c)."""
    return log_probs, (log_probs / temperature).softmax(dim=1)


def _causal(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain causal mask (b, 1, s, s) and positions, given outright: transformers' own do not export."""
    place = torch.arange(ids.shape[1])
    hidden = (place[None, :] > place[:, None]).float() * torch.finfo(torch.float32).min
    return {
        "attention_mask": hidden[None, None].expand(ids.shape[0], 1, -1, -1),
        "position_ids": place[None].expand(ids.shape[0], -1),
    }


def write_onnx(model: Any, renderer: Renderer, temperature: float, folder: Path, precision: str) -> None:
    """Write ``model.onnx``, from ``input_ids`` (b, s) and ``lengths`` (b,) to ``log_probs`` and ``probs`` (b, c).

    Args:
        model: a causal language model or a classifier, without an adapter, in float32 on the CPU.
        renderer: of its prompts.
        temperature: of the probabilities.
        folder: to write into.
        precision: ``fp32``, or ``int8`` for weights in 8 bit and products of 8 bit, scaled as they come.

    Raises:
        ModelError: where this architecture cannot be exported.
    """
    kind = PooledGraph if isinstance(model, Classifier) else LabelGraph
    graph = kind(model, renderer, temperature)
    file = folder / FILES["onnx"]
    sample = renderer.encode(["文本", "另一条文本 text"])
    tree = graph.tree.tokens if isinstance(graph, LabelGraph) else ()
    length = max(map(len, sample))
    # with two rows or more: a batch of one would become a constant
    ids = torch.tensor([[*prompt, *tree, *[0] * (length - len(prompt))] for prompt in sample])
    lengths = torch.tensor([len(prompt) for prompt in sample])
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                graph.eval(),
                (ids, lengths),
                file,
                dynamo=True,
                input_names=["input_ids", "lengths"],
                output_names=["log_probs", "probs"],
                dynamic_shapes={"input_ids": {0: rows, 1: tokens}, "lengths": {0: rows}},
                verbose=False,
            )
        except Exception as error:  # the exporter fails in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"format: this architecture cannot be written as ONNX: {reason}") from None
    if precision == "int8":
        _quantize(file, model.head.out_features if isinstance(model, Classifier) else model.config.vocab_size)


def _quantize(file: Path, width: int) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(file)
    del model.graph.value_info[:]  # shapes from before the weights were transposed; the quantiser trips over them
    for part in file.parent.glob(f"{file.name}*"):
        part.unlink()
    logging.getLogger().setLevel(logging.ERROR)  # it advises a preprocessing that changes nothing here
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    products = ((node.name, sizes.get(node.input[1], [0, 0])) for node in model.graph.node if node.op_type == "MatMul")
    # The head is read at a position or two, so nothing is gained there. What enters a product that narrows has
    # outliers, which a common scale pays for: on the embedded default 0.4 % of the answers change instead of 1.0 %.
    kept = [name for name, (rows, columns) in products if columns == width or rows > columns]
    quantize_dynamic(
        model,
        file,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=kept,
        per_channel=True,
        reduce_range=True,  # 7 bits of weight: where the machine has no VNNI, products of 8 by 8 bit overflow
        weight_type=QuantType.QInt8,
    )


def write_openvino(folder: Path) -> None:
    """Turn a folder's ONNX file into OpenVINO's ``model.xml`` and ``model.bin``.

    Raises:
        ModelError: where its operations are not known there.
    """
    import openvino

    try:
        model = openvino.convert_model(folder / FILES["onnx"])
        openvino.save_model(model, folder / FILES["openvino"], compress_to_fp16=False)
    except Exception as error:  # the converter fails in ways of its own
        raise ModelError(f"format: OpenVINO cannot read this model: {str(error).splitlines()[0][:200]}") from None
    for part in folder.glob(f"{FILES['onnx']}*"):
        part.unlink()
