from __future__ import annotations

from pathlib import Path

import pytest
from compositions import config

from finsa.config import Train
from finsa.data import dataset
from finsa.errors import ConfigError
from finsa.session import Session
from finsa.training import preflight


def settings(*overrides: str) -> Train:
    return config(*overrides).train


def test_steps_count_every_epochs_incomplete_step() -> None:
    train = settings("train.batch_size=32", "train.micro_batch_size=8", "train.epochs=2")
    assert preflight.optimizer_steps(train, rows=100) == 2 * 4
    assert preflight.accumulation_steps(train) == 4


def test_steps_of_the_published_schedules() -> None:
    aidf = settings("train=aidf")
    assert preflight.accumulation_steps(aidf, world=4) == 8  # 6 x 8 x 4 = 192
    # Published 185 and 140: the libraries of that time dropped an epoch's incomplete step, today's keep it.
    assert preflight.optimizer_steps(aidf, rows=7147, world=4) == 190
    assert preflight.optimizer_steps(aidf, rows=5430, world=4) == 145
    assert preflight.optimizer_steps(settings("train=finsa_moe"), rows=1_626_292) == 304_932
    assert preflight.optimizer_steps(settings("train=finsa_moe"), rows=8_275) == 1_554


def test_max_steps_stops_earlier() -> None:
    assert preflight.optimizer_steps(settings("train.max_steps=3"), rows=1000) == 3


def test_a_batch_larger_than_the_data_is_reported_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size: 32 is more than the 20 training rows.*=20 or less"):
        preflight.optimizer_steps(settings("train.batch_size=32"), rows=20)


def test_processes_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size x processes: 32 x 3"):
        preflight.accumulation_steps(settings("train.batch_size=32", "train.micro_batch_size=32"), world=3)


LABELS = ("data=table", "data.task=ordinal", "data.labels=['利空','中性','利好']", "data.cache=null")


@pytest.mark.parametrize(
    ("measure", "rows", "words"),
    [
        ("auroc", "利好", LABELS),
        (
            "pearson",
            "0.5",
            ("data=table", "data.task=regression", "data.labels={0: '跌', 1: '涨'}", "data.cache=null"),
        ),
    ],
)
def test_a_measure_that_the_validation_rows_do_not_define_is_refused(
    tmp_path: Path, measure: str, rows: str, words: tuple[str, ...]
) -> None:
    kinds = ["0", "1", "0.5"] if measure == "pearson" else ["利空", "中性", "利好"]
    for split, labels in (("train", kinds * 20), ("valid", [rows] * 9), ("test", kinds * 3)):
        lines = "".join(f"{split}{number},{label}\n" for number, label in enumerate(labels))
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{lines}", encoding="utf-8")
    cfg = config("method=lora_label", *words, f"data.files={tmp_path}", f"train.select_by={measure}")
    with pytest.raises(ConfigError, match=f"train.select_by={measure}: is not defined on the 9 validation rows"):
        preflight.require_trainable(cfg, dataset.load(cfg.data), Session())
    other = config("method=lora_label", *words, f"data.files={tmp_path}", "train.select_by=mae")
    preflight.require_trainable(other, dataset.load(other.data), Session())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prompts_longer_than_the_context_are_refused(
    tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded model has 1,024 positions."""
    few = config("method=few_shot", "method.examples.count=40")
    message = (
        r"method.examples.count: the longest prompt .* tokens, but the context of the model is 1,024; set a smaller"
    )
    with pytest.raises(ConfigError, match=message):
        preflight.require_trainable(few, dataset.load(few.data), Session())
    long = config("data.max_length=2000")
    preflight.require_trainable(long, dataset.load(long.data), Session())
    assert (
        "data.max_length=2000 is more than the context of the model, 1,024 tokens; no text" in capsys.readouterr().out
    )
    for name in ("train", "validation", "test"):
        lines = "".join(
            f"{name}{row}" + "涨" * 1200 * (name == split) + f",{'利好利空'[row % 2 * 2 :][:2]}\n" for row in range(40)
        )
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{lines}", encoding="utf-8")
    own = config("data=table", f"data.files={tmp_path}", "data.max_length=2000", "data.cache=null")
    with pytest.raises(ConfigError, match="data.max_length: the longest prompt .* set data.max_length=1024 or less"):
        preflight.require_trainable(own, dataset.load(own.data), Session())


def test_fewer_training_rows_than_examples_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "valid", "test"):
        lines = "".join(f"{name}{row},{'利好利空'[row % 2 * 2 :][:2]}\n" for row in range(4))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{lines}", encoding="utf-8")
    words = ("method=few_shot", "data=table", f"data.files={tmp_path}", "data.cache=null")
    for count, noted in ((4, False), (5, True)):
        cfg = config(*words, f"method.examples.count={count}")
        preflight.require_trainable(cfg, dataset.load(cfg.data), Session())
        note = f"note: method.examples.count={count} is more than the 4 training rows, all of which are examples"
        assert (note in capsys.readouterr().out) == noted
