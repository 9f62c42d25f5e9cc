"""A training that is stopped or killed at any step and resumed ends as an uninterrupted one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import steps
import torch
from base_models import small
from compositions import config
from transformers import TrainerCallback

from finsa.errors import FinsaError, RunError, Stopped
from finsa.evaluation.reproduction import TIMED
from finsa.models import adapters
from finsa.runs import files
from finsa.training import checkpoints, fit

LORA = steps.LORA.model_copy(update={"dropout": 0.3})
WORDS = ["train.batch_size=4", "train.micro_batch_size=2", "train.epochs=3", "train.log_every=3", "train.patience=2"]


class At(TrainerCallback):  # type: ignore[misc]
    """Does something at the end of a step, or of the training if the step is -1."""

    def __init__(self, step: int | None, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step == -1:
            self.act()


def training(
    place: Path,
    tokenizer: Any,
    *words: str,
    step: int | None = None,
    act: Any = None,
    rows: Any = None,
    judge: Any = None,
) -> Any:
    """A training of two layers with dropout: its weights, facts and log."""
    cfg = config(*WORDS, *words)
    model = adapters.attach(small(), cfg.model, LORA, seed=0)
    log = place / "log.jsonl"

    def record(step: int, values: dict[str, float]) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def validate(_: Any) -> dict[str, float]:  # depends on the weights, and runs out of patience in the third epoch
        norm = sum(float(p.detach().double().norm()) for p in model.parameters() if p.requires_grad)
        return {"loss": norm, "macro_f1": -norm}

    found = fit.fit(
        model=model,
        tokenizer=tokenizer,
        rows=rows or steps.rows("tokens") * 2,
        validate=judge or validate,
        train=cfg.train,
        seed=3,
        folder=place / "checkpoints",
        record=record,
        callbacks=[At(step, act)],
        log=log,
        identify=lambda row: f"row {row}",
    )
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    untimed = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    return weights, (found.steps, found.best, found.tokens, found.rows), untimed


def same(first: Any, second: Any) -> None:
    """Bit-for-bit equal."""
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert first[1:] == second[1:]


def term() -> None:
    """Send SIGTERM, as an operator or a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)


