"""GGUF files hold the weights and the tokenizer of the run, and llama.cpp computes what transformers does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ggufs
import llama
import numpy as np
import polars as pl
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from tokenizers import decoders
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finsa.config import RunConfig
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import Renderer
from finsa.errors import ConfigError, ModelError
from finsa.inference import gguf_export, predictor
from finsa.inference.graphs import LLAMA_FILE, LlamaScorer
from finsa.inference.scoring import LabelScorer
from finsa.models import base, gguf
from finsa.stages import export

Compose = Callable[..., RunConfig]
Trained = Callable[..., Path]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    """Of a small byte-level tokenizer with the rule of GPT-2; labels of several tokens that share a prefix."""
    bpe = ggufs.bpe()
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    labels = LabelSpace(("down", "up"), ("rises", "risen"))
    return Renderer(tokenizer, Prompt("<|im_start|>user\n", "\n<|im_end|>answer "), labels, 200)


def _network(kind: str) -> Any:
    torch.manual_seed(1)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=False)).eval()
    rope = LLAMA3 if kind == "llama3" else {"rope_type": "default", "rope_theta": 5000.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope, tie_word_embeddings=True)).eval()


def _written(network: Any, renderer: Renderer, precision: str, folder: Path) -> Path:
    renderer.tokenizer.save_pretrained(folder)
    gguf_export.write(network, renderer, "small", precision, ["profit rises", "2015, loss"], folder)
    return folder / LLAMA_FILE


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_file_reads_back_as_the_same_model(kind: str, renderer: Renderer, tmp_path: Path) -> None:
    network = _network(kind)
    gguf.convert(_written(network, renderer, "fp32", tmp_path), tmp_path / "model", {})
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    ids = torch.tensor([[5, 60, 200, 7]])
    assert torch.equal(read(ids).logits, network(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    # transformers reads every Qwen3 file with the tokenizer of Qwen, which splits numbers into digits
    texts = ["profit rises" + (" 2015" if kind == "llama" else "") + "\n loss", "<|im_end|>利好, 3.5%"]
    assert tokenizer(texts)["input_ids"] == renderer.tokenizer(texts)["input_ids"]


def test_matrices_have_the_precision_and_vectors_are_exact(renderer: Renderer, tmp_path: Path) -> None:
    network = _network("llama")
    weights = network.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    for precision, kind in (("f16", GGMLQuantizationType.F16), ("q8_0", GGMLQuantizationType.Q8_0)):
        folder = tmp_path / precision
        tensors = {one.name: one for one in GGUFReader(_written(network, renderer, precision, folder)).tensors}
        found = tensors["blk.1.ffn_up.weight"]
        assert found.tensor_type == kind
        meant = quants.dequantize(quants.quantize(weights, kind), kind)
        assert np.array_equal(quants.dequantize(found.data, kind), meant)
        assert tensors["blk.1.ffn_norm.weight"].tensor_type == GGMLQuantizationType.F32
        assert "output.weight" not in tensors, "the head is tied"


@llama.needed
@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen3"])
def test_llama_cpp_scores_as_transformers_does(kind: str, renderer: Renderer, tmp_path: Path) -> None:
    """The permutation of rotary pairs, their scaling and normalized queries would all show here."""
    network = _network(kind)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 4  # otherwise attention is almost uniform
    prompts = renderer.encode(["profit rises 2015 " * 12, "loss", "profit rises 2016"])
    wanted = LabelScorer(network, renderer, 4096).score(prompts)
    found = LlamaScorer(_written(network, renderer, "fp32", tmp_path), renderer, 1, half=False)
    assert found.score(prompts) == pytest.approx(wanted, abs=2e-4)
    assert np.ptp(wanted[:, 0]) > 0.1
    assert found.same_tokens(prompts) == 1
    reversed_ = found.score(prompts[::1])
    assert reversed_ == pytest.approx(wanted, abs=2e-4), "the cache of earlier prompts does not matter"


def test_the_modelfile_renders_the_prompt_of_the_run(tokenizer: Any) -> None:
    """Read with the grammar of Ollama's documentation, and with strings of Go for what cannot be written plainly."""
    before, after = '说"{{ x }}"：\n\u3000"""a"""\r\n', '\n情感\u00a0："'
    renderer = Renderer(tokenizer, Prompt(before, after), LabelSpace(("a", "b"), ("利空", "利好")), 160)
    written = gguf_export.modelfile(renderer, 1024)
    template = re.search(r'^TEMPLATE """(.*?)"""$', written, re.M | re.S)
    assert template is not None
    assert all(sign.isprintable() or sign in "\t\n" for sign in written)
    assert "{{ .Prompt }}" in template[1]

    def rendered(match: re.Match[str]) -> str:
        said = match[1]
        return "净利润" if said == ".Prompt" else "".join(chr(int(code, 16)) for code in re.findall(r"\\U(.{8})", said))

    text = re.sub(r"\{\{ (.*?) \}\}", rendered, template[1])
    assert text == tokenizer.decode(renderer.encode(["净利润"])[0]) == f"{before}净利润{after}"
    rest = written.replace(template[0], "")
    assert re.findall(r"^([A-Z]+ .*)$", rest, re.M) == [
        "FROM ./model.gguf",
        "PARAMETER temperature 0",
        "PARAMETER num_predict 2",
        "PARAMETER num_ctx 1024",
        'PARAMETER stop "<|endoftext|>"',
    ]


