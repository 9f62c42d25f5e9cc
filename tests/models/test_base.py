from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import compositions
import pytest
import torch
from base_models import small
from safetensors.torch import load_file, save_file

from finsa.config import ROOT, Model, RunConfig, catalogue, compose
from finsa.errors import ConfigError, ModelError
from finsa.models import adapters, base, tokenizers
from finsa.session import Session

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
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_4b_instruct_2507": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen25_1_5b": 1_543_714_304,
    "llama31_8b": 8_030_261_248,
    "llama32_1b": 1_235_814_400,
    "glm4_9b": 9_400_279_040,
    "r1_distill_qwen_7b": 7_615_616_512,
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
    return compose.build(*compose.compose_values(overrides, (), compositions.shared()), overrides)


def test_every_model_file_has_a_known_total() -> None:
    assert set(catalogue.choices_of("model")) - {"local"} == set(TOTALS)


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
    first, second, third = (base.load_base(section, seed) for seed in (1, 1, 2))
    one, two, three = (model.get_input_embeddings().weight for model in (first, second, third))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_jobs_share_a_base_within_a_session() -> None:
    section, session = composed("model.weights=random").model, Session()
    first = base.load_base(section, 5, session=session)
    assert base.load_base(section, 5, session=session) is first
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert base.load_base(section, 5) is not first
    assert base.load_base(section, 6, session=session) is not first
    assert len(session.base_models) == 1  # one at a time: two of 9B would not fit


def test_a_folder_that_is_overwritten_is_loaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(ROOT / "data" / "tiny", folder)
    section, session = composed("model=tiny", f"model.path={folder}").model, Session()
    first = base.load_base(section, 0, session=session)
    assert base.load_base(section, 0, session=session) is first
    tensors = {name: -tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    second = base.load_base(section, 0, session=session)
    name = next(iter(tensors))
    assert torch.equal(second.get_parameter(name), -first.get_parameter(name))


def test_missing_weights_are_reported_with_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    section = composed("model=tiny", f"model.path={tmp_path}/nowhere").model
    for load in (lambda: base.load_base(section, 0), lambda: tokenizers.load_tokenizer(section)):
        with pytest.raises(ConfigError, match=r"model\.path: there is no file or folder .*/nowhere\. It must contain"):
            load()
    embedded = section.model_copy(update={"path": "data/tiny"})
    monkeypatch.setattr("finsa.config.base.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Rebuild the embedded base: python run.py experiment=tiny_base"):
        base.load_base(embedded, 0)


def test_auto_is_bfloat16_only_if_the_hardware_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    section: Model = composed().model
    monkeypatch.setattr(base, "_computes_bf16", lambda: False)
    assert base.dtype(section) == torch.float32
    monkeypatch.setattr(base, "_computes_bf16", lambda: True)
    assert base.dtype(section) == torch.bfloat16
    assert base.dtype(section.model_copy(update={"dtype": "float16"})) == torch.float16


def test_random_weights_without_a_tokenizer_use_the_embedded_one(tokenizer: Any) -> None:
    section = composed("model=qwen05b", "model.weights=random").model
    assert tokenizers.load_tokenizer(section).get_vocab() == tokenizer.get_vocab()


# ------------------------------------------------------------------------------------------------ config.json


def folder_of(path: Path, model_type: str = "llama", **changed: Any) -> Path:
    """A folder with the ``config.json`` of a small model; no weights."""
    small(model_type).config.save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return path


def test_a_file_with_only_name_and_path_is_planned_from_config_json(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "weights")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(f"name: mine\npath: {place}\n")
    words = ("model=mine", "method=lora_all")
    cfg = compose.build(*compose.compose_values(words, (tmp_path / "conf",)), words)
    assert (cfg.train.learning_rate, cfg.model.prompt, cfg.model.revision) == (1e-4, "plain", "main")
    assert cfg.method.adapter is not None
    planned = base.on_meta(cfg.model)
    assert base.count_parameters(planned)[1] == base.count_parameters(small("llama"))[1]
    attached = adapters.attach(planned, cfg.model, cfg.method.adapter, seed=0)
    adapted = {name.rpartition(".")[2] for name in attached.targeted_module_names}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("qwen2", (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], 7)),
        ("glm4", (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], 6)),
        ("gpt_neox", (["query_key_value"], ["query_key_value", "dense"], 4)),
    ],
)
def test_named_targets_are_found_in_a_model_whose_file_does_not_list_them(
    model_type: str, found: tuple[list[str], list[str], int]
) -> None:
    values = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 1}
    section = composed("model=local", "model.path=x").model.model_copy(
        update={"architecture": {"model_type": model_type, **values}, "path": None, "hub_id": None, "weights": "random"}
    )
    method = composed().method.adapter
    assert method is not None
    sets = [
        adapters.resolve_targets(base.on_meta(section), section, method.model_copy(update={"targets": name}))
        for name in ("query_value", "attention", "all")
    ]
    assert (sets[0], sets[1], len(sets[2])) == found


