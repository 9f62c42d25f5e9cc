"""Wrong paths of models, tokenizers and adapters are reported, each with its message, before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finsa.config import ROOT, RunConfig
from finsa.errors import ConfigError
from finsa.models import folders, tokenizers

Configure = Callable[..., RunConfig]
TINY = ROOT / "data" / "tiny"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def model(folder: Path, leave_out: tuple[str, ...] = (), **changed: Any) -> Path:
    """A folder with the embedded base's files, some omitted, and changed values in its ``config.json``."""
    folder.mkdir()
    for name in FILES:
        if name not in leave_out:
            (folder / name).write_bytes((TINY / name).read_bytes())
    if changed:
        values = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in values.items() if value != "gone"})
        )
    return folder


def adapter(folder: Path, **changed: Any) -> Path:
    """A folder as PEFT, LLaMA-Factory and ms-swift write it."""
    folder.mkdir(parents=True)
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"], "bias": "none"}
    values |= {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B", "modules_to_save": None, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(values | changed))
    header = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": {"data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def problems(config: Configure, *words: str) -> list[str]:
    return [str(problem) for problem in folders.problems(config(*words))]


def test_a_path_is_classified_by_its_files(tmp_path: Path, trained: Callable[..., Path]) -> None:
    run = trained("lora_response")
    places = {
        "model": model(tmp_path / "model"),
        "adapter": run / "adapters" / "default",
        "run": run,
        "folder": tmp_path,
        "file": tmp_path / "model" / "config.json",
        "nothing": tmp_path / "nowhere",
    }
    assert {kind: folders.classify(path) for kind, path in places.items()} == {kind: kind for kind in places}
    assert folders.classify(TINY) == "model"  # pretrain's record lies beside it
    (run / "adapters" / "default" / "README.md").touch()
    both = model(tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    assert folders.classify(both) == "adapter"  # transformers would load it as well


def test_good_folders_have_no_problem(config: Configure, tmp_path: Path) -> None:
    assert problems(config) == []
    assert problems(config, f"model.path={model(tmp_path / 'good')}") == []
    half = model(tmp_path / "half", ("tokenizer.json", "tokenizer_config.json"))
    assert problems(config, f"model.path={half}", f"model.tokenizer={TINY}") == []
    assert problems(config, f"model.path={half}", "model.tokenizer=some/repository") == []
    assert problems(config, f"model.path={tmp_path}/nowhere", "model.weights=random") == []


def _shards(folder: Path) -> Path:
    model(folder, ("model.safetensors",))
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("abc", names, strict=True))})
    )
    (folder / names[1]).write_bytes((TINY / "model.safetensors").read_bytes())
    return folder


def _cut(folder: Path) -> Path:
    model(folder)
    content = (TINY / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])
    return folder


