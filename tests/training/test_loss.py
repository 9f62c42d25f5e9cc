"""The loss at labelled positions against the library's own, over all positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import EXTRA, small
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from finsa.data.rows import IGNORE
from finsa.training.collate import Collator
from finsa.training.loss import labelled_loss


def batch(labelled: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (5, 17, 30, 9):
        ids = torch.randint(2, 50, (length,), generator=generator).tolist()
        context = ids[1:-2] if labelled == "all" else [IGNORE] * (length - 3)
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


@pytest.mark.parametrize("labelled", ["all", "response"])
@pytest.mark.parametrize("model_type", EXTRA)
def test_loss_and_gradients_equal_the_plain_ones(model_type: str, labelled: str) -> None:
    model = small(model_type).requires_grad_(True)
    inputs = batch(labelled)
    fast, plain = labelled_loss(model, **inputs), plain_loss(model, inputs)
    assert fast.item() == pytest.approx(plain.item(), rel=2e-6)
    ours, theirs = gradients(model, fast), gradients(model, plain)
    assert ours.keys() == theirs.keys()
    norm = torch.stack([g.norm() for g in theirs.values()]).norm()
    difference = torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm()
    assert float(difference / norm) < 1e-5


def test_loss_goes_through_an_adapter() -> None:
    model = get_peft_model(small(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    found = gradients(model, labelled_loss(model, **batch("response")))
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
        assert float(labelled_loss(model, **wider)) == pytest.approx(float(labelled_loss(model, **inputs)), rel=1e-6)
