"""The last MLP at the positions that are read gives the losses, gradients and scores that it gives everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from base_models import small, write_experts
from compositions import config

from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import label_log_probs
from finsa.models import adapters, attention
from finsa.models.moe import experts
from finsa.models.moe.mixture import Mixture
from finsa.training.objective import labeled_loss

TREE = LabelTree.of([(7, 3), (7, 4), (9,)])
IDS = torch.randint(10, 50, (4, 30), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([20, 27, 12, 25])


def adapted_model(architecture: str) -> Any:
    cfg = config("model.weights=random", "method=lora_all")
    assert cfg.method.adapter is not None
    chosen = cfg.method.adapter.model_copy(
        update={"dropout": 0.0, "targets": ("q_proj", "v_proj", "down_proj") if architecture != "full" else ()}
    )
    model = small("qwen2" if architecture == "full" else architecture)
    if architecture == "full":
        return model.requires_grad_(True).train()
    return adapters.attach(model.requires_grad_(False), cfg.model, chosen, seed=0).train()


def labeled(rows: torch.Tensor = IDS) -> torch.Tensor:
    labels = torch.full_like(rows, -100)
    for row, length in enumerate(LENGTHS.tolist()):
        labels[row, length : length + 1 + row % 2] = rows[row, length : length + 1 + row % 2]
    return labels


def both(
    model: Any, loss: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, torch.Tensor]]:
    """Loss and gradients, narrowed and not, and the number of positions of the last MLP in each case."""
    found = []
    for most in (0.5, 0.0):
        monkeypatch.setattr(attention, "MAX_SHARE", most)
        seen: list[int] = []
        last = attention.last_mlp(model)
        assert last is not None
        hook = last.register_forward_hook(lambda module, given, made, seen=seen: seen.append(made.shape[1]))
        model.zero_grad()
        value = loss()
        value.backward()
        hook.remove()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": value.detach(), "seen": torch.tensor(max(seen)), **gradients})
    return found


def assert_same(found: list[dict[str, torch.Tensor]]) -> None:
    narrowed, plain = found
    assert narrowed.pop("seen") < plain.pop("seen")
    assert narrowed.keys() == plain.keys()
    assert len(narrowed) > 1
    for name, value in plain.items():
        scale = max(float(value.norm()), 1e-6)
        assert float((narrowed[name] - value).norm()) <= 1e-5 * scale, name


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "glm4", "full"])
def test_losses_on_tokens_are_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(architecture)
    assert_same(both(model, lambda: labeled_loss(model, IDS, labeled()), monkeypatch))


def test_a_choice_among_labels_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model("qwen2")
    assert_same(both(model, lambda: label_log_probs(model, IDS, LENGTHS, TREE).sum(), monkeypatch))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mix", ["input", "output"])
def test_a_mixture_is_the_same(mix: str, rows: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # output: the experts' rows stand below one another
    stage: Any = config("stage=moe_joint", f"stage.mix={mix}").stage
    model = Mixture(small("qwen2"), experts.read(write_experts(tmp_path, number=2)), stage, None, 0.0, seed=0)
    model.set_trainable(experts=True)
    ids, span = IDS[:rows], torch.tensor([[2, 10]] * rows)
    assert_same(both(model.eval(), lambda: labeled_loss(model, ids, labeled()[:rows], text_span=span), monkeypatch))


def test_nothing_is_narrowed_if_many_positions_are_read() -> None:
    model = adapted_model("qwen2")
    read = torch.arange(IDS.shape[1] - 1).expand(4, -1)
    last = attention.last_mlp(model)
    assert last is not None
    with attention.last_mlp_at(model, read, IDS.shape[1]):
        assert not last._forward_pre_hooks


def test_checkpointed_layers_are_not_narrowed() -> None:
    model = adapted_model("qwen2")
    model.get_base_model().activation_checkpointing_enable()
    assert attention.last_mlp(model) is None


def test_hooks_are_removed_after_an_error() -> None:
    model = adapted_model("qwen2")
    last = attention.last_mlp(model)
    assert last is not None
    with (
        pytest.raises(ZeroDivisionError),
        attention.last_mlp_at(model, torch.tensor([[3]] * 4), IDS.shape[1]),
    ):
        raise ZeroDivisionError
    assert not last._forward_pre_hooks
    assert not last._forward_hooks