def _text(folder: Path, name: str, text: str) -> Path:
    model(folder)
    (folder / name).write_text(text)
    return folder


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda at: at, "there is no file or folder {at}. It must contain config.json, weights and a tokenizer"),
    "misspelt": (lambda at: model(at.with_name("here_x")).with_name("here"), "Did you mean '{at}_x'?"),
    "empty": (lambda at: at.mkdir() or at, "{at} contains no config.json, so it is not a model: it is empty"),
    "weights gone": (
        lambda at: model(at, ("model.safetensors",)),
        "{at} contains no weights (model.safetensors or pytorch_model.bin): it contains config.json, tokenizer.json, "
        "tokenizer_config.json",
    ),
    "tokenizer gone": (
        lambda at: model(at, ("tokenizer.json",)),
        "{at} contains no tokenizer; copy its files there, or name it with model.tokenizer=<folder or hub id>",
    ),
    "shards gone": (
        _shards,
        "{at} lacks 2 of 3 shards that model.safetensors.index.json names: model-00001-of-00003.safetensors, "
        "model-00003-of-00003.safetensors",
    ),
    "cut off": (_cut, "{at}/model.safetensors is incomplete: 7,484,136 bytes of 7,485,136; copy or download it again"),
    "lfs": (
        lambda at: _text(at, "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "{at}/model.safetensors is a Git LFS pointer instead of the weights; run git lfs pull in its folder",
    ),
    "no safetensors": (
        lambda at: _text(at, "model.safetensors", "<html>404 not found</html>"),
        "{at}/model.safetensors is damaged: it has no safetensors header",
    ),
    "no json": (lambda at: _text(at, "config.json", "{"), "{at}/config.json is not valid JSON"),
    "no type": (
        lambda at: model(at, model_type="gone"),
        "{at}/config.json names no model_type, so transformers cannot read it",
    ),
    "classifier": (
        lambda at: model(at, architectures=["Qwen2ForSequenceClassification"]),
        "{at} contains a Qwen2ForSequenceClassification, which has no language modeling head and so cannot answer in "
        "words",
    ),
    "one level up": (
        lambda at: at.mkdir() or model(at / "inner").parent,
        "{at} contains no config.json; did you mean model.path={at}/inner?",
    ),
    "hub cache": (
        lambda at: (at / "snapshots").mkdir(parents=True) or model(at / "snapshots" / "abc").parents[1],
        "{at} is a folder of the hub's cache; its model is model.path={at}/snapshots/abc",
    ),
    "file": (
        lambda at: model(at) / "model.safetensors",
        "{at}/model.safetensors is a file; name its folder: model.path={at}",
    ),
    "adapter": (
        lambda at: adapter(at),
        "{at} is an adapter (LoRA, trained on Qwen/Qwen2.5-0.5B), not a model. To train it further: model=qwen05b "
        'method.adapter.init={at}. To start from the merged model: python -c "from peft import '
        "AutoPeftModelForCausalLM as M; M.from_pretrained('{at}').merge_and_unload().save_pretrained('<folder>')\", "
        "then model.path=<folder>",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_model_path_is_reported_with_its_contents(config: Configure, tmp_path: Path, name: str) -> None:
    make, text = CASES[name]
    at = tmp_path / "here"
    found = problems(config, f"model.path={make(at)}")
    assert len(found) == 1
    assert found[0].startswith("model.path: ")
    assert found[0].endswith(text.format(at=at))


def test_a_hub_id_is_not_treated_as_a_path(config: Configure) -> None:
    known, other = (problems(config, f"model.path={name}") for name in ("Qwen/Qwen2.5-0.5B", "some/model"))
    assert known[0].endswith("If it is a model of the hub: model=qwen05b")
    assert other[0].endswith("If it is a model of the hub: model=local model.hub_id=some/model")


def test_a_run_given_as_a_model_is_refused_with_alternatives(
    config: Configure, trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained("lora_response")
    assert problems(config, f"model.path={run}") == [
        f"model.path: {run} is a run folder that contains an adapter. To train the adapter further: "
        f"method.adapter.init={run}, with the model of that run. To merge it: python run.py stage=export run={run} "
        "format=merged output=<folder>, then model.path=<folder>"
    ]
    inside = problems(config, f"model.path={run / 'adapters' / 'default'}")
    assert f"To start from the merged model: python run.py stage=export run={run} format=merged" in inside[0]
    whole = trained("full")
    words = f"model.path={whole / 'model'} model.tokenizer={whole / 'tokenizer'}"
    assert problems(config, f"model.path={whole}") == [f"model.path: {whole} is a run folder; its model is {words}"]
    assert problems(config, *words.split()) == []


def test_an_export_that_is_not_a_model_is_refused(config: Configure, tmp_path: Path) -> None:
    folder = model(tmp_path / "export")
    (folder / "manifest.json").write_text('{"format": "classifier"}')
    (folder / "exported_run.json").write_text("{}")
    assert problems(config, f"model.path={folder}") == [
        f"model.path: {folder} is an export with format=classifier, which cannot be trained; export the run with "
        "format=merged"
    ]
    (folder / "manifest.json").write_text('{"format": "merged"}')
    assert problems(config, f"model.path={folder}") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.tokenizer={at}/nowhere", "model.tokenizer: there is no folder {at}/nowhere"),
        ("model.tokenizer={at}", "model.tokenizer: {at} contains no tokenizer: it is empty"),
        ("method=encoder method.baseline.path={at}/nowhere", "method.baseline.path: there is no folder {at}/nowhere"),
        ("method=encoder method.baseline.path={at}", "method.baseline.path: {at} contains no config.json: it is empty"),
        ("method=textcnn method.baseline.units=model model.path={at}", "model.path: {at} contains no config.json"),
        ("method.adapter.init={at}/nowhere", "method.adapter.init: there is no folder {at}/nowhere. It must contain"),
        (
            "method.adapter.init={at}",
            "method.adapter.init: {at} contains no adapter_config.json, so it is not a PEFT adapter",
        ),
    ],
)
def test_every_other_path_is_checked_too(config: Configure, tmp_path: Path, words: str, message: str) -> None:
    assert problems(config, *words.format(at=tmp_path).split())[0].startswith(message.format(at=tmp_path))


def test_every_stage_that_loads_a_model_refuses_a_missing_path(tmp_path: Path) -> None:
    code = f"""
import sys
from finsa.cli import run
for stage in {folders.USERS}:
    more = ["data=tiny_corpus", "train=pretrain", "method=full"] if stage == "pretrain" else []
    sys.argv = ["run.py", f"stage={{stage}}", "model.path=/nowhere", "tracking=none", *more]
    print(run(), "torch" in sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "2 False\n" * 7
    text = "there is no file or folder /nowhere. It must contain config.json, weights and a tokenizer"
    assert done.stderr == f"error: model.path: {text}\n" * 7
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_reports_a_wrong_path_once(config: Configure) -> None:
    jobs = [config("model.path=/nowhere", f"seed={seed}") for seed in (1, 2, 3)]
    with pytest.raises(ConfigError) as raised:
        folders.require(jobs)
    assert len(raised.value.problems) == 1


# --------------------------------------------------------------------------------------- initial adapters


@pytest.mark.parametrize(
    ("changed", "words", "message"),
    [
        ({}, "", None),
        ({"target_modules": "model\\..*"}, "method.adapter.targets=[q_proj]", None),  # ms-swift writes patterns
        (
            {"r": 16, "lora_alpha": 32, "target_modules": ["o_proj"]},
            "",
            "has rank 16, not 8; alpha 32, not 16; targets o_proj, not q_proj, v_proj. Add method.adapter.rank=16 "
            "method.adapter.alpha=32 'method.adapter.targets=[o_proj]'",
        ),
        ({"use_dora": True}, "", "has variant dora, not lora. Add method.adapter.variant=dora"),
        ({"peft_type": "IA3"}, "", "is a PEFT adapter of type IA3; only LoRA adapters can be trained"),
        ({"modules_to_save": ["lm_head"]}, "", "has modules_to_save=['lm_head'], which method.adapter does not"),
        ({"bias": "all"}, "", "has bias=all, which method.adapter does not support"),
        ({"init_lora_weights": "pissa"}, "", "was initialized with init_lora_weights=pissa, which changes the base"),
        ({"r": None}, "", "has no rank (r) or no lora_alpha"),
    ],
)
def test_an_initial_adapter_must_match_the_method(
    config: Configure, tmp_path: Path, changed: dict[str, Any], words: str, message: str | None
) -> None:
    folder = adapter(tmp_path / "adapter", **changed)
    found = problems(config, f"method.adapter.init={folder}", *words.split())
    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith("method.adapter.init: ")
        assert message in found[0]


def test_a_run_with_several_adapters_requires_a_choice(config: Configure, tmp_path: Path) -> None:
    for name in ("forum", "news"):
        adapter(tmp_path / "adapters" / name)
    assert problems(config, f"method.adapter.init={tmp_path}") == [
        f"method.adapter.init: {tmp_path} contains 2 adapters; choose one of {tmp_path}/adapters/forum, "
        f"{tmp_path}/adapters/news"
    ]


def test_an_adapter_on_the_hub_is_refused_before_its_tokenizer_is_loaded(
    config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub keeps a repository in its cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--some--adapter"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    adapter(place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    section = config("model=local", "model.hub_id=some/adapter").model
    with pytest.raises(ConfigError, match=r"model\.hub_id: some/adapter is an adapter \(LoRA, trained on Qwen/Qwen2.5"):
        tokenizers.load_tokenizer(section)
