"""int8 layers: exact integer products, rotations without effect, label columns with the same probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import label_log_probs
from finsa.models import int8

SIZES = {
    "vocab_size": 90,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)),
}


@pytest.fixture(params=MODELS)
def model(request: Any) -> Any:
    """A small model whose biases and norm weights are not those of an untrained one."""
    torch.manual_seed(0)
    made = MODELS[request.param]().eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 90, (3, 20), generator=torch.Generator().manual_seed(1))


def test_a_rotated_model_is_the_same(model: Any, ids: torch.Tensor) -> None:
    wanted, before = model(ids).logits, model.model.layers[0].self_attn.q_proj.weight.clone()
    int8.rotate(model.model)
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.weight, before)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_computes_the_product_of_rounded_weights_and_inputs() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24).requires_grad_(False)
    states = torch.randn(2, 5, 40) * torch.tensor([1.0, 1000.0])[:, None, None]

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(-1, keepdim=True) / 127
        return (rows.double() / scale.double()).round() * scale.double()

    wanted = rounded(states) @ rounded(linear.weight).T + linear.bias
    found = int8.Int8Linear(linear)(states)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


def test_states_do_not_depend_on_the_other_texts(model: Any, ids: torch.Tensor) -> None:
    int8.quantize(model)
    together = model(ids).logits
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_quantized_logits_are_close(model: Any, ids: torch.Tensor) -> None:
    wanted = model(ids).logits
    int8.quantize(model)
    apart = (model(ids).logits - wanted).abs().mean() / wanted.abs().mean()
    assert 0 < apart < 0.05


@pytest.mark.parametrize("answers", [[(5,), (9,), (71,)], [(5, 6), (5, 7), (9,)]], ids=["one token", "several"])
def test_label_columns_alone_give_the_same_probabilities(model: Any, ids: torch.Tensor, answers: Any) -> None:
    tree, lengths = LabelTree.of(answers), torch.tensor([18, 12, 9])
    int8.quantize(model)
    found = label_log_probs(model, ids, lengths, tree).double().softmax(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(int8, "is_quantized", lambda model: False)
        wanted = label_log_probs(model, ids, lengths, tree).double().softmax(1)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
