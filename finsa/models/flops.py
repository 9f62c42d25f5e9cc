"""Floating-point operations of a training step, from the shapes of the matrices and from which of them are trained.

A product of (n, in) and (in, out) takes 2 n in out. The forward pass has one product for each matrix. The backward pass
has one for the gradient of the input, if a parameter before it is trained, and one for the gradient of the weight, if
the weight is trained: a frozen base model under LoRA costs 4 per weight and token, full fine-tuning 6. Attention has
two products of s x s per head forward and up to four backward (what a fused kernel recomputes is not counted). The LM
head counts at the positions that it is applied to. Layers with activation checkpointing run forward twice.

Letters: b rows of a batch, s tokens with padding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from finsa.models import attention
from finsa.models.quantization import logical_size

# Layers whose input is computed by other layers of their block; all others read the block's input.
OUTPUT = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "wo", "w2")
QKV = ("q_proj", "k_proj", "v_proj")
_LAYER = re.compile(r"\.(\d+)\.")
_ADAPTED = re.compile(r"\.(lora_[A-Za-z_]+|base_layer)\b.*$")


@dataclass(frozen=True)
class Costs:
    """Operations of a forward and a backward pass.

    Args:
        position: per token, padding included; a batch has b x s.
        pair: per pair of tokens in attention; a batch has b x s x s.
        projected: per position whose logits are computed: the LM head, and the last MLP if it is computed only there.
        row: per row: a classification head, a router.
    """

    position: float
    pair: float
    projected: float
    row: float

    def total(self, positions: float, pairs: float, projected: float, rows: float) -> float:
        """Operations of this many positions, pairs, projected positions and rows."""
        return self.position * positions + self.pair * pairs + self.projected * projected + self.row * rows


def estimate(model: Any, checkpointing: bool = False) -> Costs:
    """Compute a model's costs from its matrices.

    Args:
        model: a causal language model, wrapped by PEFT or not, a classifier or a mixture; ``requires_grad`` says what
            is trained.
        checkpointing: whether the layers are recomputed in the backward pass.
    """
    inner = attention.causal_model(model)
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
    position = pair = projected = 0.0
    mlp_at_projected = (
        getattr(model, "head", None) is None and not checkpointing and attention.last_mlp(model) is not None
    )
    config = inner.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(config.num_attention_heads * head_size)
    for number in sorted(layers):
        rest, mlp, products = _layer(layers[number], started, checkpointing)
        position += rest
        if mlp_at_projected and number == max(layers):
            projected += mlp
        else:
            position += mlp
        pair += width * (4 + 2 * products + 4 * checkpointing)
        started = started or any(p.requires_grad for _, p in layers[number])
    return Costs(position, pair, projected + 2 * head.numel() * (1 + started + bool(head.requires_grad)), row)


def _layer(matrices: list[tuple[str, Any]], started: bool, checkpointing: bool) -> tuple[float, float, int]:
    """Operations of a layer per token without its MLP, those of the MLP, and attention's products in backward."""
    cost, attention_learns = {False: 0.0, True: 0.0}, None
    trained_before, trained_here, block = started, False, ""
    for number, (name, parameter) in enumerate(matrices):
        module = _ADAPTED.sub("", name.removesuffix(".weight"))
        parent, _, last_name = module.rpartition(".")
        if parent != block:
            trained_before, trained_here, block = trained_before or trained_here, False, parent
        input_gradient = trained_before or (last_name in OUTPUT and trained_here) or "lora_B" in name
        if last_name in OUTPUT and attention_learns is None:  # a layer's first output projection is that of attention
            attention_learns = input_gradient
        # The recomputed forward pass stops at the input of the last product, which is all that backward needs.
        again = checkpointing and not (number == len(matrices) - 1 and last_name in OUTPUT)
        products = 1 + input_gradient + bool(parameter.requires_grad) + again
        cost[".mlp." in name] += 2 * logical_size(parameter) * products
        trained_here = trained_here or bool(parameter.requires_grad)
    return cost[False], cost[True], _backward_products(matrices, started) if attention_learns else 0


def _backward_products(matrices: list[tuple[str, Any]], started: bool) -> int:
    """Attention's products in the backward pass: one each for queries, keys and values, and one for the weights."""
    trained: dict[str, bool] = {}
    for path, parameter in matrices:
        name = _ADAPTED.sub("", path.removesuffix(".weight")).rpartition(".")[2]
        trained[name] = trained.get(name, False) or bool(parameter.requires_grad)
    if started or not trained.keys() >= set(QKV):
        return 4
    query, key, value = (trained[name] for name in QKV)
    return (query or key) + query + key + value


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype that a model's products are computed in, even if its weights are quantized."""
    dtype: torch.dtype = attention.causal_model(model).get_input_embeddings().weight.dtype
    return dtype
