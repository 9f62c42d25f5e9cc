"""Dropout that draws the distances between dropped elements has the distribution of torch's dropout."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from finsa.models import dropout
from finsa.models.dropout import SparseDropout

SIZE = 200_000


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.1, 0.2])
def test_elements_are_dropped_independently_at_the_rate(rate: float) -> None:
    """The number of dropped elements is binomial, so is the number of dropped pairs, and no position is favored."""
    torch.manual_seed(0)
    dropped = SparseDropout(rate).train()(torch.ones(SIZE)) == 0
    assert stats.binomtest(int(dropped.sum()), SIZE, rate).pvalue > 0.001
    pairs = dropped[::2] & dropped[1::2]
    assert stats.binomtest(int(pairs.sum()), SIZE // 2, rate**2).pvalue > 0.001
    parts = dropped.view(20, -1).sum(1)
    assert stats.chisquare(parts).pvalue > 0.001


def test_every_position_can_be_dropped() -> None:
    torch.manual_seed(0)
    layer = SparseDropout(0.2).train()
    counts = torch.stack([layer(torch.ones(7)) == 0 for _ in range(4_000)]).sum(0)
    assert all(stats.binomtest(int(count), 4_000, 0.2).pvalue > 0.001 for count in counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_scaled_or_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.rand(8, 50, 16, dtype=dtype).add_(1).transpose(0, 1).requires_grad_()  # not contiguous
    result = SparseDropout(0.1).train()(values)
    result.backward(torch.ones_like(result))
    kept = result != 0
    assert 0.8 < kept.float().mean() < 0.97
    torch.testing.assert_close(result[kept], (values * (1 / 0.9))[kept])
    assert values.grad is not None
    torch.testing.assert_close(values.grad, kept.to(dtype) * torch.tensor(1 / 0.9, dtype=dtype))


def test_the_seed_determines_the_elements_and_evaluation_drops_none() -> None:
    layer, values = SparseDropout(0.1), torch.rand(1000)
    torch.manual_seed(3)
    first, second = layer(values), layer(values)
    torch.manual_seed(3)
    assert torch.equal(layer(values), first)
    assert not torch.equal(first, second)
    assert torch.equal(layer.eval()(values), values)


def test_rates_above_the_limit_and_zero_are_torchs() -> None:
    values = torch.rand(1000)
    for rate in (0.0, 0.5):
        torch.manual_seed(3)
        expected = nn.Dropout(rate)(values)
        torch.manual_seed(3)
        assert torch.equal(SparseDropout(rate)(values), expected)


def test_lora_layers_use_it() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["0"], lora_dropout=0.1)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)  # type: ignore[arg-type]
    dropout.make_sparse(model)
    found = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert [(type(layer), layer.p) for layer in found] == [(SparseDropout, 0.1)]
