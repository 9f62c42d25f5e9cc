"""The layers of a mixture against the sums they compute, on small models, and its files against PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import EXPERTS, EXTRA, small, write_experts
from peft import PeftModel
from safetensors.torch import load_file

from finsa.config import MoeJointStage, RunConfig
from finsa.errors import ModelError
from finsa.models import base
from finsa.models.moe import experts, stacking
from finsa.models.moe.mixture import Mixture, Router, balance_loss, expert_names, gates_of

Configure = Callable[..., RunConfig]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 0], [11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23, 24, 0, 0]])
SPANS = torch.tensor([[1, 5], [2, 6], [1, 4]])


@pytest.fixture(scope="module")
def stage(config: Configure) -> MoeJointStage:
    found = config("stage=moe_joint").stage
    assert isinstance(found, MoeJointStage)
    return found


def mixture(folders: dict[str, Path], stage: MoeJointStage, model: Any = None, classes: int | None = None) -> Mixture:
    return Mixture(model if model is not None else small(), experts.read(folders), stage, classes, 0.0, seed=0).eval()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **inputs).logits


def naive(folders: dict[str, Path], gates: torch.Tensor) -> torch.Tensor:
    """Sum over experts in every layer, one row at a time: W' = W + sum_e g_e scale B_e A_e."""
    rows = []
    for row, shares in enumerate(gates):
        model = small()
        for share, folder in zip(shares, folders.values(), strict=True):
            for path, (a, b) in experts.read({"x": folder, "y": folder})[0].weights().items():
                model.get_submodule(path).weight.data += share * 2.0 * (b @ a)
        rows.append(logits(model)[row])
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", EXTRA)
@pytest.mark.parametrize("mix", ["input", "output"])
def test_a_one_hot_gate_is_the_single_expert(stage: MoeJointStage, tmp_path: Path, model_type: str, mix: str) -> None:
    targets = ["q_proj", "v_proj", "gate_up_proj" if "glm" in model_type else "up_proj"]
    folders = write_experts(tmp_path, small(model_type), target_modules=targets)
    model = mixture(folders, stage.model_copy(update={"mix": mix}), small(model_type))
    for number, folder in enumerate(folders.values()):
        alone = PeftModel.from_pretrained(small(model_type), str(folder)).eval()
        with model.using_expert(number):
            torch.testing.assert_close(logits(model, text_span=SPANS), logits(alone), rtol=1e-5, atol=1e-5)


def test_a_soft_gate_is_the_sum_over_experts(stage: MoeJointStage, tmp_path: Path) -> None:
    folders = write_experts(tmp_path)
    model = mixture(folders, stage)
    found = logits(model, text_span=SPANS)
    gates = model.gates()
    assert (gates > 0.01).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(3))
    torch.testing.assert_close(found, naive(folders, gates), rtol=1e-5, atol=1e-5)


