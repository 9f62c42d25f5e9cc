"""Translation of LLaMA-Factory files: every key is handled, and the result composes to the published settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import commands
import pytest
import yaml

from finsa.config import RunConfig, command_line, compose
from finsa.data import dataset
from finsa.errors import FinsaError
from finsa.interop import llamafactory
from finsa.interop.keys import IGNORED, UNSUPPORTED

# The intent study's training file, and AIDF's settings (which came from TRL) as such a file, by what was published.
INTENT: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "dataset": "openfindata_intent",
    "template": "qwen",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": "1.0e-4",
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "save_steps": 500,
    "logging_steps": 10,
}
AIDF: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B",
    "dataset": "aidf_news",
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target": "q_proj,v_proj",
    "train_on_prompt": True,
    "cutoff_len": 1024,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 5,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "bf16": True,
    "flash_attn": "fa2",
    "deepspeed": "zero1.json",
}


@pytest.fixture
def imported(config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """Write a training file, translate it, and compose the result."""

    def of(content: dict[str, Any], *words: str) -> RunConfig:
        file = tmp_path / "tuned.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        _run(config, file, tmp_path / "out", *words)
        values, choices = compose.compose_values(["experiment=tuned"], (tmp_path / "out",))
        return compose.build(values, choices, [])

    return of


def _run(config: Callable[..., RunConfig], file: Path, folder: Path, *words: str) -> dict[str, Any]:
    stage = import_module("finsa.stages.import")
    return dict(stage.run(config("stage=import", f"input={file}", f"output={folder}", *words)).metrics)


def test_intent_file_is_the_published_experiment(
    imported: Callable[..., RunConfig], config: Callable[..., RunConfig]
) -> None:
    got, published = imported(INTENT), config("experiment=openfindata_intent", "model=qwen7b", "method=lora_all")
    assert got.model == published.model
    assert got.method.model_dump(exclude={"name"}) == published.method.model_dump(exclude={"name"})
    same = {"name", "group_by_length"}  # LLaMA-Factory does not group; the order within an epoch is all it changes
    assert got.train.model_dump(exclude=same) == published.train.model_dump(exclude=same)
    assert (got.train.batch_size, got.train.micro_batch_size, got.train.learning_rate) == (8, 1, 1e-4)
    assert (got.data.name, got.data.max_length, got.seed) == ("openfindata_intent", 2048, 42)


def test_aidf_file_is_the_published_experiment(
    imported: Callable[..., RunConfig], config: Callable[..., RunConfig]
) -> None:
    got, published = imported(AIDF, "stage.processes=4"), config("experiment=aidf_ablation", "method=lora")
    assert got.method.adapter is not None
    assert got.method.adapter.targets == published.model.lora_targets.query_value
    kept = {"name": True, "adapter": {"targets"}}
    assert got.method.model_dump(exclude=kept) == published.method.model_dump(exclude=kept)
    same = {"name", "group_by_length"}
    assert got.train.model_dump(exclude=same) == published.train.model_dump(exclude=same)
    assert (got.train.batch_size, got.train.select_by, got.data.max_length) == (192, "loss", 1024)
    assert got.model.model_dump(exclude={"attention"}) == published.model.model_dump(exclude={"attention"})


def test_defaults_are_those_of_the_other_trainer(imported: Callable[..., RunConfig]) -> None:
    got = imported({"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset": "sample"})
    assert got.method.adapter is not None
    assert (got.method.adapter.rank, got.method.adapter.alpha, got.method.adapter.dropout) == (8, 16, 0)
    assert (got.train.batch_size, got.train.learning_rate, got.train.epochs) == (8, 5e-5, 3)
    assert (got.train.schedule, got.train.warmup, got.data.max_length) == ("linear", 0, 2048)


VARIANTS: list[tuple[dict[str, Any], str, Any]] = [
    ({"quantization_bit": 4}, "quantization", "nf4"),
    ({"quantization_bit": 8}, "quantization", "int8"),
    ({"use_dora": True}, "adapter.variant", "dora"),
    ({"use_rslora": True}, "adapter.variant", "rslora"),
    ({"pissa_init": True}, "adapter.variant", "pissa"),
    ({"loraplus_lr_ratio": 16}, "adapter.lr_ratio", 16.0),
    ({"lora_rank": 32}, "adapter.alpha", 64),
    ({"finetuning_type": "full"}, "learn", "all"),
    ({"train_on_prompt": True}, "loss_on", "all"),
]


@pytest.mark.parametrize(("keys", "dotted", "value"), VARIANTS)
def test_variants_of_the_method(
    imported: Callable[..., RunConfig], keys: dict[str, Any], dotted: str, value: Any
) -> None:
    got: Any = imported({"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset": "sample", **keys}).method
    for part in dotted.split("."):
        got = getattr(got, part)
    assert got == value


def test_nothing_is_dropped_silently(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Each key of the tables, with a value other than its default, and an unknown one."""
    own = dict.fromkeys((*IGNORED, *UNSUPPORTED), "x") | {"warp_speed": 9, "hf_hub_token": "hf_sEcReT"}
    content = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset": "sample"} | own
    for key in ("bf16", "fp16", "pure_bf16", "use_dora", "use_rslora", "pissa_init", "load_best_model_at_end"):
        content[key] = False
    content |= {"lora_rank": 4, "lora_alpha": 4, "lora_dropout": 0, "loraplus_lr_ratio": None, "max_steps": -1}
    translation = llamafactory.translate(content, "all.yaml", 1)
    assert {outcome.key for outcome in translation.outcomes} >= set(content) - {"dataset"}
    assert {outcome.key for outcome in translation.outcomes if outcome.kind == "not supported"} == {
        *UNSUPPORTED,
        "warp_speed",
    }
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    _run(config, file, tmp_path / "out")
    written = (tmp_path / "out" / "experiment" / "all.yaml").read_text(encoding="utf-8")
    assert "warp_speed: 9 - unknown key" in written
    assert "hf_sEcReT" not in written
    assert all(f"#   {key}: " in written for key in UNSUPPORTED)