SCHEDULES = {
    "by length": [],
    "at random, every 5 steps": ["train.group_by_length=false", "train.validate_every=5", "train.patience=null"],
    "steps within an epoch": ["train.max_steps=6"],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_training_stopped_at_any_step_ends_with_the_same_result(name: str, tokenizer: Any, tmp_path: Path) -> None:
    words = SCHEDULES[name]
    (tmp_path / "whole").mkdir()
    whole = training(tmp_path / "whole", tokenizer, *words)
    total = whole[1][0]
    assert total >= 6
    (tmp_path / "cut").mkdir()
    stops = 0
    for step in range(1, total + 1, 4):
        with pytest.raises(Stopped, match="SIGTERM; step"):
            training(tmp_path / "cut", tokenizer, *words, step=step, act=term)
        stops += 1
        assert len(checkpoints.numbered(tmp_path / "cut" / "checkpoints")) <= 2
    same(training(tmp_path / "cut", tokenizer, *words), whole)
    same(training(tmp_path / "cut", tokenizer, *words), whole)  # a finished training makes no further step
    assert stops >= 2


def test_a_signal_in_the_last_step_of_an_epoch_stops_there(tokenizer: Any, tmp_path: Path) -> None:
    words = ("train.validate_every=100", "train.patience=null", "train.epochs=2")
    (tmp_path / "whole").mkdir()
    whole = training(tmp_path / "whole", tokenizer, *words)
    (tmp_path / "cut").mkdir()
    epoch = whole[1][0] // 2
    with pytest.raises(Stopped, match=f"SIGTERM; step {epoch} is saved"):
        training(tmp_path / "cut", tokenizer, *words, step=epoch - 1, act=term)  # at the end of the step before
    same(training(tmp_path / "cut", tokenizer, *words), whole)


def test_a_signal_after_the_last_checkpoint_stops_before_scoring(tokenizer: Any, tmp_path: Path, whole: Any) -> None:
    with pytest.raises(Stopped, match=f"SIGTERM; step {whole[1][0]} is saved"):
        training(tmp_path, tokenizer, step=-1, act=term)
    same(training(tmp_path, tokenizer), whole)


def test_a_resumed_training_keeps_its_early_stopping_count(tokenizer: Any, tmp_path: Path) -> None:
    """The best validation is that of step 3, so with a patience of 2 the training ends at step 9."""
    words = ("train.validate_every=3", "train.epochs=5", "train.keep_checkpoints=9")

    def judge(_: Any) -> dict[str, float]:
        scores.append(0.5 if not scores else 0.4)
        return {"loss": 1.0, "macro_f1": scores[-1]}

    scores: list[float] = []
    with pytest.raises(Stopped):
        training(tmp_path, tokenizer, *words, step=6, act=term, judge=judge)
    assert len(scores) == 2
    _, (made, best, *_), _ = training(tmp_path, tokenizer, *words, judge=judge)
    assert (made, best, len(scores)) == (9, 0.5, 3)
    assert [place.name for place in checkpoints.numbered(tmp_path / "checkpoints")][-1] == "checkpoint-9"


def test_a_second_signal_ends_at_once(tokenizer: Any, tmp_path: Path) -> None:
    def twice() -> None:
        term()
        term()

    with pytest.raises(Stopped):
        training(tmp_path, tokenizer, step=2, act=twice)
    assert checkpoints.numbered(tmp_path / "checkpoints") == []


@pytest.fixture(scope="module")
def whole(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted training."""
    return training(tmp_path_factory.mktemp("whole"), tokenizer)


@pytest.fixture(scope="module")
def stopped(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training stopped at the sixth step: the checkpoints of an epoch and of the stop."""
    place = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        training(place, tokenizer, step=6, act=term)
    return place


def spoil(place: Path, damage: str) -> None:
    """Damage a checkpoint."""
    weights = place / "adapter_model.safetensors"
    match damage:
        case "a byte":
            content = bytearray(weights.read_bytes())
            content[-5] ^= 1
            weights.write_bytes(content)
        case "a file":
            (place / "optimizer.pt").unlink()
        case "the manifest":
            (place / "manifest.json").write_text("{")
        case "half":
            (place / "manifest.json").unlink()
            weights.unlink()


@pytest.mark.parametrize("damage", ["a byte", "a file", "the manifest", "half"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(damage: str, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "checkpoints", tmp_path, dirs_exist_ok=True)
    first, last = checkpoints.numbered(tmp_path)
    assert checkpoints.fault(last) is None
    spoil(last, damage)
    told: list[str] = []
    found = checkpoints.newest(tmp_path, told.append)
    assert found is not None
    assert found.path == first
    assert told[0].startswith(f"{last} is skipped: ")


def test_a_checkpoint_whose_best_checkpoint_is_damaged_is_not_used(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "checkpoints", tmp_path, dirs_exist_ok=True)
    spoil(checkpoints.numbered(tmp_path)[0], "a byte")
    told: list[str] = []
    assert checkpoints.newest(tmp_path, told.append) is None
    assert len(told) == 3
    assert "training starts from the beginning" in told[-1]


@pytest.mark.parametrize("damaged", [1, 2])
def test_resuming_from_the_remaining_checkpoints_ends_with_the_same_result(
    damaged: int, whole: Any, stopped: Path, tokenizer: Any, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for place in checkpoints.numbered(tmp_path / "checkpoints")[-damaged:]:
        spoil(place, "a byte")
    same(training(tmp_path, tokenizer), whole)


@pytest.mark.parametrize(("best", "left"), [(100, {100, 150}), (150, {100, 150}), (50, {50, 150}), (None, {100, 150})])
def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(
    best: int | None, left: set[int], tmp_path: Path
) -> None:
    """Step 200 is damaged, so the training resumed from 100 and has saved 150."""
    place = {step: tmp_path / f"checkpoint-{step}" for step in (50, 100, 150, 200)}
    for folder in place.values():
        folder.mkdir()
    checkpoints.rotate(tmp_path, 2, place[best] if best else None, place[150])
    assert {int(folder.name.rpartition("-")[2]) for folder in tmp_path.iterdir()} == left


def test_a_partial_checkpoint_left_by_a_kill_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"{files.STAGING}checkpoint-3" / "checkpoint-3"
    left.mkdir(parents=True)
    (left / "optimizer.pt").write_bytes(b"half")
    assert checkpoints.newest(tmp_path, print) is None
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay_intact(
    whole: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "cut").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG, as one to a full disk does

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    try:
        with pytest.raises(RunError, match="checkpoint-8 cannot be written: .*resume=true"):
            training(tmp_path / "cut", tokenizer, step=5, act=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    (kept,) = checkpoints.numbered(tmp_path / "cut" / "checkpoints")
    assert checkpoints.fault(kept) is None
    assert list((tmp_path / "cut" / "checkpoints").glob(f"{files.STAGING}*")) == []
    same(training(tmp_path / "cut", tokenizer), whole)


def test_a_non_finite_loss_stops_training_before_weights_change(tokenizer: Any, tmp_path: Path) -> None:
    rows = steps.rows("weighted tokens") * 2
    rows[5] = {**rows[5], "weight": float("inf")}
    with pytest.raises(FinsaError, match=r"not finite. Rows: row 5 \(1 of 4, "):
        training(tmp_path, tokenizer, rows=rows)
    told = json.loads((tmp_path / "checkpoints" / "not_finite.json").read_text())
    assert [row["id"] for row in told["rows"] if not row["finite"]] == ["row 5"]
    assert len(told["rows"]) == 4
    found = checkpoints.newest(tmp_path / "checkpoints", print)
    assert (found is None) == (told["step"] == 1)
    if found is not None:
        assert found.path.name == f"checkpoint-{told['step'] - 1}"
        weights = torch.load(found.path / "optimizer.pt", weights_only=True)
        assert all(torch.isfinite(state["exp_avg"]).all() for state in weights["state"].values())
