"""Generated answers: the published rules on answers like the published ones, and batches that equal single rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from base_models import small

from finsa.config.stages import Parsing
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import Encoded, Renderer
from finsa.evaluation import metrics
from finsa.evaluation.audit import parse
from finsa.inference.generation import Generator
from finsa.runs import processes

POLES = ("negative", "neutral", "positive")
OPTIONS = ("A", "B", "C", "D", "E")


@pytest.mark.parametrize(
    ("rule", "answer", "label"),
    [
        ("aidf", " Positive\n新闻", "positive"),
        ("aidf", "neutral。因为", "neutral"),
        ("aidf", "positive news", None),
        ("aidf", "", None),
        ("finllm", "The answer is NEGATIVE", "negative"),
        ("finllm", "not negative but positive", "positive"),  # positive is what the published code looks for first
        ("finllm", "unclear", None),
    ],
)
def test_a_polarity_is_parsed_by_the_published_rule(rule: Parsing, answer: str, label: str | None) -> None:
    found = parse(answer, POLES, rule)
    assert (None if found is None else POLES[found]) == label


@pytest.mark.parametrize(
    ("answer", "loose", "strict", "last"),
    [
        ("B", "B", "B", "B"),
        (" C\n", "C", "C", "C"),
        ("选项D：大盘", "D", None, "D"),
        ("A，因为不是B", None, None, "B"),
        ("G", None, None, None),
        ("没有答案", None, None, None),
    ],
)
def test_a_letter_is_parsed_by_three_rules(
    answer: str, loose: str | None, strict: str | None, last: str | None
) -> None:
    rules: tuple[Parsing, ...] = ("letter", "letter_strict", "letter_last")
    found = [parse(answer, OPTIONS, rule) for rule in rules]
    assert [None if number is None else OPTIONS[number] for number in found] == [loose, strict, last]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("<think>\nIt is not positive.\n</think>\n\nnegative", "negative"),
        ("Not positive.\n</think>\n\nnegative", "negative"),  # the prompt opened the block
        ("<think>\npositive or negative", None),  # a thought that did not end names nothing
    ],
)
def test_a_label_in_a_thought_does_not_count(answer: str, label: str | None) -> None:
    for rule in ("aidf", "finllm"):
        found = parse(answer, POLES, rule)  # type: ignore[arg-type]
        assert (None if found is None else POLES[found]) == label
    letter = answer.replace("positive", "A").replace("negative", "B")
    assert parse(letter, OPTIONS, "letter_last") == (None if label is None else 1)


def test_a_think_block_opened_by_the_prompt_is_part_of_the_answer(tokenizer: Any) -> None:
    labels = LabelSpace(("利空", "利好"), ("利空", "利好"))
    model, texts = small(vocabulary=len(tokenizer)), ["公司大涨", "亏损"]
    found = []
    for tail in ("\n<think>\n", "\n<think>\n</think>\n"):
        renderer = Renderer(tokenizer, Prompt("文本：", tail), labels, 60)
        found.append(Generator(model, renderer, 10_000, 6)(renderer.encode(texts)))
    assert [[answer.startswith("<think>") for answer in answers] for answers in found] == [[True] * 2, [False] * 2]
    assert [parse(answer, labels.words, "finllm") for answer in found[0]] == [None, None]


def test_an_answer_without_a_label_is_wrong_and_counted_separately() -> None:
    gold, parsed = [0, 0, 1, 1, 2, 2], [0, None, 1, None, 2, None]
    report = metrics.report_parsed(gold, parsed, POLES)
    assert report["unparsable"] == dict.fromkeys(POLES, 1)
    assert report["accuracy"] == 0.5
    assert report["macro_f1"] == pytest.approx(2 / 3)
    assert sum(map(sum, report["confusion"])) == 3
    low, high = report["intervals"]["macro_f1"]
    assert low < 2 / 3 < high


def test_only_unparsable_answers_are_not_an_error() -> None:
    report = metrics.report_parsed([0, 1, 2], [None] * 3, POLES)
    assert (report["accuracy"], report["macro_f1"], sum(report["unparsable"].values())) == (0, 0, 3)


def test_without_unparsable_answers_the_report_is_unchanged() -> None:
    gold, parsed = [0, 0, 1, 2, 2], [0, 1, 1, 2, 0]
    found, plain = metrics.report_parsed(gold, parsed, POLES), metrics.report(gold, parsed, POLES)
    assert {key: found[key] for key in plain if key != "intervals"} == {
        key: plain[key] for key in plain if key != "intervals"
    }


def test_a_padded_batch_generates_what_each_row_generates_alone(tokenizer: Any) -> None:
    model = small(vocabulary=len(tokenizer))
    renderer, prompts = _asked(tokenizer)
    together = Generator(model, renderer, 10_000, 6)(prompts)
    for number in range(len(prompts)):
        ids = torch.tensor([prompts[number]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        alone = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert together[number] == alone


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_two_processes_share_the_prompts_and_have_all_answers(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    renderer, prompts = _asked(tokenizer)
    generate = Generator(small(vocabulary=len(tokenizer)), renderer, batch_tokens, 6)
    alone, parts = generate(prompts), list[Any]()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(processes, "all_reduce", lambda own: parts.append(own) or own)
        generate(prompts)
    assert [len(np.flatnonzero(part.any(axis=1))) for part in parts] == ([2, 2] if batch_tokens == 1 else [4, 0])
    monkeypatch.setattr(processes, "all_reduce", lambda own: sum(parts))
    assert generate(prompts) == alone


def _asked(tokenizer: Any) -> tuple[Renderer, Encoded]:
    labels = LabelSpace(("利空", "利好"), ("利空", "利好"))
    renderer = Renderer(tokenizer, Prompt("文本：", "\n情感："), labels, 60)
    return renderer, renderer.encode(["公司大涨", "亏损" * 9, "", "会议 ABC 12"])
