"""GGUF files are converted into model folders with the same weights, or rejected with one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ggufs
import numpy as np
import pytest
import torch
from few import FEW
from transformers import AutoModelForCausalLM, AutoTokenizer

from finsa.config import RunConfig
from finsa.errors import ModelError
from finsa.inference import predictor
from finsa.models import gguf
from finsa.stages import train


def test_a_converted_model_computes_what_was_written(tmp_path: Path) -> None:
    network = ggufs.model()
    ggufs.write(tmp_path / "small.gguf", network)
    gguf.convert(tmp_path / "small.gguf", tmp_path / "model", {"original": "owner/name"})
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    assert read.config.rms_norm_eps == 1e-5  # float32 makes 9.999999747378752e-06 of it
    assert read.config.tie_word_embeddings
    ids = torch.tensor([[5, 60, 200, 7]])
    assert torch.equal(read(ids).logits, network(ids).logits)
    origin = json.loads((tmp_path / "model" / gguf.ORIGIN).read_text())
    assert origin["original"] == "owner/name"
    assert origin["quantization"] == {"F32": 20}


def test_quantized_matrices_equal_their_decoded_blocks(tmp_path: Path) -> None:
    meant = ggufs.write(tmp_path / "small.gguf", ggufs.model(), "Q8_0")
    gguf.convert(tmp_path / "small.gguf", tmp_path / "model", {})
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert weights["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32
    for number in (0, 1):
        found = weights[f"model.layers.{number}.mlp.up_proj.weight"]
        assert torch.equal(found, torch.from_numpy(meant[f"blk.{number}.ffn_up.weight"]))
    assert torch.equal(weights["model.embed_tokens.weight"], torch.from_numpy(meant["token_embd.weight"]))


def test_digits_are_single_tokens_under_the_rule_of_smollm(tmp_path: Path) -> None:
    ggufs.write(tmp_path / "small.gguf", ggufs.model())
    gguf.convert(tmp_path / "small.gguf", tmp_path / "model", {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_ids_to_tokens(tokenizer("rises 2015")["input_ids"])[-5:] == ["Ġ", "2", "0", "1", "5"]
    assert ggufs.bpe().encode("rises 2015").tokens[-1] == "Ġ2015"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_a_file_is_converted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.gguf"
    ggufs.write(file, ggufs.model())
    first = gguf.converted_folder(file, tmp_path / "models")
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert "converting" in capsys.readouterr().out
    assert gguf.converted_folder(file, tmp_path / "models") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert capsys.readouterr().out == ""
    ggufs.write(file, ggufs.model(), "Q8_0")  # other weights under the same name are another model
    assert gguf.converted_folder(file, tmp_path / "models") != first


def test_a_run_starts_from_a_gguf_file_and_is_restored_from_it(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ggufs.write(tmp_path / "small.gguf", ggufs.model())
    words = ("model=local", "model.path=small.gguf", FEW, "data.max_length=511", "train=smoke", "train.max_steps=1")
    done = train.run(config(*words, "train.validation_rows=8", "stage.compare_base=false", "tracking=none"))
    assert done.run_dir is not None
    (folder,) = (tmp_path / "models").iterdir()
    assert folder.name.startswith("small-")
    lines = (done.run_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    records = [json.loads(line) for line in lines]
    found = predictor.restore(str(done.run_dir), 4096)([record["text"] for record in records])
    wanted = np.array([list(record["log_probs"].values()) for record in records])
    assert found.log_probs == pytest.approx(wanted, abs=1e-4)


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


def _another(file: Path) -> None:
    file.write_bytes(b"PK\x03\x04" + bytes(1000))


def _header_alone(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncated, "is truncated or damaged"),
        (_header_alone, "is truncated or damaged"),
        (_another, "is not a GGUF file: it does not begin with GGUF"),
        (Path.unlink, "no such file"),
    ],
)
def test_a_damaged_file_gives_one_message_and_no_output(tmp_path: Path, spoil, message: str) -> None:
    file = tmp_path / "small.gguf"
    ggufs.write(file, ggufs.model())
    spoil(file)
    with pytest.raises(ModelError, match=message):
        gguf.convert(file, tmp_path / "model", {})
    assert not (tmp_path / "model").exists()


def test_an_architecture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    ggufs.write(tmp_path / "small.gguf", ggufs.model(), architecture="rwkv7")
    with pytest.raises(ModelError, match="of architecture 'rwkv7', which transformers does not read from GGUF"):
        gguf.convert(tmp_path / "small.gguf", tmp_path / "model", {})


def test_an_unknown_split_rule_is_refused(tmp_path: Path) -> None:
    """Token ids would be silently wrong, as they were for the digits of SmolLM2."""
    ggufs.write(tmp_path / "small.gguf", ggufs.model(), split_rule="viking")
    with pytest.raises(ModelError, match="names an unknown pre-tokenizer, 'viking'"):
        gguf.convert(tmp_path / "small.gguf", tmp_path / "model", {})
    assert not (tmp_path / "model").exists()
