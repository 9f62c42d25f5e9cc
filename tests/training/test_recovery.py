"""Out of memory: the same steps, in smaller micro-batches; errors are injected into real fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import steps
import torch
from few import FEW

from finsa.errors import RunError
from finsa.training import trainer
from finsa.training.objective import Objective

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
WINDOWS = "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(CPU),
    RuntimeError(WINDOWS),
]
Raise = Callable[[torch.Tensor], None]


@contextmanager
def scarce(most: int, error: Exception, where: str) -> Iterator[list[int]]:
    """Let every micro-batch of more than `most` rows fail, in forward or halfway through backward.

    Yields:
        The rows of every attempt.
    """
    made, attempts = steps.objective, []

    def objective(kind: str, model: Any = None) -> Objective:
        plain = made(kind, model)

        def total(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            rows = len(batch["lengths"])
            attempts.append(rows)
            if rows <= most:
                return plain.total(model, batch)
            if where == "forward":
                raise error
            layer = next(m for name, m in model.named_modules() if name.endswith("layers.1"))
            handle = layer.register_full_backward_hook(lambda *_: fail())
            try:
                return plain.total(model, batch)
            finally:
                handle.remove()

        return Objective(total, plain.weight, plain.suffix)

    def fail() -> None:
        raise error

    steps.objective = objective
    try:
        yield attempts
    finally:
        steps.objective = made


@pytest.fixture(scope="module")
def whole_step(tokenizer: Any) -> Callable[[str, int], tuple[dict[str, torch.Tensor], float]]:
    """Gradients and loss of an undisturbed step of a kind, in micro-batches of a size."""
    return cache(lambda kind, micro: steps.step(kind, micro, tokenizer))


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["tokens", "weighted tokens", "label", "classifier"])
def test_the_recovered_step_is_the_same(kind: str, where: str, whole_step: Any, tokenizer: Any) -> None:
    whole, loss = whole_step(kind, 8)
    with scarce(2, ERRORS[0], where) as attempts:
        parts, found = steps.step(kind, 8, tokenizer)
    assert attempts == [8, 4, 2, 2, 2, 2]
    assert found == pytest.approx(loss, rel=1e-5)
    assert set(parts) == set(whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "windows"])
def test_gradients_from_before_the_failure_are_not_counted_twice(
    error: Exception, whole_step: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, loss = whole_step("tokens", 4)
    seen: list[int] = []
    plain = trainer.SFTTrainer.training_step

    def second_fails(self: Any, model: Any, batch: Any, *args: Any) -> torch.Tensor:
        seen.append(len(batch["lengths"]))
        found = plain(self, model, batch, *args)
        if len(seen) == 2:  # the first micro-batch is through, and the second one's gradients are there too
            raise error
        return found

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", second_fails)
    parts, found = steps.step("tokens", 4, tokenizer)
    assert seen == [4, 4, 2, 2, 2, 2]
    assert found == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_single_row_that_does_not_fit_fails_with_advice(tokenizer: Any) -> None:
    with scarce(0, ERRORS[1], "forward"), pytest.raises(RunError, match="one row, .*gradient_checkpointing=true"):
        steps.step("tokens", 8, tokenizer)


def test_other_errors_are_not_treated_as_out_of_memory(tokenizer: Any) -> None:
    with scarce(0, RuntimeError("shapes do not fit"), "forward"), pytest.raises(RuntimeError, match="do not fit"):
        steps.step("tokens", 8, tokenizer)


def test_a_run_reports_it_and_can_be_resumed(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finsa.stages import train

    plain = trainer.FinsaTrainer.compute_loss

    def limited(most: int) -> Any:
        def compute(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if len(inputs["lengths"]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return plain(self, model, inputs, *args, **kwargs)

        return compute

    words = [FEW, "train=smoke", "train.max_steps=2", "tracking=none", "stage.compare_base=false"]
    words += [f"output_dir={tmp_path}"]
    monkeypatch.setattr(trainer.FinsaTrainer, "compute_loss", limited(0))
    with pytest.raises(RunError, match="resume=true"):
        train.run(config(*words))
    monkeypatch.setattr(trainer.FinsaTrainer, "compute_loss", limited(8))
    done = train.run(config(*words, "resume=true")).run_dir
    assert done is not None
    facts = json.loads((done / "run.json").read_text())
    assert facts["status"] == "complete"
    assert (facts["batching"]["micro_batch_size"], facts["batching"]["accumulation"]) == (8, 2)
    log = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    assert [record["micro_batch_size"] for record in log if "out_of_memory" in record][-1:] == [8]
    steps_made = [record for record in log if "mfu" in record]
    assert steps_made
    assert all(record["mfu"] > 0 and record["samples_per_second"] > 0 for record in steps_made)
    assert 0 < facts["throughput"]["trainable_token_share"] < 0.2
    assert facts["throughput"]["matmul_gflops"] > 1
