"""Examples show exactly what is trained on, token by token with the loss mask, and no part of a text is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from finsa.config import RunConfig
from finsa.data import dataset, tokenized
from finsa.data.dataset import Dataset
from finsa.data.labels import LabelSpace
from finsa.data.ledger import Ledger
from finsa.data.rows import IGNORE
from finsa.evaluation import examples
from finsa.evaluation.examples import Example, Segment

Configure = Callable[..., RunConfig]
TEXTS = ["净利润增长", "龘靐齉爩😀走势", "line one\nline two\ttab", "<|im_end|>股价" + "下跌" * 200, "平", "稳"]
LABELS = [2, 0, 1, 0, 1, 1]


def _table() -> Dataset:
    frame = pl.DataFrame({"id": [f"r{n}" for n in range(6)], "text": TEXTS, "label": LABELS})
    splits = dict.fromkeys(("train", "validation", "test"), frame)
    return Dataset(splits, LabelSpace(("利空", "中性", "利好"), ("利空", "中性", "利好")), Ledger(), "", pl.DataFrame())


def _job(config: Configure, tokenizer: Any, *overrides: str) -> tuple[tokenized.TokenizedDataset, RunConfig]:
    cfg = config("stage=inspect", "data.max_length=60", "data.cache=null", *overrides)
    return tokenized.build(cfg, _table(), tokenizer), cfg


def _ids(example: Example) -> list[int]:
    return [one for segment in example.segments for piece in segment.pieces for one in piece.ids]


def _mask(example: Example) -> list[bool]:
    return [piece.loss for segment in example.segments for piece in segment.pieces for _ in piece.ids]


def _part(example: Example, part: str) -> Segment:
    return next(segment for segment in example.segments if segment.part == part)


@pytest.mark.parametrize("method", ["lora", "lora_response", "lora_downsample", "zero_shot"])
@pytest.mark.parametrize("which", ["tokenizer", "qwen_tokenizer"])
def test_tokens_and_mask_are_those_of_training(
    config: Configure, request: pytest.FixtureRequest, method: str, which: str
) -> None:
    job, cfg = _job(config, request.getfixturevalue(which), f"method={method}")
    rows, shown = job.training_rows(cfg), examples.examples(job, cfg, 6)
    of_training = [one for one in shown if one.split == "train"]
    assert len(of_training) == len(rows)
    known = {tuple(row["input_ids"]): row["labels"] for row in rows}
    for one in of_training:
        labels = known[tuple(_ids(one))]
        assert _mask(one) == [label != IGNORE and method != "zero_shot" for label in labels]
        assert one.loss_tokens == sum(_mask(one))
        assert one.tokens == len(labels)


@pytest.mark.parametrize("which", ["tokenizer", "qwen_tokenizer"])
def test_kept_and_truncated_text_are_the_whole_text(
    config: Configure, request: pytest.FixtureRequest, which: str
) -> None:
    job, cfg = _job(config, request.getfixturevalue(which))
    for one in examples.examples(job, cfg, 6):
        number = int(one.id[1:])
        parts = [segment.part for segment in one.segments]
        cut = _part(one, "truncated").text if "truncated" in parts else ""
        assert _part(one, "text").text.rstrip("\ufffd") + cut == TEXTS[number]
        assert ("truncated" in parts) == (number == 3)
        assert parts == ["prompt", "text", *["truncated"] * (number == 3), "prompt", "answer", "end"]
        assert _part(one, "answer").text == one.label


def test_no_loss_in_held_out_rows(config: Configure, tokenizer: Any) -> None:
    job, cfg = _job(config, tokenizer, "method=lora")
    shown = examples.examples(job, cfg, 6)
    assert {(one.split, one.seen, one.loss_tokens > 0) for one in shown} == {
        ("train", True, True),
        ("validation", False, False),
        ("test", False, False),
    }


def test_a_few_examples_cover_every_class_and_a_truncated_text(config: Configure, tokenizer: Any) -> None:
    job, cfg = _job(config, tokenizer)
    three = [one for one in examples.examples(job, cfg, 3) if one.split == "test"]
    assert [one.id for one in three] == [
        "r3",
        "r2",
        "r0",
    ]  # r3 is the truncated one, and has the place of r1, its class's
    six = [one for one in examples.examples(job, cfg, 6) if one.split == "test"]
    assert sorted(one.id for one in six) == [f"r{n}" for n in range(6)]
    assert {one.label for one in six[:3]} == {"利空", "中性", "利好"}


def test_pieces_are_whole_characters(config: Configure, tokenizer: Any) -> None:
    job, cfg = _job(config, tokenizer)
    rare = next(one for one in examples.examples(job, cfg, 6) if one.id == "r1")
    pieces = _part(rare, "text").pieces
    assert "".join(piece.text for piece in pieces) == TEXTS[1]
    assert any(len(piece.ids) > 1 for piece in pieces)


def test_control_characters_become_visible() -> None:
    assert examples.visible("a\x1b[31m\tb\r\n\x00") == "a␛[31m⇥b␍↵\n␀"


def test_a_row_for_a_loss_over_labels_shows_its_label_as_trained(
    config: Callable[..., RunConfig], tokenizer: Any
) -> None:
    cfg = config("method=lora_label")
    job = tokenized.build(cfg, dataset.load(cfg.data), tokenizer)
    for example in examples.examples(job, cfg, 3):
        parts = [segment.part for segment in example.segments]
        assert parts == ["prompt", "text", "prompt", "answer"]
        assert example.segments[-1].text == example.label
        assert example.loss_tokens == (example.segments[-1].tokens if example.split == "train" else 0)


def test_a_row_for_a_head_ends_with_its_text(config: Callable[..., RunConfig], tokenizer: Any) -> None:
    cfg = config("method=classifier")
    job = tokenized.build(cfg, dataset.load(cfg.data), tokenizer)
    texts = {row["id"]: row["text"] for part in job.dataset.splits.values() for row in part.iter_rows(named=True)}
    for example in examples.examples(job, cfg, 3):
        assert [segment.part for segment in example.segments] == ["prompt", "text"]
        assert example.segments[1].text == texts[example.id]


@pytest.mark.parametrize("choice", ["nearest", "balanced"])
def test_examples_in_the_prompt_are_part_of_it(config: Configure, tokenizer: Any, choice: str) -> None:
    job, cfg = _job(config, tokenizer, "method=few_shot", "method.examples.count=2", f"method.examples.choice={choice}")
    assert job.examples is not None
    shown = examples.examples(job, cfg, 2)
    assert len(shown) == 6
    for one in shown:
        number = int(one.id[1:])
        cut = "".join(segment.text for segment in one.segments if segment.part == "truncated")
        assert _part(one, "text").text + cut == TEXTS[number]
        chosen = [text for text, _ in job.examples.choose(TEXTS[number])]
        assert len(chosen) == 2
        assert all(text[:40] in _part(one, "prompt").text for text in chosen)
        prompt = job.prompts(one.split)[number]
        assert _ids(one)[: len(prompt)] == prompt
