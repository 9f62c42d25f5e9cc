"""GRPO: the reward rises over a planted pattern, a killed run resumes, and rewards are those of the scorer."""

from __future__ import annotations

import csv
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from base_models import small

from finsa.config import RunConfig
from finsa.data import dataset, tokenized
from finsa.inference.scoring import LabelScorer
from finsa.stages import train
from finsa.training import grpo

Compose = Callable[..., RunConfig]
THINK = ("model.think=open", "model.thought.marks=['<think>','</think>']", "model.thought.temperature=1.0")
GRPO = ("method=grpo", *THINK, "model.thought.max_tokens=4", "method.grpo.group=8", "data.labels=['利空','利好']")
STEPS = ("train.batch_size=2", "train.micro_batch_size=16", "train.log_every=1", "train.schedule=constant")
PLAIN = ("train.warmup=0", "train.learning_rate=3e-3", "train.calibrate=false", "stage.compare_base=false")
ALL = (*GRPO, *STEPS, *PLAIN, "tracking=none", "model.dtype=float32", "train.threads=1")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows that are all of the class that the model finds less probable, after most thoughts."""
    folder = tmp_path_factory.mktemp("planted")
    for name, rows in (("train", 64), ("valid", 2), ("test", 2)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "label"])
            # A few rows of the other class, because a data set has at least two.
            writer.writerows(
                [f"{name}{n}", f"{name}第{n}号公告", "利好" if n % 32 == 1 else "利空"] for n in range(rows)
            )
    return f"data.files={folder}"


def _log(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [one for one in map(json.loads, lines) if "reward" in one]


def test_the_reward_rises_over_a_planted_pattern(planted: str, config: Compose, tmp_path: Path) -> None:
    run = train.run(
        config(*ALL, planted, "train.max_steps=12", "method.grpo.beta=0.0", f"output_dir={tmp_path}")
    ).run_dir
    assert run is not None
    rewards = [one["reward"] for one in _log(run)]
    assert len(rewards) == 12
    assert np.mean(rewards[-4:]) > np.mean(rewards[:3]) + 0.3
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["steps"] == 12
    assert facts["thought_tokens"] > 0
    assert (run / "adapters").is_dir()
    assert not list(run.rglob("ref"))  # trl's reference adapter


def test_max_steps_does_not_lengthen_a_training(planted: str, config: Compose, tmp_path: Path) -> None:
    """64 rows in steps of 2 are 32 steps in an epoch."""
    words = (*ALL, planted, "train.epochs=0.09", "train.max_steps=12", "model.thought.max_tokens=1")
    run = train.run(config(*words, f"output_dir={tmp_path}")).run_dir
    assert run is not None
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["steps"] == 3


def test_a_killed_run_resumes(planted: str, tmp_path: Path) -> None:
    words = (*ALL, planted, "train.max_steps=6", "train.validate_every=2", "train.patience=null")

    def rewards(folder: Path) -> list[float]:
        (run,) = (file.parent for file in folder.glob("*/log.jsonl"))
        return [one["reward"] for one in _log(run)]

    whole = commands.run(*words, f"output_dir={tmp_path / 'whole'}", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    first = commands.Command(*words, f"output_dir={tmp_path / 'killed'}", folder=tmp_path)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("killed/*/checkpoints/checkpoint-2/manifest.json")) and time.monotonic() < until:
        time.sleep(0.05)
    first.signal(signal.SIGKILL)
    assert first.wait() != 0
    again = commands.run(*words, f"output_dir={tmp_path / 'killed'}", "resume=true", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resum" in again.stdout + again.stderr
    assert len(rewards(tmp_path / "whole")) == 6
    assert rewards(tmp_path / "killed") == pytest.approx(rewards(tmp_path / "whole"), abs=1e-4)


def test_a_reward_is_the_score_of_the_label_after_the_thought(planted: str, config: Compose, tokenizer: Any) -> None:
    cfg = config(*ALL, planted)
    data, model = tokenized.build(cfg, dataset.load(cfg.data), tokenizer), small(vocabulary=len(tokenizer))
    written = ["涨</think>", "跌跌", "</think>", f"涨停{tokenizer.eos_token}"]
    completions = [tokenizer(text)["input_ids"] for text in written]
    rows, prompts = [0, 1, 2, 0], data.prompts("train")
    label, form = grpo.rewards(cfg, data, model, [data.renderer.end])
    found = label(completion_ids=completions, row=rows)
    assert form(completion_ids=completions, row=rows) == [1, 0, 1, 0]
    tails = [
        "<think>\n涨\n</think>\n\n",
        "<think>\n跌跌\n</think>\n\n",
        "<think>\n\n</think>\n\n",
        "<think>\n涨停\n</think>\n\n",
    ]
    texts = [data.texts("train")[row] for row in rows]
    whole = [f"文本：{text}\n情感分类：{tail}" for text, tail in zip(texts, tails, strict=True)]
    closed = LabelScorer(model, data.renderer, 10_000)
    scores = closed.score([tokenizer(text)["input_ids"] for text in whole])
    true = np.array([data.gold("train")[row] for row in rows])
    expected = scores[np.arange(4), true] - np.logaddexp.reduce(scores, axis=1)
    assert found == pytest.approx(expected.tolist(), abs=2e-2)  # the parts of a prompt are tokenized separately
    assert [len(prompt) for prompt in prompts[:3]]
    right, _ = grpo.rewards(config(*ALL, planted, "method.grpo.reward=correct"), data, model, [data.renderer.end])
    assert right(completion_ids=completions, row=rows) == (scores.argmax(axis=1) == true).astype(float).tolist()


def test_a_thought_ends_with_its_mark(planted: str, config: Compose, tokenizer: Any, monkeypatch: Any) -> None:
    trainer = object.__new__(grpo.ThoughtTrainer)
    trainer.tokenizer, trainer.close = tokenizer, "</think>"
    made = [tokenizer(text)["input_ids"] for text in ("涨</think>利好", "涨利好", "</think>")]
    logs = [[0.5] * len(ids) for ids in made]
    monkeypatch.setattr(grpo.GRPOTrainer, "_generate_single_turn", lambda *_, **__: (made, logs))
    ids, kept = trainer._generate_single_turn([])
    assert [tokenizer.decode(row) for row in ids] == ["涨</think>", "涨利好", "</think>"]
    assert [*map(len, kept)] == [*map(len, ids)]
