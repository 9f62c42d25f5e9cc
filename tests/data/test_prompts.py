"""A template becomes exactly one head and one tail; the tail ends where the answer starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from finsa.config import RunConfig
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt, mismatch
from finsa.errors import ConfigError

Configure = Callable[..., RunConfig]
LABELS = LabelSpace(("0", "1"), ("利空", "利好"))
# Endings as the tokenizers of these models ship them.
QWEN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = "<s>{% for m in messages %}<|User|>{{ m['content'] }}{% endfor %}" + (
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
GLM_Z1 = "[gMASK]<sop>{% for m in messages %}<|user|>\n{{ m['content'] }}{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)
TRIMMED = QWEN.replace("m['content']", "m['content'] | trim")


def _chat(tokenizer: Any, template: str | None) -> Any:
    copied = copy.copy(tokenizer)
    copied.chat_template = template
    return copied


def test_plain_template_is_taken_as_it_is() -> None:
    assert Prompt.of("问：{text}\n答：", LABELS, "plain", "none", None) == Prompt("问：", "\n答：")


def test_text_may_stand_at_either_end() -> None:
    assert Prompt.of("{text}", LABELS, "plain", "none", None) == Prompt("", "")


def test_label_words_are_filled_in() -> None:
    assert Prompt.of("（{labels}）{text}：", LABELS, "plain", "none", None) == Prompt("（利空 / 利好）", "：")
    assert Prompt.of("{text}（{labels}）：", LABELS, "plain", "none", None) == Prompt("", "（利空 / 利好）：")


def test_doubled_braces_are_braces_and_words_are_no_template() -> None:
    labels = LabelSpace(("0", "1"), ("{text}", "{{x}}"))
    assert Prompt.of('{{"a": 1}} {labels} {text}', labels, "plain", "none", None) == Prompt(
        '{"a": 1} {text} / {{x}} ', ""
    )


def test_aidf_prompt(config: Configure) -> None:
    template = config("data=aidf_news").data.prompt
    assert Prompt.of(template, LABELS, "plain", "none", None) == Prompt(
        "<|user|>\n新闻内容：",
        "\n请根据内容判断情绪（仅输出 positive / neutral / negative）：\n<|assistant|>\n这篇新闻的情绪是：",
    )


@pytest.mark.parametrize(
    ("template", "think", "head", "tail"),
    [
        (QWEN, "none", "<|im_start|>user\nA：", "。B<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN, "closed", "<|im_start|>user\nA：", "。B<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (TRIMMED, "none", "<|im_start|>user\nA：", "。B<|im_end|>\n<|im_start|>assistant\n"),
        (R1, "closed", "<s><|User|>A：", "。B<|Assistant|><think>\n\n</think>\n\n"),
        (GLM_Z1, "closed", "[gMASK]<sop><|user|>\nA：", "。B<|assistant|>\n<think>\n\n</think>\n\n"),
    ],
    ids=["qwen", "qwen3", "trimmed", "r1", "glm_z1"],
)
def test_chat_template(tokenizer: Any, template: str, think: str, head: str, tail: str) -> None:
    prompt = Prompt.of("A：{text}。B", LABELS, "chat", think, _chat(tokenizer, template))
    assert prompt == Prompt(head, tail)


@pytest.mark.parametrize("template", [QWEN, TRIMMED], ids=["as it is", "trimmed"])
def test_text_at_the_edge_of_a_message_survives_a_template_that_trims(tokenizer: Any, template: str) -> None:
    prompt = Prompt.of("{text}", LABELS, "chat", "none", _chat(tokenizer, template))
    assert prompt == Prompt("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def test_think_block_named_in_the_message_does_not_count_as_opened(tokenizer: Any) -> None:
    """Only what the template puts at the very end opens the block."""
    prompt = Prompt.of("不要写 <think>：{text}", LABELS, "chat", "closed", _chat(tokenizer, QWEN))
    assert prompt.tail == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_closed_block_named_in_the_message_does_not_hide_an_open_one(tokenizer: Any) -> None:
    prompt = Prompt.of("例：<think></think>：{text}", LABELS, "chat", "closed", _chat(tokenizer, R1))
    assert prompt.tail == "<|Assistant|><think>\n\n</think>\n\n"


def test_no_chat_template(tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Prompt.of("{text}", LABELS, "chat", "none", _chat(tokenizer, None))
    assert [(problem.path, problem.text) for problem in caught.value.problems] == [
        ("model.prompt", "this tokenizer has no chat template; set model.prompt=plain model.think=none")
    ]


def test_embedded_tokenizer_has_a_chat_template(tokenizer: Any) -> None:
    prompt = Prompt.of("A{text}B", LABELS, "chat", "none", tokenizer)
    assert prompt == Prompt("<|im_start|>user\nA", "B<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("labels", "fits"),
    [
        (["查询余额", "转账", "开户"], False),
        (["transfer", "balance"], False),
        (["利空", "中性", "利好"], True),
        (["positive", "other"], True),
        (["-1", "0", "1"], True),
        (["A", "B"], True),
    ],
)
def test_a_prompt_for_sentiments_does_not_go_with_intents_in_silence(
    config: Configure, labels: list[str], fits: bool
) -> None:
    said = mismatch(config("data=table", "data.files=x.csv").data.prompt, labels)
    assert (said is None) == fits
    assert fits or str(said).startswith("data.prompt asks for the sentiment, which the labels do not name; for other")
    assert mismatch("判断类别（{labels}）：{text}", labels) is None
