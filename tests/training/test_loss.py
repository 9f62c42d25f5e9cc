"""The losses: labeled positions against the library's loss over all positions, and the loss over classes per row."""

from __future__ import annotations

import math
from typing import Any

import compositions
import pytest
import torch
from base_models import EXTRA, small
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from finsa.config import Loss
from finsa.data.rows import IGNORE
from finsa.training.batches import Collator
from finsa.training.objective import choice_loss, labeled_loss


def batch(labeled: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (5, 17, 30, 9):
        ids = torch.randint(2, 50, (length,), generator=generator).tolist()
        context = ids[1:-2] if labeled == "all" else [IGNORE] * (length - 3)
        rows.append({"input_ids": ids, "labels": [IGNORE, *context, *ids[-2:]]})
    made = Collator(0)(rows)
    return {name: made[name] for name in ("input_ids", "labels")}


def plain_loss(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All logits, with an attention mask over the padding, as a stock trainer does it."""
    lengths = (inputs["labels"] != IGNORE).int().cumsum(1).argmax(1) + 1
    mask = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=inputs["input_ids"], attention_mask=mask).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("labeled", ["all", "response"])
@pytest.mark.parametrize("model_type", EXTRA)
def test_loss_and_gradients_equal_the_plain_ones(model_type: str, labeled: str) -> None:
    model = small(model_type).requires_grad_(True)
    inputs = batch(labeled)
    fast, plain = labeled_loss(model, **inputs), plain_loss(model, inputs)
    assert fast.item() == pytest.approx(plain.item(), rel=2e-6)
    ours, theirs = gradients(model, fast), gradients(model, plain)
    assert ours.keys() == theirs.keys()
    norm = torch.stack([g.norm() for g in theirs.values()]).norm()
    difference = torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm()
    assert float(difference / norm) < 1e-5


def test_loss_goes_through_an_adapter() -> None:
    model = get_peft_model(small(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    found = gradients(model, labeled_loss(model, **batch("response")))
    assert found
    assert all("lora_" in name for name in found)
    assert any(float(g.abs().sum()) > 0 for name, g in found.items() if "lora_B" in name)


def test_padding_changes_nothing() -> None:
    model, inputs = small(), batch("response")
    wider = {
        "input_ids": functional.pad(inputs["input_ids"], (0, 11), value=3),
        "labels": functional.pad(inputs["labels"], (0, 11), value=IGNORE),
    }
    with torch.no_grad():
        assert float(labeled_loss(model, **wider)) == pytest.approx(float(labeled_loss(model, **inputs)), rel=1e-6)


def test_a_rows_weight_counts_for_each_of_its_tokens() -> None:
    model, inputs, weights = small(), batch("all"), torch.tensor([0.5, 2.0, 0.0, 1.0])
    with torch.no_grad():
        together = labeled_loss(model, **inputs, weights=weights)
        alone = [labeled_loss(model, inputs["input_ids"][[n]], inputs["labels"][[n]]) for n in range(4)]
    assert float(together) == pytest.approx(
        sum(float(w * one) for w, one in zip(weights, alone, strict=True)), rel=1e-5
    )


def loss(name: str = "cross_entropy", **changed: Any) -> Loss:
    return compositions.config("method=lora_label").method.loss.model_copy(update={"name": name, **changed})


ADAPTIVE = loss("adaptive_balanced", smoothing=0.1)
SCORES = torch.tensor([[2.0, -1.0, 0.3], [0.1, 0.2, -3.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 2])


def test_adaptive_balanced_loss_has_the_published_constants() -> None:
    uniform = choice_loss(torch.zeros(1, 3), torch.tensor([1]), ADAPTIVE)
    assert float(uniform) == pytest.approx(0.488272, abs=1e-6)
    assert float(uniform) == pytest.approx(math.log(3) * (2 / 3) ** 2, rel=1e-6)
    certain = torch.linspace(0, 30, 30_001)[:, None] * torch.tensor([1.0, 0.0, 0.0])
    lowest = choice_loss(certain, torch.zeros(30_001, dtype=torch.long), ADAPTIVE).min()
    assert float(lowest) == pytest.approx(0.018575, abs=1e-6)


def test_adaptive_balanced_loss_follows_its_formula() -> None:
    log_p = SCORES.log_softmax(1)
    q = torch.full((2, 3), 0.1 / 3, dtype=torch.float64).scatter_add_(
        1, TARGETS[:, None], torch.full((2, 1), 0.9).double()
    )
    entropy = -(q * log_p).sum(1)
    expected = (1 - (-entropy).exp()) ** 2 * entropy
    torch.testing.assert_close(choice_loss(SCORES, TARGETS, ADAPTIVE).double(), expected, rtol=1e-6, atol=0)


def test_focal_loss_follows_its_formula_and_is_cross_entropy_at_gamma_0() -> None:
    p = SCORES.softmax(1).gather(1, TARGETS[:, None]).squeeze(1)
    found = choice_loss(SCORES, TARGETS, loss("focal", gamma=1.5)).double()
    torch.testing.assert_close(found, (1 - p) ** 1.5 * -p.log(), rtol=1e-6, atol=0)
    plain = functional.cross_entropy(SCORES, TARGETS, reduction="none", label_smoothing=0.2)
    for one in (loss("focal", gamma=0.0, smoothing=0.2), loss(smoothing=0.2)):
        torch.testing.assert_close(choice_loss(SCORES, TARGETS, one).double(), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_a_certain_row_has_a_finite_gradient(gamma: float) -> None:
    scores = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    choice_loss(scores, torch.tensor([0, 0]), loss("focal", gamma=gamma)).sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_logit_adjustment_is_cross_entropy_of_scores_with_class_priors() -> None:
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    expected = functional.cross_entropy(SCORES + 1.5 * shares.log(), TARGETS, reduction="none")
    found = choice_loss(SCORES, TARGETS, loss(logit_adjustment=1.5), shares.log()).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    counts = choice_loss(SCORES, TARGETS, loss(logit_adjustment=1.5), (shares * 1000).log()).double()
    torch.testing.assert_close(counts, expected, rtol=1e-6, atol=0)  # a common factor changes no choice


def test_only_differences_of_scores_matter() -> None:
    for one in (loss(), loss("focal"), ADAPTIVE):
        torch.testing.assert_close(choice_loss(SCORES - 40.0, TARGETS, one), choice_loss(SCORES, TARGETS, one))
