"""A rough estimate of peak memory, from shapes alone."""

from __future__ import annotations

import torch

from finsa.config import RunConfig
from finsa.modeling import base, hardware, quantization


def available() -> int:
    """Memory of the device, in bytes."""
    return hardware.memory()


def estimate(cfg: RunConfig, trainable: int, total: int, length: float) -> int:
    """Estimate the peak memory of training, or of scoring where nothing learns, in bytes.

    Weights in their type, or quantised but for embeddings and LM head; float32 copy, gradient and two Adam moments of
    what learns; per layer and token the tensors that the backward pass needs: about 12 of the hidden and 4 of the MLP
    width.

    Args:
        cfg: the configuration.
        trainable: parameters that learn.
        total: all parameters.
        length: tokens of a long micro-batch's rows.
    """
    width = torch.tensor([], dtype=base.dtype(cfg.model)).element_size()
    shape = base.architecture(cfg.model)
    tokens = cfg.train.micro_batch_size * length
    per_token = 12 * shape.hidden_size + 4 * shape.intermediate_size
    layers = shape.num_hidden_layers if cfg.method.learn != "nothing" else 1
    if cfg.train.gradient_checkpointing:
        layers, tokens = 1, tokens + tokens * shape.num_hidden_layers * shape.hidden_size / per_token
    activations = layers * tokens * per_token * width
    labelled = cfg.train.micro_batch_size * (length if cfg.method.loss_on == "all" else 3)
    logits = labelled * shape.vocab_size * 4 * 3
    kept = shape.vocab_size * shape.hidden_size * (1 if getattr(shape, "tie_word_embeddings", False) else 2)
    per_weight = quantization.BYTES.get(cfg.method.quantization, width)
    weights = kept * width + (total - trainable - kept) * per_weight if cfg.method.learn != "all" else 0
    return int(weights + trainable * 16 + activations + logits)