@pytest.mark.parametrize(("packs", "kinds"), [({"neat_packing": True}, {"no effect"}), ({}, {"not supported"})])
def test_packing_without_cross_contamination_is_equivalent_to_no_packing(
    packs: dict[str, Any], kinds: set[str]
) -> None:
    content = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset": "sample", "packing": True, **packs}
    translation = llamafactory.translate(content, "packed.yaml", 1)
    assert {outcome.kind for outcome in translation.outcomes if "packing" in outcome.key} == kinds


def test_data_sets_are_read_as_their_entries_specify(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"第{n}条：{'涨' if n % 2 else '跌'}{n}", "positive" if n % 2 else "negative") for n in range(60)]
    alpaca = [{"instruction": "判断情绪", "input": text, "output": label} for text, label in rows]
    chats = [{"conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": v}]} for t, v in rows]
    columns = [{"q": text, "a": label} for text, label in rows]
    info = {
        "posts": {"file_name": "posts.json"},
        "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
        "sample": {"file_name": "q.json", "columns": {"prompt": "q", "response": "a"}},
    }
    for name, content in {"posts": alpaca, "chats": chats, "q": columns, "dataset_info": info}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    _run(config, tmp_path / "dataset_info.json", tmp_path / "out")
    assert "data=sample_imported" in capsys.readouterr().out  # the name is taken by conf/data/sample.yaml
    for name, first in (("posts", "判断情绪\n第"), ("chats", "第"), ("sample_imported", "第")):
        values, choices = compose.compose_values([f"data={name}"], (tmp_path / "out",))
        read = dataset.load(compose.build(values, choices, []).data)
        assert sum(part.height for part in read.splits.values()) == 60
        assert read.labels.names == ("negative", "positive")
        assert all(text.startswith(first) for text in read.splits["train"]["text"])