def test_the_rule_that_splits_texts_is_the_tokenizers(tokenizer: Any, renderer: Renderer, project: Path) -> None:
    texts = pl.read_csv(project / "data" / "sample" / "test.csv")["text"].to_list()
    embedded = Renderer(tokenizer, Prompt("", ""), LabelSpace(("a", "b"), ("利空", "利好")), 160)
    assert gguf_export.split_rule(embedded, texts) == ("qwen2", 1.0)
    assert gguf_export.split_rule(renderer, ["rises 2015", "2016"]) == ("gpt-2", 1.0)


def test_a_tokenizer_without_a_rule_is_refused(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import pre_tokenizers

    literal = renderer.literal
    literal.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("ri", "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    monkeypatch.setattr(Renderer, "literal", property(lambda self: type(literal).from_str(literal.to_str())))
    with pytest.raises(ModelError, match=r"no rule that splits texts .* the same tokens for 50.0% of the texts"):
        gguf_export.split_rule(renderer, ["profit rises", "loss"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "positions of type yarn",
        ),
        (Qwen2Config(use_sliding_window=True, sliding_window=32), "sliding-window attention"),
    ],
)
def test_unsupported_models_are_refused(config: Any, message: str, renderer: Renderer) -> None:
    assert message in str(gguf_export.refusal(config, renderer))
    assert gguf_export.refusal(Qwen2Config(), renderer) is None


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("classifier", "format=gguf", "llama.cpp has no classification head over the text"),
        ("lora_response", "format=gguf stage.precision=int8", "is used by format=onnx only"),
        ("lora_response", "format=merged stage.precision=q8_0", "is used by format=gguf only"),
    ],
)
def test_impossible_exports_are_refused_before_weights_are_loaded(
    config: Compose, trained: Trained, monkeypatch: pytest.MonkeyPatch, method: str, words: str, message: str
) -> None:
    run = trained(method)
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(base, "load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=message):
        export.run(config("stage=export", f"run={run}", *words.split()))
    assert sorted(run.rglob("*")) == before


def test_without_llama_cpp_the_file_is_written_and_the_receipt_skipped(
    config: Compose, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for module in (export, predictor):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    words = ("stage=export", f"run={trained('lora_response')}", "format=gguf", f"output={tmp_path / 'gguf'}")
    done = export.run(config(*words))
    assert "receipt: skipped, because llama.cpp is not installed; pip install 'finsa[gguf]'" in capsys.readouterr().out
    assert done.metrics["receipt"] is None
    names = {file.name for file in (tmp_path / "gguf").iterdir()}
    assert {"model.gguf", "Modelfile", "manifest.json", "README.md"} <= names
    assert "receipt.json" not in names
    assert json.loads((tmp_path / "gguf" / "manifest.json").read_text())["split_rule"] == "qwen2"
    with pytest.raises(ModelError, match=r"needs llama_cpp: pip install 'finsa\[gguf\]'"):
        predictor.restore(str(tmp_path / "gguf"), 4096)
