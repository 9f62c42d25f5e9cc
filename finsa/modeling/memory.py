"""What training and scoring need of memory, from shapes alone: no weight is loaded.

Most is in use when backward starts: weights, optimiser, and what every layer has kept for its gradients. What a layer
keeps follows from what learns: an input only for a matrix that learns or has an adapter, and of the MLP (gate, its
activation, up) always. Where layers are checkpointed, each keeps its input, and one at a time the rest.

On a CPU the interpreter and its libraries count too; on a GPU the estimate is of what torch allocates there, to which
the CUDA context adds about half a GiB.

Letters: b rows of a micro-batch, s tokens of its longest row, d hidden width, i width of the MLP, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finsa.config import RunConfig
from finsa.modeling import base, quantization
from finsa.modeling.flops import LAST

# Resident with interpreter, torch, transformers, trl and peft, before a weight is there (benchmarks/memory_plan.py).
LIBRARIES = int(0.6 * 2**30)
# Resident on a CPU per byte that a layer makes and drops: freed blocks are not all reused at once (measured there too).
HELD = 5.5


@dataclass(frozen=True)
class Need:
    """Bytes at the peak.

    Args:
        libraries: interpreter and libraries; 0 on a GPU.
        weights: of the model, what learns included.
        optimiser: two moments and, as far as they are there at the peak, gradients.
        activations: what is kept for the backward pass.
        passing: what is there for a moment: logits, or a layer's own results.
    """

    libraries: int
    weights: int
    optimiser: int
    activations: int
    passing: int

    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Shapes:
    """What an estimate knows of a model.

    Args:
        weights: bytes of all weights.
        learnt: bytes of those that learn.
        kept: bytes a layer keeps per token for its backward pass.
        passing: bytes a layer makes and drops per token.
        stream: bytes of the hidden state per token.
        layers: their number.
        logit: bytes per logit, in all its copies, training.
        vocabulary: v, or 0 where a classification head is read.
        largest: bytes of the largest matrix as it is computed with; 0 where nothing is quantised.
    """

    weights: int
    learnt: int
    kept: int
    passing: int
    stream: int
    layers: int
    logit: int
    vocabulary: int
    largest: int


def shapes(cfg: RunConfig, model: Any) -> Shapes:
    """Read off a model on the meta device what an estimate needs.

    Args:
        cfg: its method and the type of its weights.
        model: as `learner.on_meta` builds it.
    """
    shape, width = base.architecture(cfg.model), base.dtype(cfg.model).itemsize
    quantised = cfg.method.quantization != "none"
    weights, largest = 0, 0
    whole = _outside(model)
    for parameter in model.parameters():
        if parameter.requires_grad and cfg.method.learn != "all":
            weights += 4 * parameter.numel()  # adapters and heads are float32 whatever the base is
        elif quantised and parameter.ndim == 2 and id(parameter) not in whole:
            weights += int(parameter.numel() * quantization.BYTES[cfg.method.quantization])
            largest = max(largest, parameter.numel() * width)
        else:
            weights += width * parameter.numel()
    element = width if cfg.method.learn == "all" else 4
    learnt = element * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Shapes(
        weights=weights,
        learnt=learnt,
        kept=_kept(cfg, model, shape, width),
        passing=width * (3 * _wide(shape) + 2 * shape.hidden_size),
        stream=width * shape.hidden_size,
        layers=shape.num_hidden_layers,
        logit=12 if width == 4 else 12 + 2 * width,  # logits, log-softmax, gradient; in half precision two more
        vocabulary=0 if cfg.method.head == "classifier" else shape.vocab_size,
        largest=largest,
    )


def training(of: Shapes, b: int, s: int, projected: int, checkpointing: bool, accumulated: bool) -> Need:
    """Estimate a training step's peak.

    Args:
        of: the model.
        b: rows of a micro-batch.
        s: tokens of its longest row.
        projected: positions of a row that the LM head is applied to.
        checkpointing: whether layers run forward twice.
        accumulated: whether gradients of earlier micro-batches are there already.
    """
    tokens = b * s
    kept = tokens * of.stream * (of.layers + 1) + tokens * of.kept if checkpointing else tokens * of.kept * of.layers
    held = 1 if torch.cuda.is_available() else HELD
    passing = max(b * projected * of.vocabulary * of.logit, int(tokens * of.passing * held) + of.largest)
    gradients = of.learnt if accumulated else max(0, of.learnt - kept - passing)  # else they come as the rest goes
    return Need(_libraries(), of.weights, 2 * of.learnt + gradients, kept, passing)


def scoring(of: Shapes, tokens: int, s: int, reads: int, optimiser: bool) -> Need:
    """Estimate the peak of scoring labels.

    Args:
        of: the model.
        tokens: of a batch, padding included.
        s: tokens of a usual row: they say how many rows a batch has.
        reads: positions of a row that the LM head is applied to.
        optimiser: whether a training run's moments are there.
    """
    rows = max(1, tokens // max(1, s))
    passing = max(rows * reads * of.vocabulary * 8, tokens * of.passing + of.largest)
    return Need(_libraries(), of.weights, 2 * of.learnt if optimiser else 0, 0, passing)


def _kept(cfg: RunConfig, model: Any, shape: Any, width: int) -> int:
    """Bytes that a layer keeps per token; see the module's text."""
    d, i = shape.hidden_size, _wide(shape)
    size = getattr(shape, "head_dim", None) or d // shape.num_attention_heads
    queries = size * shape.num_attention_heads
    keys = size * (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)
    norms = 2 * d * (4 if width < 4 else width)  # computed in float32
    kept = norms + width * (2 * queries + 2 * keys + 3 * i)
    if cfg.method.learn == "all":
        return kept + width * (4 * d + queries + i)  # inputs of all matrices, and of the norms' weights
    inputs: dict[str, int] = {}
    adapter, adapted = cfg.method.adapter, 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and ".0." in name:
            own = name.rsplit(".", 1)[-1]
            wide = module.in_features
            inputs[own if own in LAST else name.rsplit(".", 2)[-2]] = wide
            if adapter is not None and adapter.dropout > 0:
                adapted += wide * (4 + 1)  # what is left of it, and the mask
            adapted += 4 * adapter.rank if adapter is not None else 0
            if width < 4:
                adapted += 4 * wide  # adapters read it in float32
    plain = 0 if adapter is not None and (adapter.dropout > 0 or width < 4) else sum(inputs.values()) * width
    return kept + plain + adapted


def _wide(shape: Any) -> int:
    return int(getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size)


def _outside(model: Any) -> set[int]:
    """Weights that no quantisation touches: embeddings and LM head."""
    inner = getattr(model, "backbone", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return {id(part.weight) for part in (inner.get_input_embeddings(), inner.get_output_embeddings())}


def _libraries() -> int:
    return 0 if torch.cuda.is_available() else LIBRARIES