def test_a_training_file_with_its_data_passes_the_check(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """As a user does it: two commands, the second with the written folder."""
    rows = [{"instruction": f"文本{n}", "output": "利好" if n % 2 else "利空"} for n in range(80)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}), encoding="utf-8")
    content = {**INTENT, "dataset": "mine", "model_name_or_path": "Qwen/Qwen2.5-0.5B", "template": "default"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    _run(config, tmp_path / "mine.yaml", tmp_path / "out")
    words = ["--config-dir", str(tmp_path / "out"), "experiment=mine", "model=tiny", "data.max_length=64"]
    done = commands.run(*words, "stage=check", "train.micro_batch_size=2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "64 rows, 24 steps of 8 sequences" in done.stdout  # 80 less 8 for validation and 8 for the test


def test_data_that_is_not_found_must_be_named(imported: Callable[..., RunConfig]) -> None:
    got = imported({**INTENT, "dataset": "elsewhere"})
    assert (got.data.name, got.data.files) == ("table", None)
    with pytest.raises(FinsaError, match="data=table needs files"):
        dataset.load(got.data)


def _write(folder: Path, **contents: Any) -> None:
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _pairs(count: int, mark: str) -> list[tuple[str, str]]:
    return [(f"{mark}第{n}条：{'涨' if n % 2 else '跌'}{n}", "positive" if n % 2 else "negative") for n in range(count)]


@pytest.mark.parametrize(
    ("template", "prompt"), [("default", "Human: {text}\nAssistant:"), (None, "{text}"), ("qwen", "{text}")]
)
def test_two_data_sets_are_split_and_prompted_as_the_file_specifies(
    imported: Callable[..., RunConfig], tmp_path: Path, template: str | None, prompt: str
) -> None:
    """The share of validation rows applies to each data set, and the prompt is that of the template."""
    first = [{"instruction": "判断", "input": text, "output": label} for text, label in _pairs(100, "甲")]
    second = [
        {"system": "分析师", "conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": v}]}
        for t, v in _pairs(50, "乙")
    ]
    columns = {"messages": "conversations", "system": "system"}
    info = {"a": {"file_name": "a.json"}, "b": {"file_name": "b.json", "formatting": "sharegpt", "columns": columns}}
    (tmp_path / "data").mkdir()
    _write(tmp_path / "data", a=first, b=second, dataset_info=info)
    words = {"dataset": "a,b", "val_size": 0.3, "template": template, "model_name_or_path": "Qwen/Qwen2.5-0.5B"}
    got = imported({key: value for key, value in words.items() if value is not None})
    assert (got.data.source, got.data.prompt) == ("mixture", prompt)
    assert got.data.parts is not None
    assert [(part.split.rule, part.split.validation) for part in got.data.parts.values()] == [("random", 0.3)] * 2
    splits = dataset.load(got.data).splits
    # scikit-learn rounds up: 10 and 5 test rows, then 0.3 / 0.9 of the 90 and 45 that are left
    assert [splits[name].height for name in ("train", "validation", "test")] == [90, 45, 15]
    assert {text[:4] for text in splits["train"]["text"]} == {"判断\n甲", "syst"}


@pytest.mark.parametrize(
    ("keys", "warmup"),
    [
        ({"warmup_steps": 0.1}, 0.1),
        ({"warmup_steps": 20, "warmup_ratio": 0.5}, 20),
        ({"warmup_steps": 0, "warmup_ratio": 0.05}, 0.05),
        ({"warmup_steps": 0.1, "lr_scheduler_type": "constant"}, 0),
    ],
)
def test_warmup_in_steps_or_as_a_share(imported: Callable[..., RunConfig], keys: dict[str, Any], warmup: float) -> None:
    got = imported({"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset": "sample", "logging_steps": 0.1, **keys})
    assert (got.train.warmup, got.train.log_every) == (warmup, 10)


@pytest.mark.parametrize(
    ("keys", "method", "beta", "margin"),
    [
        ({}, "dpo", 0.1, 0.0),
        ({"pref_loss": "ipo", "pref_beta": 0.4}, "ipo", 0.4, 0.0),
        ({"pref_loss": "simpo", "pref_beta": 2}, "simpo", 2.0, 0.5),
        ({"pref_loss": "orpo", "lora_rank": 4}, "orpo", 0.1, 0.0),
    ],
)
def test_training_on_pairs(
    imported: Callable[..., RunConfig], tmp_path: Path, keys: dict[str, Any], method: str, beta: float, margin: float
) -> None:
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True},
        "chats": {"file_name": "chats.json", "ranking": True, "formatting": "sharegpt"},
        "named": {
            "file_name": "named.json",
            "ranking": True,
            "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
        },
    }
    _write(tmp_path, dataset_info=info)
    for name, columns in (
        ("pairs", ("chosen", "rejected")),
        ("chats", ("chosen", "rejected")),
        ("named", ("good", "bad")),
    ):
        got = imported({"model_name_or_path": "Qwen/Qwen2.5-0.5B", "stage": "dpo", "dataset": name, **keys})
        assert (got.data.columns.label, got.data.columns.rejected) == columns
        assert got.data.source == {"pairs": "alpaca", "chats": "messages", "named": "table"}[name]
        assert got.method.preference is not None
        assert (got.method.name, got.method.init, got.method.loss_on) == (method, "base", "label")
        assert (got.method.preference.loss, got.method.preference.beta) == (method, beta)
        assert got.method.preference.margin == margin
        assert got.method.adapter is not None
        assert got.method.adapter.rank == keys.get("lora_rank", 8)


