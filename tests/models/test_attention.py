"""Models whose layers ignore masks are detected, and neither packed nor scored with one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from base_models import small
from transformers import AutoConfig, AutoModelForCausalLM

from finsa.errors import ModelError
from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import LabelScorer, label_log_probs
from finsa.models import attention
from tests.inference.test_scoring import ANSWERS, FakeRenderer, plainly, prompts

SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def other(model_type: str, **settings: Any) -> Any:
    """A model with a different kind of layers and random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **HEADS, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def convolutions() -> Any:
    return other("lfm2", layer_types=["conv", "full_attention"])


def test_full_attention_is_distinguished_from_states_and_windows() -> None:
    assert all(attention.full_attention(small(kind)) for kind in ("qwen2", "llama", "glm4"))
    windows = other("gemma3_text", head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    assert not attention.full_attention(windows)
    assert not attention.full_attention(convolutions())


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS.keys())
def test_labels_are_scored_one_by_one_if_no_mask_can_separate_them(answers: list[tuple[int, ...]]) -> None:
    model, renderer = convolutions(), FakeRenderer(answers)
    scored = LabelScorer(model, renderer, batch_tokens=120)  # type: ignore[arg-type]
    expected = plainly(
        model, prompts(), [(*answer, 1) if (7, 3) in answers and (7, 4) in answers else answer for answer in answers]
    )
    np.testing.assert_allclose(scored.score(prompts()), expected, atol=2e-5)


def test_a_branching_tree_is_refused_without_masks() -> None:
    ids, lengths = torch.randint(10, 50, (2, 12)), torch.tensor([8, 9])
    with pytest.raises(ModelError, match="ignore the mask"):
        label_log_probs(convolutions(), ids, lengths, LabelTree.of([(7, 3), (8, 4)]))


def test_an_mlp_that_returns_more_than_states_is_narrowed_too() -> None:
    model = other(
        "gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    )
    assert attention.last_mlp(model) is not None
    tree, rows = LabelTree.of([(7,), (8,)]), torch.randint(10, 50, (3, 20))
    lengths = torch.tensor([20, 11, 16])
    found = label_log_probs(model, rows, lengths, tree)
    logits = model(input_ids=rows).logits.log_softmax(-1)[torch.arange(3), lengths - 1]
    assert torch.allclose(found, logits[:, [7, 8]], atol=1e-5)
