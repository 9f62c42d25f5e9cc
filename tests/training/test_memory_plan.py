"""The memory plan: its choice for a budget, and its estimate compared with real steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import base_models
import pytest
import torch
from steps import LORA

from finsa.config import ROOT, RunConfig, compose
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError
from finsa.models import adapters, hardware, memory, tokenizers
from finsa.training import memory_plan
from finsa.training.objective import labeled_loss

Compose = Callable[..., RunConfig]
SIX = "model.architecture.num_hidden_layers=6"


def planned(config: Compose, *words: str, world: int = 1) -> memory_plan.Plan:
    return memory_plan.make(*parts(config, *words), world)


def parts(config: Compose, *words: str) -> tuple[RunConfig, tokenized.TokenizedDataset, Any]:
    """Inputs of a plan: the Qwen2.5-0.5B shape with two layers by default, and the lengths of the sample's prompts."""
    layers = "model.architecture.num_hidden_layers="
    named = [] if any(word.startswith(layers) for word in words) else [f"{layers}2"]
    cfg = config("model=qwen05b", "model.weights=random", *named, *words)
    tokenizer, _, _ = tokenizers.load_or_embedded(cfg.model, local_only=True)
    job = tokenized.build(cfg, dataset.load(cfg.data), tokenizer)
    return cfg, job, job.prompts("train").lengths


def test_without_a_budget_the_configured_sizes_stay(config: Compose) -> None:
    made = planned(config, "train.micro_batch_size=4")
    assert (made.micro_batch_size, made.accumulation, made.gradient_checkpointing) == (4, 4, False)
    assert made.score_tokens == 16384


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_a_budget_takes_the_largest_micro_batch_that_fits(config: Compose, method: str) -> None:
    words = (SIX, f"method={method}", "train.batch_size=64", "train.micro_batch_size=1", "train.score_tokens=256")
    one = planned(config, *words)
    sizes = []
    for more in (0, 2**30, 2**36):
        budget = 1024 * -(-(one.peak() + more) // 1024)
        made = planned(config, *words, f"train.memory={budget // 1024}KiB")
        assert made.peak() <= budget
        assert made.micro_batch_size * made.accumulation == 64
        assert not made.gradient_checkpointing
        sizes.append(made.micro_batch_size)
    assert sizes[0] == 1 < sizes[1] < sizes[2] == 64


def test_checkpointing_is_used_only_if_nothing_fits_without_it(config: Compose) -> None:
    words = ("method=lora", "train.batch_size=16", "train.micro_batch_size=1", "train.score_tokens=256")
    one = planned(config, *words, "train.gradient_checkpointing=false")
    assert one.training is not None
    budget = one.training.total() - 2**20
    made = planned(config, *words, f"train.memory={-(-budget // 1024)}KiB")
    assert made.gradient_checkpointing
    assert made.peak() <= budget
    with pytest.raises(ConfigError, match=r"one row at a time needs about .* GiB.*gradient_checkpointing=auto"):
        planned(config, *words, f"train.memory={-(-budget // 1024)}KiB", "train.gradient_checkpointing=false")


def test_processes_share_the_batch(config: Compose) -> None:
    made = planned(config, "train.batch_size=64", "train.micro_batch_size=1", "train.memory=200GiB", world=4)
    assert (made.micro_batch_size, made.accumulation) == (16, 1)


def test_an_insufficient_budget_is_refused_before_loading_weights(config: Compose) -> None:
    with pytest.raises(ConfigError, match=r"train.memory: 1GiB .* does not suffice: .* needs about \d"):
        planned(config, "train.memory=1GiB", SIX)


@pytest.mark.parametrize("stage", ["moe_joint"])
def test_stages_that_do_not_plan_refuse_a_budget(stage: str) -> None:
    words = [f"stage={stage}", "train.memory=8GiB"]
    with pytest.raises(ConfigError, match="train.memory plans stage=train"):
        compose.build(*compose.compose_values(words), words)


def test_a_run_keeps_its_plan_and_trains_by_it(config: Compose, tmp_path: Path) -> None:
    from finsa.stages import train

    words = ("train=smoke", "train.max_steps=1", "train.micro_batch_size=1", "train.memory=8GiB", "tracking=none")
    done = train.run(config(*words, "stage.compare_base=false", f"output_dir={tmp_path}")).run_dir
    assert done is not None
    facts = json.loads((done / "run.json").read_text())
    assert facts["memory_plan"]["micro_batch_size"] == facts["batching"]["micro_batch_size"] == 16
    assert facts["memory_plan"]["budget"] == 8 * 2**30
    assert not facts["batching"]["micro_batch_halved"]


def test_a_plan_that_does_not_fit_is_reported_with_one_that_would(
    config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (SIX, "method=lora_response", "model.dtype=float32")
    given, (cfg, job, lengths) = planned(config, *words), parts(config, *words)
    assert memory_plan.verdict(given, cfg, job, lengths, 1) == ""
    monkeypatch.setattr(hardware, "total_memory", lambda: given.peak() - 1)
    tight = planned(config, *words)
    assert tight.peak() == given.peak()
    assert not tight.fits()
    told = memory_plan.verdict(tight, cfg, job, lengths, 1)
    here, settings = told.split("; these settings would: ")
    assert here == f"does not fit into the {tight.limit / 2**30:.2f} GiB here"
    found = dict(setting.rsplit(": ", 1) for setting in settings.split("; "))
    assert list(found)[:2] == ["model.dtype=bfloat16", "method.quantization=nf4"]
    for setting, size in found.items():
        smaller = planned(config, *words, *setting.split(" "))
        assert (size, smaller.fits()) == (f"{smaller.peak() / 2**30:.2f} GiB", True)
    monkeypatch.setattr(hardware, "total_memory", lambda: 2**20)
    none = memory_plan.verdict(planned(config, *words), cfg, job, lengths, 1)
    assert none.startswith("does not fit into the 0.00 GiB here, and no setting would make it fit (the least is ")
    assert none.endswith(" GiB); choose a smaller model")


def test_labels_of_several_tokens_are_planned_for_sliding_windows_too(config: Compose) -> None:
    """Each label is then scored separately; Gemma 3 with Chinese label words."""
    cfg = config("model=gemma3_270m", "model.weights=random", "model.path=null")
    words = {"利空": "消极悲观", "中性": "不偏不倚", "利好": "积极乐观"}
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"labels": words})})
    tokenizer, _, style = tokenizers.load_or_embedded(cfg.model, local_only=True)
    job = tokenized.build(cfg.model_copy(update={"model": style}), dataset.load(cfg.data), tokenizer)
    assert max(map(len, job.renderer.answers)) > 1
    made = memory_plan.make(cfg, job, job.prompts("train").lengths, 1)
    assert made.scoring.total() > 0