def test_each_entry_is_translated_separately_and_the_others_are_listed(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = {
        "_comment": "mine",
        "posts": {"file_name": "posts.json"},
        "prefs": {"file_name": "prefs.json", "ranking": True, "columns": {"prompt": "q", "chosen": "c"}},
        "unranked": {"file_name": "prefs.json", "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}},
        "wiki": {"file_name": "wiki.txt", "columns": {"prompt": "a", "response": "b"}},
        "forum": {"file_name": "t.json", "columns": {"prompt": "instruction", "response": "output", "system": "role"}},
        "hub": {"hf_hub_url": "someone/set", "formatting": "sharegpt"},
        "cloud": {"cloud_file_name": "s3://bucket"},
        "kto": {
            "file_name": "k.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
        },
        "talk": {
            "file_name": "talk.json",
            "columns": {"prompt": "instruction", "response": "output", "history": "history"},
        },
    }
    _write(tmp_path, dataset_info=info)
    counts = _run(config, tmp_path / "dataset_info.json", tmp_path / "out")
    assert counts["entries not translated"] == 8
    assert sorted(file.name for file in (tmp_path / "out").rglob("*.*")) == ["posts.yaml", "talk.yaml"]
    printed = capsys.readouterr().out
    for line in (
        "_comment: does not describe a data set; an entry needs file_name, hf_hub_url or another source",
        "prefs: ranking is true, so columns needs chosen and rejected",
        "unranked: columns.chosen and columns.rejected need ranking: true",
        "wiki: wiki.txt is not read. Choose from: .arrow, .csv",
        "forum: columns.system is only read from the field 'system'; rename 'role' in the file",
        "hub: chats on the hub are not read (someone/set): save them as a file",
        "cloud: cloud_file_name is not read; save the rows as a file",
        "kto: columns.kto_tag: tagged answers are not read; method=kto learns from pairs",
    ):
        assert f"not translated: {line}" in printed
    turns = {}
    for name in ("posts", "talk"):  # a field that columns does not name is not read by LLaMA-Factory
        values, choices = compose.compose_values([f"data={name}"], (tmp_path / "out",))
        turns[name] = compose.build(values, choices, []).data.turns
    assert turns == {"posts": "last", "talk": "all"}


def test_an_experiment_is_written_atomically(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """One of two data sets cannot be translated; and a value that finsa refuses in the final composition."""
    _write(tmp_path, dataset_info={"a": {"file_name": "a.json"}, "b": {"file_name": "b.json", "formatting": "parrot"}})
    words = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset": "a,b"}
    for content, message in (
        (words, "b: formatting 'parrot'"),
        (words | {"dataset": "a", "cutoff_len": 4}, "max_length"),
    ):
        (tmp_path / "t.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        with pytest.raises(FinsaError, match=message):
            _run(config, tmp_path / "t.yaml", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_local_folder_is_not_treated_as_the_hub_model(
    imported: Callable[..., RunConfig], config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Its weights are used, and its config.json determines its model file, regardless of the folder's name."""
    folder = tmp_path / "tuned" / "Qwen2.5-7B"
    folder.mkdir(parents=True)
    shape = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864}
    _write(folder, config=shape)
    got = imported({"model_name_or_path": str(folder), "dataset": "sample"})
    assert (got.model.hub_id, got.model.path) == ("Qwen/Qwen2.5-0.5B", str(folder))
    gone = imported({"model_name_or_path": "/models/Qwen2.5-0.5B", "dataset": "sample"})
    assert (gone.model.name, gone.model.path) == ("qwen05b", "/models/Qwen2.5-0.5B")
    copy = imported({"model_name_or_path": "someone/Qwen2.5-0.5B", "dataset": "sample"})
    assert (copy.model.name, copy.model.hub_id, copy.model.revision) == ("qwen05b", "someone/Qwen2.5-0.5B", "main")
    _write(folder, config=shape | {"num_hidden_layers": 3})
    with pytest.raises(FinsaError, match=r"no file in conf/model describes the model in .*num_hidden_layers 3"):
        imported({"model_name_or_path": str(folder), "dataset": "sample"})
    _write(folder, adapter_config={})
    with pytest.raises(FinsaError, match=r"is an adapter \(adapter_config.json\), not a model"):
        imported({"model_name_or_path": str(folder), "dataset": "sample"})
    with pytest.raises(FinsaError, match="there is no config.json in /x/y"):
        imported({"model_name_or_path": "/x/y", "dataset": "sample"})


def test_data_sets_are_found_above_the_training_file(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in LLaMA-Factory: examples/train_lora/x.yaml and data/dataset_info.json; dataset_dir may be relative."""
    for name in ("data", "sets", "examples/train_lora", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place, words in (("data", {}), ("sets", {"dataset_dir": "./sets"})):
        _write(tmp_path / place, dataset_info={"mine": {"file_name": "mine.json"}})
        file = tmp_path / "examples" / "train_lora" / f"{place}.yaml"
        content = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset": "mine", "lora_target": ["q_proj", "v_proj"]}
        file.write_text(yaml.safe_dump(content | words), encoding="utf-8")
        _run(config, file, tmp_path / "out")
        values, choices = compose.compose_values([f"experiment={place}"], (tmp_path / "out",))
        cfg = compose.build(values, choices, [])
        assert cfg.data.files == str(tmp_path / place / "mine.json")
        assert cfg.method.adapter is not None
        assert cfg.method.adapter.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "is not an object of keys and values"),
        ("a: [", "cannot be read as YAML or JSON"),
        ("stage: sft", "model_name_or_path: is missing"),
        ("{model_name_or_path: Qwen/Qwen2.5-0.5B, stage: rm}", "stage: 'rm' is not translated, only sft"),
        (
            "{model_name_or_path: Qwen/Qwen2.5-0.5B, stage: kto}",
            "method=kto learns from pairs, not from tagged answers",
        ),
        (
            "{model_name_or_path: Qwen/Qwen2.5-0.5B, stage: dpo, pref_loss: hinge}",
            "pref_loss: 'hinge' is not translated",
        ),
        (
            "{model_name_or_path: Qwen/Qwen2.5-0.5B, stage: dpo, pref_beta: 0.0}",
            r"pref_beta: as method.preference.beta: .* greater than 0, not 0.0 \(a number\)  \[file.yaml\]",
        ),
        ("{model_name_or_path: Qwen/Qwen2.5-0.5B, stage: dpo, finetuning_type: full}", "not translated for stage dpo"),
        ("{model_name_or_path: Qwen/Qwen2.5-0.5b-instrukt}", "Did you mean 'qwen/qwen2.5-0.5b-instruct'"),
        ("{model_name_or_path: Qwen/Qwen2.5-0.5B, learning_rate: fast}", "learning_rate: must be a number, not fast"),
        ("{model_name_or_path: Qwen/Qwen2.5-0.5B, lora_rank: 2.5}", "lora_rank: must be an integer, not 2.5"),
        ("{model_name_or_path: Qwen/Qwen2.5-0.5B, finetuning_type: freeze}", "finetuning_type: 'freeze'"),
        (
            "{model_name_or_path: Qwen/Qwen2.5-0.5B, use_dora: true, pissa_init: true}",
            "cannot be combined with other variants",
        ),
        ("{model_name_or_path: Qwen/Qwen2.5-0.5B, quantization_bit: 3}", "quantization_bit: 3 is not translated"),
        ('{"a": {"script_url": "a"}}', "script_url is not read"),
        ('{"a": {"file_name": "a.json", "formatting": "parrot"}}', "formatting 'parrot' is not translated"),
    ],
)
def test_an_untranslatable_setting_is_one_message(
    config: Callable[..., RunConfig], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "file.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(FinsaError, match=message) as caught:
        _run(config, tmp_path / "file.yaml", tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_missing_file_and_folder(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(FinsaError, match="input: no such file"):
        _run(config, tmp_path / "none.yaml", tmp_path / "out")
    with pytest.raises(FinsaError, match="stage=import needs input="):
        command_line.check(["stage=import", "input=x.yaml"])
