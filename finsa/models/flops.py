"""Floating-point operations of a training step, from shapes and from what learns.

A product of (n, in) and (in, out) takes 2 n in out. Forward has one for every matrix. Backward has one for the input's
gradient, where something before it learns, and one for the weight's, where the weight itself learns: a frozen base
under LoRA costs 4 per weight and token where full fine-tuning costs 6. Attention has two products of s x s per head
forward and up to four backward (what a fused kernel computes again is not counted). The LM head counts at the positions
that it is applied to. Checkpointed layers run forward twice.

Letters: b rows of a batch, s tokens with padding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from finsa.models import attention, quantization
from finsa.models.classifier import causal

# What reads the output of its own siblings; all other matrices of a block read what the block reads.
LAST = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "wo", "w2")
QKV = ("q_proj", "k_proj", "v_proj")
_LAYER = re.compile(r"\.(\d+)\.")
_ADAPTED = re.compile(r"\.(lora_[A-Za-z_]+|base_layer)\b.*$")


@dataclass(frozen=True)
class Costs:
    """Operations of forward and backward.

    Args:
        position: per token, padding included: b x s of a batch.
        pair: per pair of tokens that attention looks at: b x s x s.
        projected: per position that the LM head is applied to, and the last MLP where it is narrowed.
        row: per row: a classification head, a router.
    """

    position: float
    pair: float
    projected: float
    row: float

    def total(self, positions: float, pairs: float, projected: float, rows: float) -> float:
        """Operations of counted work."""
        return self.position * positions + self.pair * pairs + self.projected * projected + self.row * rows


def of(model: Any, checkpointing: bool = False) -> Costs:
    """Read a model's costs off its matrices.

    Args:
        model: a causal language model, wrapped by PEFT or not, a classifier or a mixture, with what learns marked.
        checkpointing: whether the layers run forward a second time in backward.
    """
    inner = causal(getattr(model, "backbone", model))
    embedding, head = inner.get_input_embeddings().weight, inner.get_output_embeddings().weight
    layers: dict[int, list[tuple[str, Any]]] = {}
    row, inside = 0.0, {id(parameter) for parameter in inner.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or parameter is embedding or parameter is head:
            continue
        place = _LAYER.search(name) if id(parameter) in inside else None
        if place is None:
            row += 2 * parameter.numel() * (1 + 2 * parameter.requires_grad)
        else:
            layers.setdefault(int(place[1]), []).append((name, parameter))
    started = bool(embedding.requires_grad or checkpointing)
    position = pair = read = 0.0
    narrow = getattr(model, "head", None) is None and not checkpointing and attention.last_mlp(model) is not None
    width = _attention_width(inner.config)
    for number in sorted(layers):
        of_attention, of_mlp, products = _layer(layers[number], started, checkpointing)
        position += of_attention
        if narrow and number == max(layers):
            read += of_mlp
        else:
            position += of_mlp
        pair += width * (4 + 2 * products + 4 * checkpointing)
        started = started or any(p.requires_grad for _, p in layers[number])
    return Costs(position, pair, read + 2 * head.numel() * (1 + started + bool(head.requires_grad)), row)


def _layer(matrices: list[tuple[str, Any]], started: bool, checkpointing: bool) -> tuple[float, float, int]:
    """Operations of a layer per token, without its MLP and of that, and products of its attention's backward pass."""
    cost, attended = {False: 0.0, True: 0.0}, None
    learnt_before, learnt_here, block = started, False, ""
    for number, (name, parameter) in enumerate(matrices):
        module = _ADAPTED.sub("", name.removesuffix(".weight"))
        parent, _, own = module.rpartition(".")
        if parent != block:
            learnt_before, learnt_here, block = learnt_before or learnt_here, False, parent
        reaches = learnt_before or (own in LAST and learnt_here) or "lora_B" in name
        if own in LAST and attended is None:  # what leaves attention is the first of a layer
            attended = reaches
        size = quantization.logical_size(parameter)
        # the second forward ends with what backward needs last, which is what the last product reads
        again = checkpointing and not (number == len(matrices) - 1 and own in LAST)
        cost[".mlp." in name] += 2 * size * (1 + reaches + bool(parameter.requires_grad) + again)
        learnt_here = learnt_here or bool(parameter.requires_grad)
    return cost[False], cost[True], _backward_products(matrices, started) if attended else 0


def _backward_products(matrices: list[tuple[str, Any]], started: bool) -> int:
    """Of values, queries and keys those whose gradient is asked for, and one for the weights between the last two."""
    learns: dict[str, bool] = {}
    for name, parameter in matrices:
        own = _ADAPTED.sub("", name.removesuffix(".weight")).rpartition(".")[2]
        learns[own] = learns.get(own, False) or bool(parameter.requires_grad)
    if started or not learns.keys() >= set(QKV):
        return 4
    query, key, value = (learns[name] for name in QKV)
    return (query or key) + query + key + value


def _attention_width(config: Any) -> int:
    """Heads times the size of one, (h d)."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * size)


def dtype_of(model: Any) -> torch.dtype:
    """The type that a model's products are computed in, also where its weights are quantised."""
    kind: torch.dtype = causal(getattr(model, "backbone", model)).get_input_embeddings().weight.dtype
    return kind
