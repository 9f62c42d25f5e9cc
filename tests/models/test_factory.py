"""Every method trains a few steps on the embedded base, is restored from its files, and leaves the base unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_models import small
from numpy.typing import NDArray
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from finsa.config import RunConfig
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError, ModelError
from finsa.inference.scoring import scorer
from finsa.models import adapters, base, factory
from finsa.runs import adapter_folders
from finsa.training import fit, objective

Configure = Callable[..., RunConfig]
QUERY = "model.layers.0.self_attn.q_proj.weight"
SHORT = (
    "model.dtype=float32",
    "train=smoke",
    "train.max_steps=4",
    "train.batch_size=8",
    "train.learning_rate=5e-3",
    "train.warmup=0",
    "method.rows_per_class=16",
)
ONE_STEP = {"max_steps": 1, "validate_every": 1}
METHODS = (
    ("lora_response",),
    ("dora",),
    ("rslora",),
    ("pissa",),
    ("lora_plus",),
    ("qlora",),
    ("lora_8bit",),
    ("dora", "method.quantization=nf4"),
    ("lora_label",),
    ("lora_class_weight",),
    ("lora_adaptive_balanced",),
    ("full", "train.learning_rate=1e-3"),
    ("classifier",),
    ("classifier_label_words", "method.quantization=nf4"),
    ("classifier", "method.learn=head", "method.adapter=null"),
    ("classifier", "method.learn=head", "method.adapter=null", "method.quantization=int8"),
    ("classifier", "method.learn=all", "method.adapter=null", "train.learning_rate=1e-3"),
)


@pytest.fixture(scope="module")
def job(config: Configure, tokenizer: Any) -> tokenized.TokenizedDataset:
    return tokenized.build(config(), dataset.load(config("data.cache=null").data), tokenizer)


def load(cfg: RunConfig) -> Any:
    return base.load_base(cfg.model, cfg.seed, cfg.method.quantization)


def scores(model: Any, job: tokenized.TokenizedDataset) -> NDArray[np.float64]:
    """Label scores of a few prompts."""
    return scorer(model, job.renderer, 4096).score(job.prompts("test")[:12])


def trained(
    cfg: RunConfig,
    job: tokenized.TokenizedDataset,
    backbone: Any,
    folder: Path,
    f1: tuple[float, ...] = (0.9, 0.1),
    **changed: Any,
) -> Any:
    """Fit for a few steps and save; with `f1` the selected checkpoint is the first of two, so it is loaded again."""
    model = factory.build(cfg, backbone, job.renderer)
    scores = iter(f1)
    fit.fit(
        model=model,
        tokenizer=job.renderer.tokenizer,
        rows=job.training_rows(cfg),
        validate=lambda _: {"loss": 1.0, "macro_f1": next(scores)},
        train=cfg.train.model_copy(update={"validate_every": 2, "max_steps": 4, **changed}),
        seed=cfg.seed,
        folder=folder / "checkpoints",
        record=lambda step, values: None,
        objective=objective.build(cfg.method, job.renderer, job.class_counts(cfg)),
        lr_ratio=cfg.method.adapter.lr_ratio if cfg.method.adapter else 1.0,
    )
    factory.save(cfg, model, folder, job.dataset.labels.names)
    return model


@dataclass(frozen=True)
class Fitted:
    """A method trained for a few steps and restored, with label scores of the same prompts, (n, labels)."""

    cfg: RunConfig
    folder: Path
    base: NDArray[np.float64]
    trained: NDArray[np.float64]
    base_afterwards: NDArray[np.float64] | None
    restored: NDArray[np.float64]


@pytest.fixture(scope="module")
def fitted(
    config: Configure, job: tokenized.TokenizedDataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Fitted]:
    """Train and restore a method, once per module."""

    @cache
    def of(method: str, *further: str) -> Fitted:
        cfg, folder = config(f"method={method}", *SHORT, *further), tmp_path_factory.mktemp("fitted")
        backbone = load(cfg)
        before = scores(backbone, job)
        model = trained(cfg, job, backbone, folder)
        after = scores(model, job)
        factory.detach(model)
        if cfg.method.learn == "all":
            left = None
            backbone = base.load_base(cfg.model.model_copy(update={"path": str(folder / "model")}), cfg.seed)
        else:
            left = scores(backbone, job)
        restored = factory.restore(cfg, backbone, factory.adapter_folder(cfg, folder), job.renderer)
        again = scores(restored, job)
        factory.detach(restored)
        return Fitted(cfg, folder, before, after, left, again)

    return of


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_trained_weights_are_restored_and_the_base_stays(
    fitted: Callable[..., Fitted], method: tuple[str, ...]
) -> None:
    one = fitted(*method)
    assert np.abs(one.trained - one.base).max() > 1e-3
    assert (one.base_afterwards is None) == (one.cfg.method.learn == "all")
    assert one.base_afterwards is None or np.array_equal(one.base_afterwards, one.base)
    np.testing.assert_allclose(one.restored, one.trained, atol=2e-4)


def test_jobs_that_share_a_base_do_not_share_its_checkpointing(
    config: Configure, job: tokenized.TokenizedDataset, tmp_path: Path
) -> None:
    """A sweep over train.gradient_checkpointing: the first job's must not be on in the second."""
    cfg = config("method=lora_response", *SHORT)
    backbone = load(cfg)
    hooks = len(backbone.get_input_embeddings()._forward_hooks)
    model = trained(cfg, job, backbone, tmp_path, gradient_checkpointing=True, **ONE_STEP)
    assert backbone.is_activation_checkpointing
    factory.detach(model)
    assert not backbone.is_activation_checkpointing
    assert len(backbone.get_input_embeddings()._forward_hooks) == hooks


