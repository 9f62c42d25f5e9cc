"""A small Llama as a GGUF file, written as by llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def model() -> LlamaForCausalLM:
    """Random weights: hidden 64, two layers, 300 entries in the vocabulary, tied head."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    ).eval()


def bpe() -> Tokenizer:
    """A byte-level vocabulary of 300 entries in which digits merge unless they are split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["2015 2016 2015 2017 profit loss profit rises falls"] * 50, trainer)
    return tokenizer


def write(
    file: Path,
    network: LlamaForCausalLM,
    kind: str = "F32",
    architecture: str = "llama",
    split_rule: str = "smollm",
) -> dict[str, np.ndarray]:
    """Write a model and the vocabulary above.

    Args:
        file: to be written.
        network: its weights.
        kind: type of the matrices: ``F32`` or ``Q8_0``.
        architecture: as the header states it.
        split_rule: as the header states it.

    Returns:
        The values of the file's matrices, by their GGUF names.
    """
    import json

    settings: Any = network.config
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(settings.vocab_size)
    described = json.loads(bpe().to_str())
    vocabulary = sorted(described["model"]["vocab"].items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_rule)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if number < 3 else 1 for _, number in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in described["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    meant = {}
    for name, tensor in network.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        if name == "lm_head.weight":
            continue  # tied
        if "layers" in name:
            _, _, number, rest = name.split(".", 3)
            name = f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        if "attn_q" in name or "attn_k" in name:  # llama.cpp keeps the two halves of rotary pairs beside each other
            heads = HEADS if "attn_q" in name else KV_HEADS
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 2 and kind != "F32":
            packed = quants.quantize(values, GGMLQuantizationType[kind])
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType[kind])
            meant[name] = quants.dequantize(packed, GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, values)
            meant[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
