"""A step uses one device: on the meta device, a tensor created elsewhere is an error, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import steps
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finsa.config import RunConfig
from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import label_log_probs
from finsa.models import hardware
from finsa.training.batches import Collator, Packer

META = torch.device("meta")


class Queued(TorchDispatchMode):
    """Answers queries of tensor contents, and refuses copies to the device that would block the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        made, given = func(*args, **(kwargs or {})), kwargs or {}
        if func is torch.ops.aten._to_copy.default and made.device.type != args[0].device.type:
            assert given.get("non_blocking"), f"the host waits for a copy of {tuple(made.shape)} to the device"
        return made


def _batch(collate: Collator | Packer, kind: str) -> dict[str, torch.Tensor]:
    rows = [dict(row) for row in steps.rows(kind)]
    return {name: hardware.to_device(tensor, META) for name, tensor in collate(rows).items()}


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("kind", [*steps.KINDS, steps.MIXTURE])
def test_all_tensors_of_a_step_are_on_the_model_device(kind: str, shared: int) -> None:
    if kind == steps.MIXTURE and shared:
        return  # its experts are chosen by the text, for a prefix too
    model = steps.learner(kind).train().to(META)
    objective = steps.objective(kind, model)
    batch = _batch(Collator(0, objective.suffix, shared), kind)
    with Queued():
        loss, weight = objective.total(model, batch), objective.weight(batch)
        loss.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert (loss.device, weight.device) == (META, META)
    assert {gradient.device for gradient in gradients} == {META}


def test_all_tensors_of_packed_rows_are_on_the_model_device() -> None:
    """As for flash attention on a GPU: without a mask, rows are separated by their positions."""
    ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", sdpa_attention_forward)
    model, objective = steps.learner("tokens").train().to(META), steps.objective("tokens")
    model.config._attn_implementation = "flash_stand_in"
    with Queued():
        loss = objective.total(model, _batch(Packer(), "weighted tokens"))
        loss.backward()
    assert loss.device == META


def test_the_guard_detects_a_tensor_on_another_device() -> None:
    model, tree = steps.learner("label").to(META).eval(), LabelTree.of([(7, 3), (8, 4), (9,)])
    assert not tree.chain  # so that a mask and positions are made
    ids = torch.zeros(2, 9 + len(tree.tokens), dtype=torch.long, device=META)
    with Queued(), torch.no_grad():
        assert label_log_probs(model, ids, torch.full((2,), 9, device=META), tree).device == META
    with Queued(), torch.no_grad(), pytest.raises(RuntimeError, match="meta"):
        label_log_probs(model, ids, torch.full((2,), 9), tree)
    with Queued(), pytest.raises(AssertionError, match=r"waits for a copy of \(2,\)"):
        torch.ones(2).to(META)


def test_float32_matmul_precision_follows_the_configuration(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a GPU, where the default keeps float32 (TF32 must be requested)."""
    before, fused = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
    try:
        hardware.prepare(config("train.matmul_precision=high").train)
        assert torch.get_float32_matmul_precision() == "high"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        hardware.prepare(config().train)
        assert torch.get_float32_matmul_precision() == "highest"
        hardware.prepare(config("train.matmul_precision=high").train)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cuda.enable_flash_sdp(fused)
