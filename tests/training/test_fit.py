"""Fits on small models: equalities between equivalent settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import small
from compositions import config

from finsa.config import Adapter, Train
from finsa.data.rows import IGNORE, Row
from finsa.models import adapters
from finsa.training import fit
from finsa.training.watchdog import BEATS, HEARTBEAT, Watch

LORA = Adapter(variant="lora", rank=4, alpha=8, dropout=0.1, targets=("q_proj", "v_proj"), lr_ratio=1.0, init=None)


class FakeTokenizer:
    """The part of a tokenizer that a fit needs."""

    pad_token_id = 0
    model_input_names = ("input_ids",)


def settings(*overrides: str) -> Train:
    return config("train.batch_size=8", "train.log_every=1", "train.epochs=2", "train.patience=null", *overrides).train


def rows(n: int = 24) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(n):
        ids = torch.randint(2, 50, (4 + number % 9,), generator=generator).tolist()
        made.append(Row(input_ids=ids, labels=[IGNORE] * (len(ids) - 2) + ids[-2:]))
    return made


def train(
    folder: Path,
    tokenizer: Any,
    *overrides: str,
    validate: Any = None,
    seed: int = 3,
    run: Path | None = None,
    found: list[fit.Fitted] | None = None,
) -> tuple[Any, list[Any]]:
    """Fit an adapter and return its weights, and the log."""
    model = adapters.attach(small(), _section(), LORA, seed=0)
    log: list[Any] = []
    fitted = fit.fit(
        model=model,
        tokenizer=tokenizer,
        rows=rows(),
        validate=validate or (lambda _: {"loss": 1.0, "macro_f1": 0.5}),
        train=settings(*overrides),
        seed=seed,
        folder=folder,
        record=lambda step, values: log.append({"step": step, **values}),
        watch=Watch(settings(*overrides), run) if run else None,
    )
    if found is not None:
        found.append(fitted)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}, log


def _section() -> Any:
    return config("model.weights=random").model


def losses(log: list[Any]) -> list[float]:
    return [record["loss"] for record in log if "loss" in record]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_equals_one_big_batch(tmp_path: Path, tokenizer: Any, micro: int) -> None:
    same = ("method.adapter.dropout=0.0", "train.epochs=1")
    global LORA
    plain, LORA = LORA, LORA.model_copy(update={"dropout": 0.0})
    try:
        whole, whole_log = train(tmp_path / "a", tokenizer, "train.micro_batch_size=8", *same)
        parts, parts_log = train(tmp_path / "b", tokenizer, f"train.micro_batch_size={micro}", *same)
    finally:
        LORA = plain
    assert losses(parts_log) == pytest.approx(losses(whole_log), rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def test_max_steps_beyond_the_epochs_does_not_extend_training(tmp_path: Path, tokenizer: Any) -> None:
    """`train.max_steps` only stops earlier; in transformers it overrides the epochs."""
    same = ("train.epochs=1", "train.micro_batch_size=8", "train.log_every=1")
    whole, log = train(tmp_path / "a", tokenizer, *same)
    longer, longer_log = train(tmp_path / "b", tokenizer, *same, "train.max_steps=1000")
    assert losses(longer_log) == losses(log)
    assert all(torch.equal(longer[name], value) for name, value in whole.items())


def test_same_seed_same_weights_and_another_seed_others(tmp_path: Path, tokenizer: Any) -> None:
    first, _ = train(tmp_path / "a", tokenizer, "train.micro_batch_size=8")
    again, _ = train(tmp_path / "b", tokenizer, "train.micro_batch_size=8")
    other, _ = train(tmp_path / "c", tokenizer, "train.micro_batch_size=8", seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_stopped_fit_resumes_to_the_same_weights(tmp_path: Path, tokenizer: Any) -> None:
    whole, whole_log = train(tmp_path / "whole", tokenizer, "train.micro_batch_size=4", "train.epochs=3")

    calls = []

    def stop_at_the_second(_: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"loss": 1.0, "macro_f1": 0.5}

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", tokenizer, "train.micro_batch_size=4", "train.epochs=3", validate=stop_at_the_second)
    resumed, log = train(tmp_path / "cut", tokenizer, "train.micro_batch_size=4", "train.epochs=3")
    assert losses(log) == losses(whole_log)[3:]  # the checkpoint of the first epoch, three steps
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_with_an_undefined_measure_is_not_the_best(tmp_path: Path, tokenizer: Any) -> None:
    scores, found = iter([float("nan"), 0.2, float("nan")]), list[fit.Fitted]()
    words = ("train.select_by=mcc", "train.validate_every=2")
    train(tmp_path, tokenizer, *words, validate=lambda _: {"loss": 1.0, "mcc": next(scores)}, found=found)
    assert (found[0].best, found[0].best_validation) == (0.2, 1)


def test_no_defined_measure_is_no_best_score(tmp_path: Path, tokenizer: Any) -> None:
    found = list[fit.Fitted]()
    words = ("train.select_by=mcc", "train.validate_every=3")
    train(tmp_path, tokenizer, *words, validate=lambda _: {"loss": 1.0, "mcc": float("nan")}, found=found)
    assert found[0].best is None


def test_the_best_validation_decides_which_weights_stay(tmp_path: Path, tokenizer: Any) -> None:
    kept = []

    def best_first(model: Any) -> dict[str, float]:
        kept.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})
        return {"loss": 0.0, "macro_f1": 1.0 - 0.1 * len(kept)}

    words = ("train.micro_batch_size=8", "train.epochs=3")
    found: list[fit.Fitted] = []
    final, _ = train(tmp_path, tokenizer, *words, validate=best_first, found=found)
    assert len(kept) == 3
    assert found[0].best_validation == 0
    assert all(torch.equal(final[name], kept[0][name]) for name in final)
    assert not all(torch.equal(final[name], kept[2][name]) for name in final)
    train(tmp_path, tokenizer, *words, validate=best_first, found=found)  # finished: nothing is validated again
    assert len(kept) == 3
    assert found[1].best_validation is None


def test_early_stopping_waits_for_patience_validations(tmp_path: Path, tokenizer: Any) -> None:
    calls = []

    def never_better(_: Any) -> dict[str, float]:
        calls.append(1)
        return {"loss": 1.0, "macro_f1": 0.5}

    train(tmp_path, tokenizer, "train.patience=2", "train.epochs=9", "train.micro_batch_size=8", validate=never_better)
    assert len(calls) == 3


def test_the_log_has_loss_rate_and_throughput(tmp_path: Path, tokenizer: Any) -> None:
    _, log = train(tmp_path, tokenizer, "train.micro_batch_size=8")
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["tokens_per_second"] > 0 and record["learning_rate"] >= 0 for record in steps)


@pytest.mark.parametrize("named", [False, True])
def test_the_heartbeat_is_in_the_run_folder(tmp_path: Path, tokenizer: Any, named: bool) -> None:
    folder = tmp_path / "checkpoints" / "joint" / "steps"
    run = tmp_path if named else folder.parent
    train(
        folder, tokenizer, "train.micro_batch_size=8", "train.heartbeat_seconds=0.01", run=tmp_path if named else None
    )
    found = sorted(file for file in tmp_path.rglob("heartbeat*"))
    assert found == [run / HEARTBEAT, run / BEATS]
