from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import small
from compositions import config

from finsa.config import Adapter
from finsa.errors import ConfigError, ModelError
from finsa.models import adapters

LORA = Adapter(variant="lora", rank=4, alpha=8, dropout=0.0, targets="query_value", lr_ratio=1.0, init=None)
IDS = torch.arange(2, 40)[None]


@pytest.fixture
def section() -> Any:
    return config("model.weights=random").model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def disturb(model: Any) -> None:
    """Give the adapter weights that change the output, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)


def test_a_fresh_adapter_changes_no_outputs_and_is_the_only_trainable_part(section: Any) -> None:
    base = small()
    before = logits(base)
    model = adapters.attach(base, section, LORA, seed=1)
    assert torch.equal(logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


def test_adapters_are_float32_on_a_bfloat16_base(section: Any) -> None:
    model = adapters.attach(small().to(torch.bfloat16), section, LORA, seed=1)
    types = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert types == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_detaching_restores_the_base_bit_for_bit(section: Any) -> None:
    base = small()
    before, weights = logits(base), {name: p.clone() for name, p in base.named_parameters()}
    model = adapters.attach(base, section, LORA, seed=1)
    disturb(model)
    assert not torch.equal(logits(model), before)
    restored = adapters.detach(model)
    assert restored is base
    assert torch.equal(logits(restored), before)
    assert weights.keys() == dict(restored.named_parameters()).keys()
    assert not any("lora" in name for name, _ in restored.named_modules())


def test_a_saved_adapter_loads_to_the_same_logits(section: Any, tmp_path: Path) -> None:
    model = adapters.attach(small(), section, LORA, seed=1)
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(adapters.load(small(), tmp_path)), expected)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_seed_determines_the_initial_weights(section: Any) -> None:
    def start(seed: int) -> torch.Tensor:
        model = adapters.attach(small(), section, LORA, seed=seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_a_missing_target_is_named(section: Any) -> None:
    wrong = LORA.model_copy(update={"targets": ("q_prj",)})
    with pytest.raises(ConfigError, match=r"method\.adapter\.targets: .*'q_prj'\. Did you mean 'q_proj'"):
        adapters.attach(small(), section, wrong, seed=1)


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter that fits this base"):
        adapters.load(small(), tmp_path)
