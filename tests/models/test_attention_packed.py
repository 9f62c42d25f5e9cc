"""Packed rows are equivalent to separate rows, with and without a shared prefix."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from base_models import EXTRA, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from finsa.data.rows import IGNORE
from finsa.models import attention
from finsa.training import layout
from finsa.training.batches import Collator, Packer
from finsa.training.objective import tokens
from tests.models.test_attention import other
from tests.models.test_flops import adapted_model, counted

Learned = tuple[float, torch.Tensor]


def rows(lengths: list[int], head: int, learned: int = 2, weights: bool = False) -> list[dict[str, Any]]:
    """Rows after a common prefix; the last tokens have loss, or all if `learned` is longer than a row."""
    draw, made = random.Random(sum(lengths)), []
    shared = [draw.randrange(10, 50) for _ in range(head + 1)]  # the prefix of a run ends one token early
    for number, length in enumerate(lengths):
        ids = [*shared, *(draw.randrange(10, 50) for _ in range(length))]
        unlearned = max(1, len(ids) - learned)
        row: dict[str, Any] = {"input_ids": ids, "labels": [IGNORE] * unlearned + ids[unlearned:]}
        made.append({**row, "weight": 0.5 + number} if weights else row)
    return made


def step(model: Any, batches: list[dict[str, torch.Tensor]]) -> Learned:
    """The mean loss of some batches and its gradients."""
    model.zero_grad()
    objective = tokens()
    loss = torch.stack([objective.total(model, batch) for batch in batches]).sum()
    loss = loss / sum(objective.weight(batch) for batch in batches)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(found: Learned, expected: Learned) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-5


def separate(model: Any, made: list[dict[str, Any]]) -> Learned:
    return step(model, [Collator(0)([row]) for row in made])


@pytest.mark.parametrize("head", [0, 5])
@pytest.mark.parametrize("model_type", EXTRA)
def test_packed_rows_give_every_weight_the_gradient_of_separate_rows(model_type: str, head: int) -> None:
    model, made = small(model_type).requires_grad_(True).train(), rows([3, 9, 1, 6, 9], head, learned=100)
    assert attention.can_pack(model)
    assert_same(step(model, [Packer(head)(made)]), separate(model, made))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    head=st.integers(0, 9),
    learned=st.sampled_from([1, 2, 100]),
    weights=st.booleans(),
)
def test_any_packed_sequence_equals_its_separate_rows(
    lengths: list[int], head: int, learned: int, weights: bool
) -> None:
    model, made = small().requires_grad_(True).train(), rows(lengths, head, learned, weights)
    shared = layout.CommonPrefix()
    shared.add(made)  # type: ignore[arg-type]
    # Rows also agree on which part of the prefix has loss, which a row of one token may end early.
    assert_same(step(model, [Packer(min(head, shared.tokens))(made)]), separate(model, made))


def test_convolutional_layers_cannot_be_packed() -> None:
    assert not attention.can_pack(other("lfm2", layer_types=["conv", "full_attention"]))


def test_a_layer_that_ignores_packed_attention_is_an_error_and_attention_is_restored() -> None:
    model, batch = small(), Packer()(rows([4, 5], 0))
    kept = model.model.layers[0].self_attn.config
    model.model.layers[0].self_attn.config = small().config  # requests another attention implementation
    with pytest.raises(RuntimeError, match="only 1 of 2 layers have separated the packed rows"):
        tokens().total(model, batch)
    model.model.layers[0].self_attn.config = kept
    assert attention.causal_model(model).config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), attention.packed_rows(model, batch["lengths"], 9):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("head", [0, 8])
def test_packed_flops_equal_those_of_the_counter(head: int) -> None:
    model = adapted_model("lora_all")
    model.set_attn_implementation("sdpa")
    made = rows([20, 23, 30, 41], head)
    batch = Packer(head)(made)
    with sdpa_kernel(SDPBackend.MATH):  # its products are seen by the counter
        assert counted(model, lambda: tokens().total(model, batch), batch, False, 0) == pytest.approx(1, abs=0.02)
