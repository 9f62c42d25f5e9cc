from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finsa import composition
from finsa.config import ROOT, Model, RunConfig
from finsa.errors import ConfigError, ModelError
from finsa.modeling import adapters, base, tokenizers

TOTALS = {
    "qwen05b": 494_032_768,
    "qwen05b_instruct": 494_032_768,
    "qwen7b": 7_615_616_512,
    "glm9b": 9_400_279_040,
    "r1_distill_1_5b": 1_777_088_000,
    "llama3_8b": 8_030_261_248,
    "baichuan2_7b": 7_505_973_248,
    "chatglm3_6b": 6_243_584_000,
    "tiny": 3_739_904,
}
LORA = [
    ("qwen05b", "lora", (), 540_672),
    ("qwen05b", "lora", ("method.adapter.targets=all",), 4_399_104),
    ("qwen7b", "lora", ("method.adapter.targets=all",), 20_185_088),
    ("llama3_8b", "lora", ("method.adapter.targets=all",), 20_971_520),
    ("r1_distill_1_5b", "lora", ("method.adapter.targets=attention", "method.adapter.rank=4"), 1_089_536),
    ("glm9b", "lora_expert", (), 44_810_240),
]


def composed(*overrides: str) -> RunConfig:
    values, choices = composition.compose_values(overrides)
    return composition.build(values, choices, overrides)


def test_every_model_file_has_a_known_total() -> None:
    assert set(composition.choices_of("model")) == set(TOTALS)


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_totals_on_the_meta_device(name: str, total: int) -> None:
    model = base.on_meta(composed(f"model={name}").model)
    assert base.count_parameters(model)[1] == total
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("name", "method", "overrides", "expected"), LORA)
def test_published_adapter_sizes(name: str, method: str, overrides: tuple[str, ...], expected: int) -> None:
    cfg = composed(f"model={name}", f"method={method}", *overrides)
    assert cfg.method.adapter is not None
    model = adapters.attach(base.on_meta(cfg.model), cfg.model, cfg.method.adapter, seed=0)
    assert base.count_parameters(model) == (expected, TOTALS[name] + expected)


def test_named_targets_exist_in_every_architecture() -> None:
    for name in TOTALS:
        for targets in ("query_value", "attention", "all"):
            words = (f"model={name}", "model.weights=random", "model.architecture.num_hidden_layers=1")
            cfg = composed(*words, f"method.adapter.targets={targets}")
            assert cfg.method.adapter is not None
            adapters.attach(base.on_meta(cfg.model), cfg.model, cfg.method.adapter, seed=0)


def test_a_misspelt_architecture_key_is_named() -> None:
    cfg = composed("model=tiny", "+model.architecture.hiden_size=8")
    with pytest.raises(ConfigError, match=r"model\.architecture\.hiden_size: unknown key\. Did you mean 'hidden_size'"):
        base.architecture(cfg.model)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match="transformers knows no 'qwen99'"):
        base.architecture(composed("model.architecture.model_type=qwen99").model)


def test_random_weights_follow_the_seed() -> None:
    section = composed("model.weights=random").model
    first, second, third = (base.load_base(section, seed, keep=False) for seed in (1, 1, 2))
    one, two, three = (model.get_input_embeddings().weight for model in (first, second, third))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_jobs_share_a_base_and_get_a_fresh_one_after_forget() -> None:
    section = composed("model.weights=random").model
    first = base.load_base(section, 5)
    assert base.load_base(section, 5) is first
    assert not any(parameter.requires_grad for parameter in first.parameters())
    base.forget(first)
    assert base.load_base(section, 5) is not first


def test_a_folder_that_is_overwritten_is_loaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(ROOT / "data" / "tiny", folder)
    section = composed("model=tiny", f"model.path={folder}").model
    first = base.load_base(section, 0)
    assert base.load_base(section, 0) is first
    tensors = {name: -tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    second = base.load_base(section, 0)
    name = next(iter(tensors))
    assert torch.equal(second.get_parameter(name), -first.get_parameter(name))


def test_missing_weights_name_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    section = composed("model=tiny", f"model.path={tmp_path}/nowhere").model
    with pytest.raises(ModelError, match=r"model=tiny: no weights at .*nowhere.*experiment=tiny_base"):
        base.load_base(section, 0)
    with pytest.raises(ModelError, match=r"no tokenizer at .*nowhere"):
        tokenizers.load_tokenizer(section)


def test_auto_is_bfloat16_only_where_the_hardware_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    section: Model = composed().model
    monkeypatch.setattr(base, "_computes_bf16", lambda: False)
    assert base.dtype(section) == torch.float32
    monkeypatch.setattr(base, "_computes_bf16", lambda: True)
    assert base.dtype(section) == torch.bfloat16
    assert base.dtype(section.model_copy(update={"dtype": "float16"})) == torch.float16


def test_random_weights_without_their_tokenizer_take_the_embedded_one(tokenizer: Any) -> None:
    section = composed("model=qwen05b", "model.weights=random").model
    assert tokenizers.load_tokenizer(section).get_vocab() == tokenizer.get_vocab()
