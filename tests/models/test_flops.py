"""The formula against torch's FLOP counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from base_models import small, write_experts
from compositions import config
from torch.utils.flop_counter import FlopCounterMode

from finsa.config import Adapter
from finsa.data.rows import IGNORE
from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import label_log_probs
from finsa.models import adapters, flops
from finsa.models.classifier import Classifier
from finsa.models.moe import experts
from finsa.models.moe.mixture import Mixture
from finsa.training.batches import Collator
from finsa.training.objective import labeled_loss
from finsa.training.progress import Meter

TARGETS: dict[str, tuple[str, ...]] = {
    "lora": ("q_proj", "v_proj"),
    "lora_mlp": ("down_proj",),
    "lora_all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
TREE = LabelTree.of([(7, 3), (7, 4), (9,)])


def adapted_model(kind: str, architecture: str = "qwen2", checkpointing: bool = False) -> Any:
    """A model of two layers with eager attention, whose operations the counter also sees on a CPU."""
    model = small(architecture, "eager", vocabulary=500)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if kind == "full":
        return model.requires_grad_(True).train()
    section = config("model.weights=random").model
    chosen = Adapter(variant="lora", rank=4, alpha=8, dropout=0.0, targets=TARGETS[kind], lr_ratio=1.0, init=None)
    return adapters.attach(model.requires_grad_(False), section, chosen, seed=0).train()


def batch(answer: int) -> dict[str, torch.Tensor]:
    """Four rows of different lengths, padded; the last `answer` tokens have loss."""
    made = []
    for length in (20, 23, 30, 41):
        ids = torch.randint(10, 400, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        labels = [IGNORE] * max(length - answer, 0) + ids[max(length - answer, 0) :]
        made.append({"input_ids": ids, "labels": labels, "target": 0})
    return Collator(0, TREE.tokens if answer == 0 else ())(made)


def counted(model: Any, loss: Any, inputs: dict[str, torch.Tensor], checkpointing: bool, suffix: int) -> float:
    """The FLOPs of the formula over those of the counter."""
    meter = Meter(model, suffix, checkpointing)
    meter.count([{"input_ids": [], "labels": []}] * len(inputs["input_ids"]), [inputs])
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    done = meter.done
    mine = meter.costs.total(done.positions, done.pairs, float(done.projected), done.rows)
    return mine / counter.get_total_flops()


@pytest.mark.parametrize("answer", [2, 100])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "lora_mlp", "lora_all", "full"])
def test_step_flops_equal_those_of_the_counter(kind: str, checkpointing: bool, answer: int) -> None:
    model, inputs = adapted_model(kind, checkpointing=checkpointing), batch(answer)
    del inputs["targets"]
    found = counted(model, lambda: labeled_loss(model, inputs["input_ids"], inputs["labels"]), inputs, checkpointing, 0)
    assert found == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("architecture", ["llama", "glm4", "glm"])
def test_other_architectures(architecture: str) -> None:
    model, inputs = adapted_model("full", architecture), batch(2)
    del inputs["targets"]
    found = counted(model, lambda: labeled_loss(model, inputs["input_ids"], inputs["labels"]), inputs, False, 0)
    assert found == pytest.approx(1, abs=0.02)


def test_a_choice_among_labels() -> None:
    model, inputs = adapted_model("lora"), batch(0)

    def loss() -> torch.Tensor:
        return label_log_probs(model, inputs["input_ids"], inputs["lengths"], TREE).sum()

    assert counted(model, loss, inputs, False, len(TREE.tokens)) == pytest.approx(1, abs=0.02)


def test_a_classification_head_does_not_compute_vocabulary_logits() -> None:
    model, inputs = Classifier(adapted_model("lora"), 3, 0.0, seed=0), batch(2)
    span = torch.tensor([[2, 15]] * 4)
    assert counted(model, lambda: model(inputs["input_ids"], span).sum(), inputs, False, 0) == pytest.approx(
        1, abs=0.02
    )


def test_a_mixture(tmp_path: Any) -> None:
    stage: Any = config("stage=moe_joint").stage
    base = small("qwen2", "eager")
    model = Mixture(base, experts.read(write_experts(tmp_path, number=2)), stage, None, 0.0, seed=0)
    model.set_trainable(experts=True)
    inputs = batch(2)
    del inputs["targets"]
    ids, labels = (inputs[name] % 50 if name == "input_ids" else inputs[name] for name in ("input_ids", "labels"))
    labels = torch.where(labels == IGNORE, IGNORE, labels % 50)
    span = torch.tensor([[2, 15]] * 4)
    found = counted(model.train(), lambda: labeled_loss(model, ids, labels, text_span=span), inputs, False, 0)
    assert found == pytest.approx(1, abs=0.02)


def test_a_frozen_base_costs_two_thirds_of_full_fine_tuning() -> None:
    lora, full = flops.estimate(adapted_model("lora")), flops.estimate(adapted_model("full"))
    assert 0.6 < lora.position / full.position < 0.72
    assert lora.projected / full.projected == pytest.approx(2 / 3)