def test_adapters_on_a_quantized_base_stay_in_float32(fitted: Callable[..., Fitted]) -> None:
    one = fitted("qlora")
    saved = load_file(factory.adapter_folder(one.cfg, one.folder) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())


def test_pissa_is_saved_as_plain_lora_of_twice_the_rank(
    config: Configure, job: tokenized.TokenizedDataset, tmp_path: Path
) -> None:
    cfg = config("method=pissa", *SHORT)
    backbone = load(cfg)
    weights = {name: p.clone() for name, p in backbone.named_parameters()}
    model = trained(cfg, job, backbone, tmp_path, **ONE_STEP)
    assert not torch.equal(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight, weights[QUERY])
    factory.detach(model)
    assert all(torch.equal(p, weights[name]) for name, p in backbone.named_parameters())
    saved = json.loads((factory.adapter_folder(cfg, tmp_path) / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (16, 16, True)


def test_a_fresh_pissa_adapter_changes_no_outputs(config: Configure, job: tokenized.TokenizedDataset) -> None:
    cfg = config("method=pissa", "model.dtype=float32")  # PiSSA rounds what it takes out of bfloat16 weights
    backbone, texts = load(cfg), job.prompts("test")[:8]
    before = scorer(backbone, job.renderer, 4096).score(texts)
    model = factory.build(cfg, backbone, job.renderer)
    np.testing.assert_allclose(scorer(model, job.renderer, 4096).score(texts), before, atol=1e-4)
    factory.detach(model)


def test_a_resumed_fit_of_a_classifier_ends_with_the_same_weights(
    config: Configure, job: tokenized.TokenizedDataset, tmp_path: Path
) -> None:
    cfg = config("method=classifier", *SHORT)

    def head(folder: str, **changed: Any) -> dict[str, torch.Tensor]:
        model = trained(cfg, job, load(cfg), tmp_path / folder, schedule="constant", **changed)
        state = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
        factory.detach(model)
        return state

    whole = head("whole", f1=(0.1, 0.9))
    cut = head("cut", f1=(0.1,), max_steps=2)
    resumed = head("cut", f1=(0.9,))
    assert not torch.equal(cut["head.weight"], whole["head.weight"])
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    kept = next((tmp_path / "cut" / "checkpoints").glob("*/model.safetensors"))
    assert set(load_file(kept)) == set(whole)  # not the base


def test_lora_plus_moves_b_faster(config: Configure, job: tokenized.TokenizedDataset, tmp_path: Path) -> None:
    """AdamW's first step is the learning rate times the sign of the gradient: B moves 16 times as far as A."""
    cfg = config("method=lora_plus", *SHORT)
    model = factory.build(cfg, load(cfg), job.renderer)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    factory.detach(model)
    model = trained(cfg, job, load(cfg), tmp_path, **ONE_STEP)
    moved = {
        name: float((p.detach() - start[name]).abs().max()) for name, p in model.named_parameters() if p.requires_grad
    }
    factory.detach(model)
    slow = [far for name, far in moved.items() if "lora_A" in name]
    fast = [far for name, far in moved.items() if "lora_B" in name]
    rate = cfg.train.learning_rate
    assert fast == pytest.approx([16 * rate] * len(fast), rel=0.02)
    assert max(slow) <= rate * 1.01


# ------------------------------------------------------------------------------------------------ from a saved adapter

STARTS = (
    ("lora_response",),
    ("dora",),
    ("rslora",),
    ("classifier",),
    ("lora_response", "method.adapter.rank=16", "method.adapter.alpha=16", "method.adapter.dropout=0"),  # of pissa
)


@pytest.mark.parametrize("method", STARTS, ids=("lora", "dora", "rslora", "classifier", "pissa"))
def test_training_starts_from_a_saved_adapter(
    config: Configure,
    job: tokenized.TokenizedDataset,
    tmp_path: Path,
    method: tuple[str, ...],
    fitted: Callable[..., Fitted],
    request: pytest.FixtureRequest,
) -> None:
    """At step 0 weights equal those saved, and label scores those of the saved adapter; then they move."""
    first = fitted("pissa" if request.node.callspec.id == "pissa" else method[0])
    folder, backbone = factory.adapter_folder(first.cfg, first.folder), load(first.cfg)
    cfg = config(f"method={method[0]}", *SHORT, *method[1:], f"method.adapter.init={folder}", "seed=7")
    assert cfg.method.adapter is not None
    assert list(adapter_folders.problems(cfg.model, cfg.method.adapter)) == []
    model = factory.build(cfg, backbone, job.renderer)
    peft_model = getattr(model, "backbone", model)
    saved, state = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(peft_model)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    learned = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert learned == {name for name, _ in peft_model.named_parameters() if "lora_" in name}
    np.testing.assert_array_equal(scores(model, job), first.restored)
    assert base.count_parameters(factory.on_meta(cfg, job.renderer)) == base.count_parameters(model)
    factory.detach(model)

    factory.detach(trained(cfg, job, backbone, tmp_path / "second", **ONE_STEP))
    moved = load_file(factory.adapter_folder(cfg, tmp_path / "second") / "adapter_model.safetensors")
    assert saved.keys() == moved.keys()
    assert not torch.equal(
        torch.cat([moved[name].flatten() for name in saved]), torch.cat([*map(torch.flatten, saved.values())])
    )


def test_a_resumed_fit_from_a_saved_adapter_ends_with_the_same_weights(
    config: Configure, job: tokenized.TokenizedDataset, fitted: Callable[..., Fitted], tmp_path: Path
) -> None:
    first = fitted("lora_response")
    folder = factory.adapter_folder(first.cfg, first.folder)
    cfg = config("method=lora_response", *SHORT, f"method.adapter.init={folder}")

    def weights(folder: str, **changed: Any) -> dict[str, torch.Tensor]:
        factory.detach(trained(cfg, job, load(cfg), tmp_path / folder, schedule="constant", **changed))
        return load_file(factory.adapter_folder(cfg, tmp_path / folder) / "adapter_model.safetensors")

    whole = weights("whole", f1=(0.1, 0.9))
    cut = weights("cut", f1=(0.1,), max_steps=2)
    resumed = weights("cut", f1=(0.9,))
    assert not all(torch.equal(whole[name], cut[name]) for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_adapter_of_another_base_is_refused(
    config: Configure, job: tokenized.TokenizedDataset, tmp_path: Path
) -> None:
    cfg = config("method=lora_response", *SHORT)
    factory.detach(factory.build(cfg, load(cfg), job.renderer))
    folder = tmp_path / "other"
    attached = adapters.attach(small(), cfg.model, cfg.method.adapter, seed=1)  # type: ignore[arg-type]
    adapters.save(attached, folder)
    wanted = config("method=lora_response", f"method.adapter.init={folder}")
    with pytest.raises(
        ModelError,
        match=rf"method\.adapter\.init: {folder} does not fit this base: .*size mismatch.*current model is torch",
    ):
        factory.build(wanted, base.load_base(cfg.model, cfg.seed), job.renderer)
    with pytest.raises(ModelError, match=r"does not fit this base: .*size mismatch"):  # stage=check plans on shapes
        adapters.attach(base.on_meta(cfg.model), wanted.model, wanted.method.adapter, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"variant=pissa is initialized from the base model"):
        config("method=pissa", f"method.adapter.init={folder}")