def test_output_mixing_sums_the_experts_last_states(stage: MoeJointStage, tmp_path: Path) -> None:
    folders = write_experts(tmp_path)
    model = mixture(folders, stage.model_copy(update={"mix": "output"}))
    found = logits(model, text_span=SPANS)
    states = []
    for folder in folders.values():
        body = PeftModel.from_pretrained(small(), str(folder)).eval().get_base_model().model
        with torch.no_grad():
            states.append(body(input_ids=IDS, use_cache=False).last_hidden_state)
    mixed = torch.einsum("be,ebsd->bsd", model.gates(), torch.stack(states))
    torch.testing.assert_close(found, small().lm_head(mixed).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", ["input", "output"])
@pytest.mark.parametrize("read", ["embeddings", "layer"])
def test_checkpointing_changes_no_gradient(stage: MoeJointStage, tmp_path: Path, mix: str, read: str) -> None:
    router = stage.router.model_copy(update={"read": read, "dropout": 0.0})
    folders, options = write_experts(tmp_path), stage.model_copy(update={"mix": mix, "router": router})
    found = []
    for checkpointing in (False, True):
        model = mixture(folders, options, classes=3)
        model.set_trainable(experts=True)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(IDS, SPANS).logsumexp(1).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert all(g is not None for g in found[-1].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_every_expert_the_router_and_the_head_get_gradients(stage: MoeJointStage, tmp_path: Path) -> None:
    model = mixture(write_experts(tmp_path), stage, classes=3)
    model.set_trainable(experts=True)
    model.train()
    model(IDS, SPANS).logsumexp(1).sum().backward()
    for path, layer in model.layers().items():
        for number in range(3):
            part = slice(4 * number, 4 * (number + 1))
            assert layer.lora_A.grad is not None, path
            assert layer.lora_B.grad is not None, path
            assert layer.lora_A.grad[part].abs().max() > 0, (path, number)
            assert layer.lora_B.grad[:, part].abs().max() > 0, (path, number)
    rest = {name: p for name, p in model.named_parameters() if name.startswith(("router", "head"))}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in rest.values()), rest.keys()
    assert all(p.grad is None for name, p in model.named_parameters() if "base_layer" in name or "embed" in name)


def test_the_warm_up_does_not_change_the_experts(stage: MoeJointStage, tmp_path: Path) -> None:
    model = mixture(write_experts(tmp_path), stage, classes=3)
    model.set_trainable(experts=False)
    assert {name.split(".")[0] for name in model.trainable_state()} == {"router", "head"}


@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "int8"])
def test_other_types_of_the_base(config: Configure, stage: MoeJointStage, tmp_path: Path, kind: str) -> None:
    """One-hot equals PEFT's adapter on the same base, and training reaches every expert."""
    section = config("model.dtype=bfloat16" if kind == "bfloat16" else "model.dtype=float32").model
    backbone = base.load_base(section, 0, quantization="none" if kind == "bfloat16" else kind)
    plain = base.load_base(config("model.dtype=float32").model, 0)
    folders = write_experts(tmp_path, plain, number=2)
    ids = torch.arange(40, 64).reshape(2, 12)
    spans = torch.tensor([[2, 9], [3, 12]])
    reference = PeftModel.from_pretrained(backbone, str(folders["news"])).eval()
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits.float()
    backbone = reference.unload()
    model = mixture(folders, stage, backbone)
    with model.using_expert(0), torch.no_grad():
        found = model(ids, spans, use_cache=False).logits.float()
    assert (found - expected).abs().max() <= (1e-4 if kind == "nf4" else 0.02) * expected.abs().max()
    model.set_trainable(experts=True)
    model.train()
    model(ids, spans, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    for layer in model.layers().values():
        assert layer.lora_A.dtype == torch.float32
        assert layer.lora_B.grad is not None
        assert all(part.abs().max() > 0 for part in layer.lora_B.grad.split(4, dim=1))


@pytest.mark.parametrize("read", ["embeddings", "layer"])
def test_the_router_reads_the_text_and_nothing_else(stage: MoeJointStage, tmp_path: Path, read: str) -> None:
    options = stage.model_copy(update={"router": stage.router.model_copy(update={"read": read})})
    model = mixture(write_experts(tmp_path), options)

    def router(ids: list[int], start: int, end: int) -> torch.Tensor:
        with torch.no_grad():
            model(torch.tensor([ids]), torch.tensor([[start, end]]), use_cache=False)
        assert model.route.logits is not None
        return model.route.logits[0]

    first = router([1, 2, 30, 31, 32, 9, 9], 2, 5)
    assert (router([1, 2, 33, 34, 35, 9, 9], 2, 5) - first).abs().max() > 1e-3
    torch.testing.assert_close(router([1, 2, 30, 31, 32, 8, 7, 0, 0, 0], 2, 5), first)  # tail and padding
    if read == "embeddings":
        torch.testing.assert_close(router([4, 6, 3, 30, 31, 32, 9], 3, 6), first)  # another prompt, another place


def test_routing(stage: MoeJointStage) -> None:
    given = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 3.0]])
    torch.testing.assert_close(gates_of(given, "soft", 1), given.softmax(1))
    assert gates_of(given, "hard", 2).tolist() == [[1, 0, 0], [0, 0, 1]]
    two = gates_of(given, "top_k", 2)
    assert (two > 0).sum(1).tolist() == [2, 2]
    torch.testing.assert_close(two[0, :2], given[0, :2].softmax(0))