def test_a_file_that_describes_another_model_than_config_json_is_refused(tmp_path: Path) -> None:
    place = folder_of(tmp_path, "qwen2")
    with pytest.raises(ConfigError) as raised:
        base.architecture(composed("model=tiny", f"model.path={place}").model)
    assert str(raised.value) == (
        f"model.architecture: model=tiny differs from {place}/config.json: vocab_size: 6144 (in the file 50); "
        "hidden_size: 256 (in the file 64); intermediate_size: 448 (in the file 96); num_hidden_layers: 4 (in the file "
        "2); max_position_embeddings: 1024 (in the file 32768); tie_word_embeddings: True (in the file False). To use "
        "config.json: model=local model.path=<folder>, or architecture: null in the model's file; otherwise correct "
        "the values"
    )
    given = ("model=tiny", f"model.path={place}", "model.architecture=null")
    assert base.architecture(composed(*given).model).hidden_size == 64
    other = folder_of(tmp_path / "other", "llama")
    with pytest.raises(ConfigError, match=r"config\.json: model_type: qwen2 \(in the file llama\)\. To use"):
        base.architecture(composed("model=tiny", f"model.path={other}").model)


def test_a_file_may_use_older_names_than_config_json(tmp_path: Path) -> None:
    """Llama's rope_theta was a separate key before transformers 5; token ids are not part of an architecture."""
    place = folder_of(tmp_path, "llama", rope_theta=500000.0, rope_parameters=None, eos_token_id=7)
    block = {"model_type": "llama", "hidden_size": 64, "eos_token_id": 9}
    block |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "use_sliding_window": None}
    section = composed("model=local", f"model.path={place}").model
    assert base.architecture(section.model_copy(update={"architecture": block})).rope_parameters["rope_theta"] == 5e5
    block["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ConfigError, match=r"rope_parameters: .*10000\.0\} \(in the file .*500000\.0\}\)"):
        base.architecture(section.model_copy(update={"architecture": block}))


def test_null_removes_a_key_that_another_family_had() -> None:
    words = ("model.architecture.model_type=glm4", "model.architecture.use_sliding_window")
    with pytest.raises(
        ConfigError, match=r"use_sliding_window: unknown key\. .* is removed by use_sliding_window: null"
    ):
        base.architecture(composed("model=qwen05b", words[0]).model)
    assert base.architecture(composed("model=qwen05b", words[0], f"{words[1]}=null").model).model_type == "glm4"


def test_code_shipped_with_weights_is_planned_by_the_stand_in(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "baichuan", "hidden_size": 4096}')
    section = composed("model=baichuan2_7b", f"model.path={tmp_path}").model
    assert base.architecture(section).model_type == "llama"
    with pytest.raises(ConfigError, match=r"model\.architecture: transformers has no architecture 'baichuan'"):
        base.architecture(section.model_copy(update={"architecture": None}))


def test_a_config_in_the_hub_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = composed("model=qwen05b").model
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert base.architecture(section).hidden_size == 896  # nothing is there yet
    with pytest.raises(ModelError, match=r"no config\.json at Qwen/Qwen2\.5-0\.5B \(HF_HUB_OFFLINE=1 forbids network"):
        base.architecture(section.model_copy(update={"architecture": None}))
    folder_of(tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / section.revision, "qwen2")
    assert base.architecture(section.model_copy(update={"architecture": None})).hidden_size == 64
    with pytest.raises(ConfigError, match=r"hidden_size: 896 \(in the file 64\)"):
        base.architecture(section)
