"""Base models in 4 and 8 bits, on the hardware of this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finsa.config import RunConfig
from finsa.errors import ConfigError
from finsa.models import adapters, base, quantization
from finsa.session import Session

Configure = Callable[..., RunConfig]
KINDS = ("nf4", "int8")
SHAPE = (
    "model.weights=random",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.tie_word_embeddings=false",
)
IDS = torch.arange(5, 40)[None].to(base.device())


def load(config: Configure, kind: str, *overrides: str) -> Any:
    return base.load_base(config(*overrides).model, 1, quantization=kind)


def bytes_of(model: Any) -> int:
    linears = (m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name)
    return sum(m.weight.numel() * m.weight.element_size() for m in linears)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [(), SHAPE], ids=["embedded", "random"])
def test_a_quantized_base_is_small_accurate_and_has_as_many_parameters(
    config: Configure, kind: str, overrides: tuple[str, ...]
) -> None:
    plain, small = load(config, "none", *overrides), load(config, kind, *overrides)
    dtype = base.dtype(config(*overrides).model)
    assert bytes_of(plain) / bytes_of(small) == pytest.approx(dtype.itemsize * (2 if kind == "nf4" else 1))
    assert base.count_parameters(small) == (0, base.count_parameters(plain)[1])
    assert small.get_output_embeddings().weight.dtype == dtype
    with torch.no_grad():
        exact, near = (model(input_ids=IDS).logits.float().log_softmax(-1) for model in (plain, small))
    divergence = (exact.exp() * (exact - near)).sum(-1).mean()
    assert 0 < float(divergence) < (0.1 if kind == "nf4" else 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_first_does_not_lose_gradients(config: Configure, kind: str) -> None:
    """A forward pass without gradients repacked 4-bit layers on some CPUs, and subsequent training had no effect."""
    cfg = config("method=qlora", *SHAPE)
    assert cfg.method.adapter is not None

    def gradients(score_first: bool) -> list[torch.Tensor]:
        body = load(config, kind, *SHAPE)
        if score_first:
            with torch.no_grad():
                body.eval()(input_ids=IDS)
        model = adapters.attach(body, cfg.model, cfg.method.adapter, seed=0).train()
        torch.manual_seed(0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for name, p in model.named_parameters() if "lora_B" in name]

    fresh, scored = gradients(False), gradients(True)
    assert all(float(gradient.abs().sum()) > 0 for gradient in fresh)
    assert all(torch.equal(one, two) for one, two in zip(fresh, scored, strict=True))


def test_no_layer_repacks_itself(config: Configure) -> None:
    flags = [getattr(m, "support_avx512bf16_for_cpu", None) for m in load(config, "nf4").modules()]
    assert flags.count(False) == 4 * 7
    assert True not in flags


def test_double_quantization_is_on(config: Configure) -> None:
    layer = load(config, "nf4").model.layers[0].self_attn.q_proj
    assert layer.weight.quant_state.nested
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.compute_dtype == base.dtype(config().model)


def test_jobs_share_a_base_only_with_the_same_quantization(config: Configure) -> None:
    section, session = config(*SHAPE).model, Session()
    first = base.load_base(section, 5, "nf4", session)
    assert base.load_base(section, 5, "nf4", session) is first
    assert base.load_base(section, 5, "int8", session) is not first


def test_a_missing_library_is_reported(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization.require_library(config("method=lora_8bit").method)
    real = importlib.util.find_spec
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(ConfigError, match=r"method\.quantization: int8 needs bitsandbytes: pip install bitsandbytes"):
        quantization.require_library(config("method=lora_8bit").method)
    quantization.require_library(config("method=lora").method)
