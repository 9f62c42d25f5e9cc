"""Thoughts before an answer: what they are, how they are drawn, and what scoring after them equals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from base_models import small
from transformers import GenerationConfig

from finsa.config import Thought
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import IGNORE, Renderer
from finsa.inference import thinking
from finsa.inference.scoring import LabelScorer, ThinkingScorer, mean_over_thoughts, thought_costs
from finsa.inference.thinking import Closing, Sampler, ThoughtWriter

LABELS = LabelSpace(("利空", "中性", "利好"), ("利空", "中性", "利好"))
MARKS = ("<think>", "</think>")
TEXTS = ["公司大涨", "亏损扩大，股价下跌，公告称前景不明", "平"]
GREEDY = Thought(marks=MARKS, max_tokens=6, samples=1, temperature=0.0, top_p=1.0)
DRAWN = Thought(marks=MARKS, max_tokens=6, samples=3, temperature=1.0, top_p=0.95)


def _renderer(tokenizer: Any, think: str) -> Renderer:
    prompt = Prompt.of("文本：{text}\n情感：", LABELS, "plain", think, tokenizer, marks=MARKS)
    return Renderer(tokenizer, prompt, LABELS, 80)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return small(vocabulary=len(tokenizer))


def test_an_empty_thought_is_a_closed_block(tokenizer: Any, model: Any) -> None:
    opened, closed = _renderer(tokenizer, "open"), _renderer(tokenizer, "closed")
    assert opened.room == closed.room
    empty = ThinkingScorer(model, opened, 10_000, GREEDY.model_copy(update={"max_tokens": 0}), 1)
    assert np.array_equal(empty(TEXTS), LabelScorer(model, closed, 10_000).score([*closed.encode(TEXTS)]))
    assert thought_costs(empty) == {"thought_tokens": 0, "thoughts_cut": 0}


def test_the_probabilities_of_a_text_are_the_mean_over_its_thoughts(tokenizer: Any, model: Any) -> None:
    renderer = _renderer(tokenizer, "open")
    several = ThinkingScorer(model, renderer, 10_000, DRAWN, 1)
    log_probs = several(TEXTS)
    plain, prompts = LabelScorer(model, renderer, 10_000), renderer.encode(TEXTS)
    assert several.thoughts is not None
    assert len({thought.text for row in several.thoughts for thought in row}) == 9
    single = np.stack(
        [
            plain.score(
                [
                    [*prompt, *renderer.thought_ids(row[k].text, 6), *tokenizer("\n</think>\n\n")["input_ids"]]
                    for prompt, row in zip(prompts, several.thoughts, strict=True)
                ]
            )
            for k in range(3)
        ]
    )
    probs = np.exp(single) / np.exp(single).sum(axis=-1, keepdims=True)
    found = np.exp(log_probs)
    assert found / found.sum(axis=1, keepdims=True) == pytest.approx(probs.mean(axis=0), abs=1e-6)
    assert found.sum(axis=1) == pytest.approx(np.exp(single).sum(axis=-1).mean(axis=0), rel=1e-5)
    first = ThinkingScorer(model, renderer, 10_000, DRAWN.model_copy(update={"samples": 1}), 1)
    assert first(TEXTS) == pytest.approx(single[0], abs=1e-5)
    assert [[row[0]] for row in several.thoughts] == first.thoughts


def test_the_mean_of_equal_thoughts_is_the_thought() -> None:
    scores = np.log([[[0.1, 0.2, 0.3], [1e-9, 2e-9, 0.5]]])
    assert mean_over_thoughts(np.concatenate([scores] * 4)) == pytest.approx(scores[0])
    assert mean_over_thoughts(scores) is not scores
    assert np.array_equal(mean_over_thoughts(scores), scores[0])


def test_batched_thoughts_are_those_of_single_rows(tokenizer: Any, model: Any) -> None:
    renderer = _renderer(tokenizer, "open")
    prompts = renderer.encode(TEXTS)
    greedy = ThoughtWriter(model, renderer, 10_000, GREEDY, 1)(prompts)
    config = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=renderer.end, pad_token_id=renderer.end)
    for prompt, (thought,) in zip(prompts, greedy, strict=True):
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
        assert thought == thinking.read(made.tolist(), renderer, [renderer.end], 6)
    writer = ThoughtWriter(model, renderer, 10_000, DRAWN, 1)
    together = writer(prompts)
    assert (
        together == [writer([prompt])[0] for prompt in prompts] == ThoughtWriter(model, renderer, 1, DRAWN, 1)(prompts)
    )
    assert together != ThoughtWriter(model, renderer, 10_000, DRAWN, 2)(prompts)


def test_a_batch_that_runs_out_of_memory_is_halved(tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = _renderer(tokenizer, "open")
    writer = ThoughtWriter(model, renderer, 10_000, DRAWN, 1)
    expected, whole = writer(renderer.encode(TEXTS)), writer._batch

    def short(prompts: Any, sample: int) -> list[list[int]]:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(prompts, sample)

    monkeypatch.setattr(writer, "_batch", short)
    assert writer(renderer.encode(TEXTS)) == expected


def test_tokens_are_drawn_with_their_probability() -> None:
    scores = torch.log(torch.tensor([0.05, 0.5, 0.0, 0.3, 0.15]))
    draws = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    ids = torch.zeros(1000, 4, dtype=torch.long)

    def shares(temperature: float, top_p: float) -> list[float]:
        settings = DRAWN.model_copy(update={"temperature": temperature, "top_p": top_p})
        found = Sampler(draws, 4, settings)(ids, scores.expand(1000, -1)).argmax(-1)
        return [float((found == token).double().mean()) for token in range(5)]

    assert shares(1.0, 1.0) == pytest.approx([0.05, 0.5, 0, 0.3, 0.15], abs=2e-3)
    assert shares(1.0, 0.7) == pytest.approx([0, 0.625, 0, 0.375, 0], abs=2e-3)  # 0.5 alone is less than 0.7
    squared = np.array([0.05, 0.5, 0, 0.3, 0.15]) ** 2
    assert shares(0.5, 1.0) == pytest.approx((squared / squared.sum()).tolist(), abs=2e-3)


@pytest.mark.parametrize(
    ("written", "text", "closed", "cut"),
    [
        ("先看利润\n</think>\n\n利好", "先看利润", True, False),
        (" 先看</think>ENDx", "先看", True, False),
        ("先看END</think>", "先看", False, False),
        ("先看利润增长", "先看利润增长", False, True),
    ],
)
def test_a_thought_ends_at_its_mark_or_at_the_end(
    tokenizer: Any, written: str, text: str, closed: bool, cut: bool
) -> None:
    renderer = _renderer(tokenizer, "open")
    ids = tokenizer(written.replace("END", tokenizer.eos_token))["input_ids"]
    thought = thinking.read(ids, renderer, [renderer.end], len(ids))
    assert (thought.text, thought.closed, thought.cut) == (text, closed, cut)


def test_a_mark_of_several_tokens_stops_the_row_that_wrote_it(tokenizer: Any) -> None:
    closing = Closing(tokenizer, "</think>", 2)
    for written, ended in (("想</think", False), ("想</think>", True), ("想想</think>", True)):
        ids = torch.tensor([[5, 5, *tokenizer(written)["input_ids"]]])
        assert closing(ids, None).tolist() == [ended]
    prompt = torch.tensor([tokenizer("</think>")["input_ids"]])
    assert Closing(tokenizer, "</think>", prompt.shape[1])(prompt, None).tolist() == [False]  # of the prompt


def test_a_rationale_is_trained_and_an_empty_one_is_part_of_the_prompt(tokenizer: Any) -> None:
    renderer = _renderer(tokenizer, "open")
    (prompt,) = renderer.encode(TEXTS[:1])
    thought = renderer.thought_ids("先看利润", 20)
    row = renderer.row(prompt, 2, "response", thought)
    after = [*thought, *renderer.thought_end, *renderer.answers[2], renderer.end]
    assert row["labels"] == [*[IGNORE] * len(prompt), *after]
    assert row["input_ids"] == [*prompt, *after]
    assert tokenizer.decode(row["input_ids"]).endswith(
        f"情感：<think>\n先看利润\n</think>\n\n利好{tokenizer.eos_token}"
    )
    empty, closed = renderer.row(prompt, 2, "response", []), _renderer(tokenizer, "closed")
    assert empty == closed.row(closed.encode(TEXTS[:1])[0], 2, "response")
    assert renderer.thought_ids("先看利润</think>", 2) == thought[:2]
    assert len(renderer.thought_ids("</think>", 20)) > 0
