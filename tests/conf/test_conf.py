"""Every file below conf/: it composes, its values fit the types, and the command in its header can be run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compositions import check

from finsa.config import ROOT, RunConfig, command_line

CONF = ROOT / "conf"
FILES = sorted(file.relative_to(CONF).as_posix() for file in CONF.rglob("*.yaml"))
GROUPED = [name for name in FILES if "/" in name]
# What a choice cannot do without.
NEEDS = {
    "data/aspects.yaml": ["method=lora_label"],
    **{f"method/{name}.yaml": ["method.init=base"] for name in ("dpo", "expected_reward", "ipo", "kto")},
    "method/regression_head.yaml": ["data=scored"],
    "model/local.yaml": ["model.path=somewhere"],
    **{f"behavior/{name}.yaml": ["stage=behave", "run=somewhere"] for name in ("zh", "en")},
    "stage/audit.yaml": ["input=somewhere"],
    "stage/augment.yaml": ["output=somewhere"],
    "stage/behave.yaml": ["run=somewhere"],
    "stage/export.yaml": ["run=somewhere", "format=onnx"],
    "stage/generate.yaml": ["data=generated", "output=somewhere"],
    "stage/import.yaml": ["input=somewhere", "output=somewhere"],
    "stage/predict.yaml": ["run=somewhere", "input=rows.csv", "output=answers.csv"],
    "stage/pretrain.yaml": ["data=tiny_corpus"],
    "stage/push.yaml": ["run=somewhere", "stage.repo=my-org/my-model"],
    "stage/report.yaml": ["runs=somewhere"],
    "stage/rerun.yaml": ["run=somewhere"],
    "stage/serve.yaml": ["run=somewhere"],
    "stage/cascade.yaml": ["runs=[somewhere,elsewhere]"],
    "stage/synthesize.yaml": ["output=somewhere", "stage.model=some"],
}
ARMS = ("lora", "lora_response", "lora_downsample", "lora_response_downsample")
Configure = Callable[..., RunConfig]


def _header(name: str) -> list[str]:
    lines = (CONF / name).read_text(encoding="utf-8").splitlines()
    last = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:last]


def _command(name: str) -> list[str] | None:
    """The overrides of the command in a header; ``<folder>`` is filled in, ``-m`` left out."""
    found = re.search(r"python run\.py([^\n]*)", "\n".join(_header(name)))
    if found is None:
        return None
    words = re.sub(r"<[^>]*>", "somewhere", found[1])
    words = shlex.split(words)
    return [word for word in words if not word.startswith("-")]


def test_all_files_are_found() -> None:
    assert len(FILES) >= 37
    assert {name.split("/")[0] for name in GROUPED} == {
        "behavior",
        "data",
        "experiment",
        "method",
        "model",
        "published",
        "stage",
        "tracking",
        "train",
    }


@pytest.mark.parametrize("name", GROUPED)
def test_file_composes_and_fits_the_types(config: Configure, name: str) -> None:
    group, stem = name.removesuffix(".yaml").split("/")
    cfg = config(f"{group}={stem}", *NEEDS.get(name, []))
    assert stem == (cfg.experiment if group == "experiment" else getattr(cfg, group).name)


def test_config_yaml_composes(config: Configure) -> None:
    cfg = config()
    assert (cfg.model.name, cfg.method.name, cfg.data.name) == ("tiny", "lora_response", "sample")
    assert (cfg.stage.name, cfg.tracking.name, cfg.experiment, cfg.seed) == ("train", "wandb", None, 42)


@pytest.mark.parametrize("name", FILES)
def test_header_contains_a_command_that_uses_the_file(name: str) -> None:
    command = _command(name)
    assert command is not None, "the header names no command"
    cfg = check(*command)[0]
    choice = name.removesuffix(".yaml").replace("/", "=")
    if name in GROUPED and choice not in command:  # then by default, or by an experiment
        group, stem = choice.split("=")
        assert stem in (getattr(cfg, group).name, *(cfg.sweep or {}).get(group, ()))


@pytest.mark.parametrize("name", FILES)
def test_header_describes_the_file(name: str) -> None:
    assert [line for line in _header(name) if not re.search("@package|python run.py", line)] or name == "config.yaml"


@pytest.mark.parametrize(
    "command",
    [
        "model=glm9b method=lora_expert data=finnf_news",
        "method=lora,lora_response,lora_downsample",
        "stage=moe_joint",
    ],
)
def test_command_of_the_design_card(command: str) -> None:
    check(*command.split())


def test_methods_of_a_sweep_differ_as_their_names_say(config: Configure) -> None:
    arms = {arm: config(f"method={arm}").method.model_dump() for arm in ARMS}
    for arm, values in arms.items():
        assert values["name"] == arm
        assert values == {
            **arms["lora"],
            "name": arm,
            "loss_on": "response" if "response" in arm else "all",
            "balance": "downsample" if "downsample" in arm else "none",
        }
    assert (arms["lora"]["loss_on"], arms["lora"]["balance"]) == ("all", "none")


def test_jobs_of_an_experiment_differ_only_in_the_method(config: Configure) -> None:
    rest = [config(f"method={arm}").model_dump(exclude={"method"}) for arm in (*ARMS, "zero_shot")]
    assert all(other == rest[0] for other in rest)


DIFFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora_response", {"adapter.variant": "dora"}),
    "rslora": ("lora_response", {"adapter.variant": "rslora", "adapter.rank": 64}),
    "pissa": ("lora_response", {"adapter.variant": "pissa", "adapter.alpha": 8, "adapter.dropout": 0.0}),
    "lora_plus": ("lora_response", {"adapter.lr_ratio": 16.0}),
    "qlora": ("lora_response", {"quantization": "nf4", "adapter.targets": "all"}),
    "lora_8bit": ("lora_response", {"quantization": "int8"}),
    "lora_label": ("lora_response", {"loss_on": "label"}),
    "lora_class_weight": ("lora_response", {"loss.class_weights": "inverse"}),
    "lora_oversample": ("lora_response", {"balance": "oversample"}),
    "lora_focal": ("lora_label", {"loss.name": "focal"}),
    "lora_logit_adjustment": ("lora_label", {"loss.logit_adjustment": 1.0}),
    "lora_adaptive_balanced": (
        "lora_label",
        {
            "loss.name": "adaptive_balanced",
            "loss.smoothing": 0.1,
            "loss.class_weights": "effective",
            "loss.beta": 0.99,
        },
    ),
    "lora_all": ("lora_response", {"adapter.targets": "all", "adapter.dropout": 0.0}),
    "aidf_lora_response": ("lora_response", {"adapter.dropout": 0.01}),
    "aidf_lora_v1": ("aidf_lora_response", {}),
    "finllm_qlora": (
        "lora",
        {
            "quantization": "nf4",
            "adapter.targets": "attention",
            "adapter.rank": 4,
            "adapter.alpha": 8,
            "adapter.dropout": 0.05,
        },
    ),
    "finllm_qlora_response": ("finllm_qlora", {"loss_on": "response"}),
    "classifier": ("lora_label", {"head": "classifier", "classifier_dropout": 0.1}),
    "classifier_label_words": ("classifier", {"classifier_init": "label_words"}),
    "full": ("lora_response", {"learn": "all", "adapter": None}),
    "zero_shot": ("full", {"learn": "nothing"}),
}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_method_differs_from_its_base_as_its_name_says(config: Configure, name: str) -> None:
    neighbor, changes = DIFFERENCES[name]
    own, other = (_flat(config(f"method={method}").method.model_dump()) for method in (name, neighbor))
    assert {key: value for key, value in own.items() if other.get(key, "none") != value} == {"name": name, **changes}


def test_scale_of_rslora_is_that_of_plain_lora(config: Configure) -> None:
    plain, stable = config("method=lora_response").method.adapter, config("method=rslora").method.adapter
    assert plain is not None
    assert stable is not None
    assert stable.alpha / stable.rank**0.5 == plain.alpha / plain.rank == 2


def test_zero_shot_learns_nothing(config: Configure) -> None:
    method = config("method=zero_shot").method
    assert (method.learn, method.adapter, method.balance) == ("nothing", None, "none")


def test_expert_is_the_published_one(config: Configure) -> None:
    method = config("method=lora_expert").method
    assert method.adapter is not None
    assert (method.adapter.rank, method.adapter.alpha, method.adapter.dropout) == (16, 16, 0.05)
    assert method.adapter.targets == ("q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")


def test_published_splits(config: Configure) -> None:
    news, forum = config("data=finnf_news").data, config("data=finnf_forum").data
    assert (news.split.validation, news.split.test, news.split.seed) == (0.01, 0.01, 42)
    assert (forum.split.validation, forum.split.test, forum.split.seed) == (0.2, 0.2, 42)
    assert news.labels == forum.labels == ("利空", "中性", "利好")


def test_aidf_prompt_is_the_published_one(config: Configure) -> None:
    assert config("data=aidf_news").data.prompt == (
        "<|user|>\n新闻内容：{text}\n请根据内容判断情绪（仅输出 positive / neutral / negative）：\n<|assistant|>\n"
        "这篇新闻的情绪是："
    )


# Written without the hub, so that their newest commit could not be looked up; run.json has the one that was used.
UNPINNED = (
    *("smollm2_135m", "smollm2_360m", "gemma3_270m", "gemma3_1b", "glm4_9b", "llama31_8b", "llama32_1b"),
    *(
        "qwen3_0_6b",
        "qwen3_1_7b",
        "qwen3_4b",
        "qwen3_4b_instruct_2507",
        "qwen3_8b",
        "qwen25_1_5b",
        "r1_distill_qwen_7b",
    ),
)


@pytest.mark.parametrize("name", [name for name in GROUPED if name.startswith("model/")])
def test_model_targets_and_architecture(config: Configure, name: str) -> None:
    model = config(f"model={Path(name).stem}", *NEEDS.get(name, [])).model
    targets = model.lora_targets
    if targets is None:  # found in the model
        assert (model.name, model.architecture) == ("local", None)
        return
    assert set(targets.query_value) <= set(targets.attention) < set(targets.all)
    pinned = re.fullmatch(r"[0-9a-f]{40}", model.revision) is not None
    assert model.hub_id is None or pinned == (model.name not in UNPINNED), "a revision is a commit"
    assert not model.trust_remote_code, "code shipped with weights runs only where the user says so"


EXPERIMENTS = {
    "aidf_ablation": ("qwen05b", "aidf_news", "aidf", "aidf_ablation"),
    "aidf_as_published": ("qwen05b", "aidf_news", "aidf", "aidf_ablation"),
    "aidf_lora_v1": ("qwen05b", "aidf_news", "aidf_v1", "aidf_ablation"),
    "openfindata_intent": ("qwen05b_instruct", "openfindata_intent", "llama_factory", "openfindata_intent"),
    "finllm_qlora": ("r1_distill_1_5b", "finllm", "finllm", "finllm_qlora"),
    "finllm_as_published": ("r1_distill_1_5b", "finllm_as_published", "finllm_as_published", "finllm_qlora"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_the_published_one(config: Configure, name: str) -> None:
    cfg = config(f"experiment={name}")
    assert cfg.published is not None
    assert (cfg.model.name, cfg.data.name, cfg.train.name, cfg.published.name) == EXPERIMENTS[name]
    assert cfg.data.name.removesuffix("_as_published") == cfg.published.data


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_on_the_embedded_default_and_its_methods_have_published_rows(
    config: Configure, name: str
) -> None:
    words = [f"experiment={name}", "train=smoke", "model=tiny", "data=sample"]
    expanded = command_line.expand(words)
    check(*[word for word in expanded if word != "-m"])
    cfg = config(*words)
    assert cfg.sweep is not None
    assert cfg.published is not None
    known = {method for row in cfg.published.rows.values() for method in row.methods}
    assert set(cfg.sweep["method"]) - known <= {"finllm_qlora_response"}  # our method besides the published ones


def test_published_steps_follow_from_the_schedules(config: Configure) -> None:
    """185 and 140 steps of AIDF, 4,314 of FinLLM, from their rows, batches and epochs."""
    aidf = config("train=aidf").train
    for rows, steps in ((7147, 185), (5430, 140)):
        assert aidf.epochs * (-(-rows // 24) // (aidf.batch_size // 24)) == steps
    finllm = config("train=finllm_as_published").train
    assert finllm.epochs * (-(-69051 // 4) // (finllm.batch_size // finllm.micro_batch_size)) == 4314 < finllm.warmup
    assert (finllm.learning_rate, finllm.weight_decay, finllm.schedule) == (1e-4, 0.01, "linear")


def test_published_faults_of_finllm_are_separate_choices(config: Configure) -> None:
    mended, faulty = config("experiment=finllm_qlora").data, config("experiment=finllm_as_published").data
    assert mended.parts is not None
    assert faulty.parts is not None
    assert mended.parts["twitter"].label_map == {"0": "negative", "1": "positive", "2": "neutral"}
    assert faulty.parts["twitter"].label_map == {"0": "negative", "1": "neutral", "2": "positive"}
    assert {faulty.on_duplicate, faulty.on_leak, faulty.parts["fingpt"].on_leak} == {"keep"}
    assert "keep" not in (mended.on_duplicate, mended.on_leak, mended.parts["fingpt"].on_leak)
