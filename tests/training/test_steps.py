"""An optimizer step is one weighted mean over all its rows, regardless of micro-batches and processes."""

from __future__ import annotations

import os
import socket
from functools import cache
from typing import Any

import commands
import pytest
import steps
import torch

from finsa.errors import ConfigError


@cache
def whole(kind: str, tokenizer: Any) -> tuple[dict[str, torch.Tensor], float]:
    """The step in one micro-batch."""
    return steps.step(kind, 8, tokenizer)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(float(gradient.norm()) > 0 for gradient in expected.values())
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])
    other = torch.cat([found[name].flatten() for name in expected])
    assert float((other - whole).norm() / whole.norm()) < 1e-6


@pytest.mark.parametrize("kind", steps.KINDS)
def test_the_step_is_the_weighted_mean_of_its_rows(kind: str, tokenizer: Any) -> None:
    """One row at a time through the objective, summed explicitly."""
    from finsa.training.batches import Collator

    model, objective = steps.learner(kind).train(), steps.objective(kind)
    collate = Collator(tokenizer.pad_token_id, objective.suffix)
    batches = [collate([dict(row)]) for row in steps.rows(kind)]
    total = sum(float(objective.weight(batch)) for batch in batches)
    loss = torch.stack([objective.total(model, batch) for batch in batches]).sum() / total
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients, logged = whole(kind, tokenizer)
    assert logged == pytest.approx(loss.item(), rel=1e-5)
    assert_same(gradients, expected)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("kind", [*steps.KINDS, steps.MIXTURE])
def test_micro_batches_change_nothing(kind: str, micro: int, tokenizer: Any) -> None:
    expected, loss = whole(kind, tokenizer)
    found, logged = steps.step(kind, micro, tokenizer)
    assert logged == pytest.approx(loss, rel=1e-5)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", [*steps.KINDS, steps.MIXTURE])
def test_checkpointing_of_activations_changes_nothing(kind: str, tokenizer: Any) -> None:
    found, _ = steps.step(kind, 8, tokenizer, "train.gradient_checkpointing=true")
    assert_same(found, whole(kind, tokenizer)[0])


TOGETHER = ["weighted tokens", "label", "classifier", steps.MIXTURE]


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Gradients and loss of each kind's step, of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        commands.Command(
            *("2", str(folder / f"{rank}.pt"), *TOGETHER),
            environment={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            script="tests/steps.py",
        )
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.err for rank in ranks]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", TOGETHER)
def test_two_processes_change_nothing(kind: str, of_ranks: list[dict[str, Any]], tokenizer: Any) -> None:
    expected, loss = whole(kind, tokenizer)
    for of_rank in of_ranks:
        gradients, logged = of_rank[kind]
        assert_same({name.removeprefix("module."): gradient for name, gradient in gradients.items()}, expected)
        assert logged == pytest.approx(loss, rel=1e-5)


def test_packing_changes_nothing(tokenizer: Any) -> None:
    expected, loss = whole("weighted tokens", tokenizer)
    found, logged = steps.step("weighted tokens", 4, tokenizer, "train.packing=true")
    assert logged == pytest.approx(loss, rel=1e-5)
    assert_same(found, expected)


def test_a_choice_among_labels_is_not_packed(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="train.packing: only a loss on tokens supports packed rows"):
        steps.step("label", 4, tokenizer, "train.packing=true")