@pytest.mark.parametrize("learned", [0.05, 0.0, -3.0])
def test_the_temperature_of_a_router_is_never_below_the_published_floor(learned: float) -> None:
    router, text = Router(8, 4, 3, 0.0).eval(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    warm = router(text)
    with torch.no_grad():
        router.temperature.fill_(learned)
    cold = router(text)
    torch.testing.assert_close(cold, warm / 0.1)
    with torch.no_grad():
        router.temperature.fill_(0.2)
    torch.testing.assert_close(router(text), warm / 0.2)


def test_balance_is_zero_for_uniform_gates_and_largest_for_one_expert() -> None:
    assert balance_loss(torch.full((5, 4), 0.25)) == pytest.approx(0, abs=1e-6)
    assert balance_loss(torch.eye(4)) == pytest.approx(0, abs=1e-6)  # sure of each row, and fair over rows
    assert balance_loss(torch.eye(4)[[2, 2]]) == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-5)


def test_a_mixture_is_saved_as_peft_folders_and_restored(stage: MoeJointStage, tmp_path: Path) -> None:
    folders = write_experts(tmp_path / "in")
    model = mixture(folders, stage, classes=2)
    with torch.no_grad():
        model.router.temperature.fill_(0.7)
        for layer in model.layers().values():
            layer.lora_A.add_(0.01)
    model.save(tmp_path / "out", ("low", "high"))
    assert expert_names(tmp_path / "out") == list(EXPERTS)
    again = mixture({name: tmp_path / "out" / "adapters" / name for name in EXPERTS}, stage, classes=2)
    again.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(IDS, SPANS), model(IDS, SPANS))
    peft = PeftModel.from_pretrained(small(), str(tmp_path / "out" / "adapters" / "forum"))
    for path, (a, _) in model.expert_weights(1).items():
        assert torch.equal(peft.get_submodule(f"base_model.model.{path}").lora_A["default"].weight, a)
    manifest = json.loads((tmp_path / "out" / "mixture" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["rank"], manifest["scale"], manifest["head"]) == (4, 2.0, "classifier")


def test_detaching_the_experts_leaves_the_base(stage: MoeJointStage, tmp_path: Path) -> None:
    backbone = small()
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    expected = logits(backbone)
    model = mixture(write_experts(tmp_path), stage, backbone)
    model.activation_checkpointing_enable()
    stacking.detach(model.backbone, model.paths)
    assert torch.equal(logits(backbone), expected)
    assert before.keys() == dict(backbone.named_parameters()).keys()
    assert not backbone.is_activation_checkpointing


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 8}, r"experts news and forum differ in rank: 4 .* against 8 .* same method\.adapter"),
        ({"lora_alpha": 4}, "differ in alpha: 8 .* against 4"),
        ({"target_modules": ["q_proj"]}, "differ in targets"),
        ({"use_dora": True}, "expert forum: .* DoRA"),
    ],
)
def test_experts_that_cannot_be_combined_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    folders = write_experts(tmp_path / "a", number=2) | {
        "forum": write_experts(tmp_path / "b", number=2, **changed)["forum"]
    }
    with pytest.raises(ModelError, match=message):
        experts.read(folders)


def test_experts_of_another_base(stage: MoeJointStage, tmp_path: Path) -> None:
    folders = write_experts(tmp_path, number=2)
    wide = small(vocabulary=50)
    wide.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 32)
    with pytest.raises(ModelError, match=r"adapts 'model\.layers\.0\.self_attn\.q_proj' of shape .* this base has as"):
        mixture(folders, stage, wide)
    glm = small("glm4")
    with pytest.raises(ModelError, match="which this base"):
        mixture(write_experts(tmp_path / "up", number=2, target_modules=["up_proj"]), stage, glm)


def test_missing_and_damaged_files(stage: MoeJointStage, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expert news: there is no adapter in"):
        experts.read({"news": tmp_path, "forum": tmp_path})
    model = mixture(write_experts(tmp_path, number=2), stage, classes=2)
    with pytest.raises(ModelError, match=r"router\.safetensors cannot be loaded"):
        model.load(tmp_path)
    model.save(tmp_path / "out", ("a", "b"))
    other = mixture(write_experts(tmp_path, number=2), stage, classes=3)
    with pytest.raises(ModelError, match=r"classifier\.safetensors cannot be loaded"):
        other.load(tmp_path / "out")
    with pytest.raises(ModelError, match="contains no readable mixture"):
        expert_names(tmp_path)
    assert len(load_file(tmp_path / "out" / "mixture" / "router.safetensors")) == 7