def test_the_estimated_time_follows_the_work_and_the_measured_rate(
    config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, job, lengths = parts(config, SIX, "method=lora_response")
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype: 1e12)
    least, most = memory_plan.seconds(cfg, job, lengths, 100, False, 1)
    assert most == pytest.approx(2 * least)
    assert memory_plan.seconds(cfg, job, lengths, 100, False, 2)[0] == pytest.approx(least / 2)
    assert memory_plan.seconds(cfg, job, lengths, 100, True, 1)[0] > least
    scoring = memory_plan.seconds(cfg, job, lengths, 0, False, 1)[0]
    assert 0 < scoring < least
    with_more = memory_plan.seconds(cfg, job, lengths, 200, False, 1)[0] - least
    weights = 6 * 14_912_384 + 2 * 5_000_000  # of six layers, about; forward and backward take 4 operations for each
    assert with_more == pytest.approx(100 * 16 * (lengths.mean() + 2) * 4 * weights / 1e12 / 0.6, rel=0.2)
    long = (
        "data.prompt='" + "公司业绩" * 20 + "{text}情感'"
    )  # the head of all prompts is forwarded once per micro-batch
    (cfg, job, lengths), apart = parts(config, SIX, "method=lora_response", long), "train.shared_prefix=false"
    shared = (
        memory_plan.seconds(cfg, job, lengths, 100, False, 1)[0]
        - memory_plan.seconds(cfg, job, lengths, 0, False, 1)[0]
    )
    cfg, job, lengths = parts(config, SIX, "method=lora_response", long, apart)
    whole = (
        memory_plan.seconds(cfg, job, lengths, 100, False, 1)[0]
        - memory_plan.seconds(cfg, job, lengths, 0, False, 1)[0]
    )
    assert 0.5 < len(job.renderer.prefix) / lengths.mean() < 0.65  # the LM head's share of the work stays
    assert 0.55 < shared / whole < 0.75
    assert memory_plan.show_seconds(cfg, 600.0, 7200.0) == (
        "10 min to 2.0 h, scoring included, at 30% to 60% of the matmul rate of this machine (1,000 GFLOP/s)"
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "glm4", "gemma3_text"])
def test_the_estimated_activations_are_those_that_autograd_keeps(
    config: Compose, architecture: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a real model with an adapter: all tensors saved in the forward pass, each storage once."""
    monkeypatch.setitem(base_models.EXTRA, "gemma3_text", {"head_dim": 32, "pad_token_id": 0})
    cfg, ids = config("method=lora", "model.dtype=float32", "model.weights=random"), torch.randint(2, 50, (3, 17))
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(fused)
    try:
        model = adapters.attach(base_models.small(architecture), cfg.model, LORA, seed=0).train()
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers(), ids]}
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in own:
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            labeled_loss(model, ids, ids, read=ids[:, 1:] % 16)
        real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        with torch.device("meta"):
            plain = base_models.small(architecture)
        shapes = adapters.attach(plain, cfg.model, LORA, seed=0)
        blank = torch.empty_like(ids, device="meta")
        need = memory.estimate_training(
            cfg, shapes, lambda: labeled_loss(shapes, blank, blank, read=blank[:, 1:]), False
        )
    finally:
        torch.backends.cuda.enable_flash_sdp(before)
    assert need.activations == pytest.approx(real, rel=0.03)


RECORDED = json.loads((ROOT / "benchmarks" / "results" / "memory_plan.json").read_text(encoding="utf-8"))["runs"]


def test_the_estimate_holds_on_real_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peaks were measured with real full-size steps (benchmarks/memory_plan.py); the estimate is computed here."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory_plan

    assert {one["model"] for one in RECORDED} >= {"smollm2_135m", "gemma3_270m", "qwen05b"}
    before, far = torch.backends.cuda.flash_sdp_enabled(), {}
    try:
        for one in RECORDED:
            torch.backends.cuda.enable_flash_sdp(one["fused_attention"])
            cfg = memory_plan.composed(one["model"], one["arm"], one["rows"], one["dtype"])
            estimated = memory_plan.estimated(cfg, one["rows"], one["tokens"]).total()
            if not 0.9 < estimated / one["measured"] < 1.12:
                far[memory_plan.title(one)] = estimated / one["measured"]
    finally:
        torch.backends.cuda.enable_flash_sdp(before)
    assert far == {}


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_the_estimate_is_near_what_real_steps_take(arm: str) -> None:
    if sys.platform != "linux":
        pytest.skip("the peak is read from /proc")
    words = [sys.executable, "benchmarks/memory_plan.py", "--quick", "--one", arm, "--rows", "32"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["measured"] > 1.1 * found["imports"]  # most of it is not just libraries
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.2)
