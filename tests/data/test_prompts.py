"""A template becomes exactly one prefix and one suffix; the suffix ends where the answer starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finsa.config import RunConfig
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt, ThoughtMarks, mismatch, without_thoughts
from finsa.data.rows import IGNORE, Renderer
from finsa.errors import ConfigError

Configure = Callable[..., RunConfig]
TURN = "<|im_end|>\n<|im_start|>assistant\n"
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
# Hybrid: thinks unless that is switched off; the last answer of a conversation stands behind an empty block.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SWITCHED_OFF = QWEN + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"  # small models of Qwen3.5
GLM45 = (  # the switch also marks the message, and an answer begins on a new line
    "[gMASK]<sop>{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}"
    "{% if enable_thinking is defined and not enable_thinking %}/nothink{% endif %}"
    "{% else %}<|assistant|>\n<think></think>\n{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}{{ '\\n' }}<think></think>{% endif %}"
    "{% endif %}"
)
GLM4 = (  # the line end before an answer is left to the model
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}|" + QWEN
TRIMMED = QWEN.replace("m['content']", "m['content'] | trim")


def _chat(tokenizer: Any, template: str | None) -> Any:
    copied = copy.copy(tokenizer)
    copied.chat_template = template
    return copied


def test_a_plain_template_is_used_unchanged() -> None:
    assert Prompt.of("问：{text}\n答：", LABELS, "plain", "none", None) == Prompt("问：", "\n答：")


def test_text_may_be_at_either_end() -> None:
    assert Prompt.of("{text}", LABELS, "plain", "none", None) == Prompt("", "")


def test_label_words_are_filled_in() -> None:
    assert Prompt.of("（{labels}）{text}：", LABELS, "plain", "none", None) == Prompt("（利空 / 利好）", "：")
    assert Prompt.of("{text}（{labels}）：", LABELS, "plain", "none", None) == Prompt("", "（利空 / 利好）：")


def test_doubled_braces_are_literal_and_label_words_are_not_templates() -> None:
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
    ("template", "think", "prefix", "suffix"),
    [
        (QWEN, "none", "<|im_start|>user\nA：", "。B<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN, "closed", "<|im_start|>user\nA：", "。B<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (TRIMMED, "none", "<|im_start|>user\nA：", "。B<|im_end|>\n<|im_start|>assistant\n"),
        (R1, "closed", "<s><|User|>A：", "。B<|Assistant|><think>\n\n</think>\n\n"),
        (GLM_Z1, "closed", "[gMASK]<sop><|user|>\nA：", "。B<|assistant|>\n<think>\n\n</think>\n\n"),
        (QWEN3, "none", "<|im_start|>user\nA：", "。B<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN3, "closed", "<|im_start|>user\nA：", "。B<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        *(
            (SWITCHED_OFF, think, "<|im_start|>user\nA：", f"。B{TURN}<think>\n\n</think>\n\n")
            for think in ("none", "closed")
        ),
        (GLM4, "none", "[gMASK]<sop><|user|>\nA：", "。B<|assistant|>\n"),
        (GLM45, "closed", "[gMASK]<sop><|user|>\nA：", "。B/nothink<|assistant|>\n<think></think>\n"),
        (DATED, "none", "26 Jul 2024|<|im_start|>user\nA：", f"。B{TURN}"),
    ],
    ids=[
        *(
            "qwen",
            "without a switch",
            "trimmed",
            "r1",
            "glm_z1",
            "qwen3 thinks",
            "qwen3 does not",
            "off",
            "off, closed",
        ),
        *("glm4", "glm4.5", "llama 3.2's date"),
    ],
)
def test_chat_template(tokenizer: Any, template: str, think: str, prefix: str, suffix: str) -> None:
    prompt = Prompt.of("A：{text}。B", LABELS, "chat", think, _chat(tokenizer, template))
    assert prompt == Prompt(prefix, suffix)


@pytest.mark.parametrize(
    ("template", "prefix", "suffix"),
    [
        (R1, "<s><|User|>A：", "。B<|Assistant|><think>\n"),
        (GLM_Z1, "[gMASK]<sop><|user|>\nA：", "。B<|assistant|>\n<think>\n"),
        (QWEN3, "<|im_start|>user\nA：", f"。B{TURN}<think>\n"),
        (GLM45, "[gMASK]<sop><|user|>\nA：", "。B<|assistant|><think>\n"),
    ],
    ids=["r1", "glm_z1", "qwen3", "glm4.5"],
)
def test_a_prompt_ends_where_the_thought_starts(tokenizer: Any, template: str, prefix: str, suffix: str) -> None:
    prompt = Prompt.of("A：{text}。B", LABELS, "chat", "open", _chat(tokenizer, template))
    assert (prompt.prefix, prompt.suffix) == (prefix, suffix)
    assert prompt.thought == ThoughtMarks("</think>", "\n</think>\n\n", f"{suffix}\n</think>\n\n")
    if template in (R1, GLM_Z1, QWEN3):  # the switch of GLM-4.5 also marks the message
        closed = Prompt.of("A：{text}。B", LABELS, "chat", "closed", _chat(tokenizer, template))
        assert closed.suffix == prompt.thought.empty


@pytest.mark.parametrize("template", [QWEN, SWITCHED_OFF], ids=["no mark", "always closed"])
def test_a_template_without_thoughts_needs_marks(tokenizer: Any, template: str) -> None:
    with pytest.raises(ConfigError) as found:
        Prompt.of("A：{text}。B", LABELS, "chat", "open", _chat(tokenizer, template))
    assert found.value.problems[0].path == "model.think=open"
    assert "\"model.thought.marks=['<think>','</think>']\"" in found.value.problems[0].text
    marks = ("Reasoning:", "Label:")
    prompt = Prompt.of("A：{text}。B", LABELS, "chat", "open", _chat(tokenizer, QWEN), marks=marks)
    assert prompt.suffix == f"。B{TURN}Reasoning:\n"
    plain = Prompt.of("A：{text}。B", LABELS, "plain", "open", None, marks=marks)
    assert (plain.suffix, plain.thought) == (
        "。BReasoning:\n",
        ThoughtMarks("Label:", "\nLabel:\n\n", "。BReasoning:\n\nLabel:\n\n"),
    )
    closed = Prompt.of("A：{text}。B", LABELS, "plain", "closed", None, marks=marks)
    assert closed.suffix == plain.thought.empty


@pytest.mark.parametrize("template", [QWEN, TRIMMED], ids=["as it is", "trimmed"])
def test_text_at_the_edge_of_a_message_survives_a_template_that_trims(tokenizer: Any, template: str) -> None:
    prompt = Prompt.of("{text}", LABELS, "chat", "none", _chat(tokenizer, template))
    assert prompt == Prompt("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def test_think_block_named_in_the_message_does_not_count_as_opened(tokenizer: Any) -> None:
    """Only a tag that the template puts at the very end opens the block."""
    prompt = Prompt.of("不要写 <think>：{text}", LABELS, "chat", "closed", _chat(tokenizer, QWEN))
    assert prompt.suffix == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_closed_block_named_in_the_message_does_not_hide_an_open_one(tokenizer: Any) -> None:
    prompt = Prompt.of("例：<think></think>：{text}", LABELS, "chat", "closed", _chat(tokenizer, R1))
    assert prompt.suffix == "<|Assistant|><think>\n\n</think>\n\n"


def test_the_row_of_a_hybrid_model_is_the_conversation_of_its_template(tokenizer: Any) -> None:
    ended = copy.deepcopy(_chat(tokenizer, QWEN3))  # a shallow copy shares the special tokens
    ended.eos_token = "<|im_end|>"
    _require_the_same_tokens(ended)


@pytest.mark.real_data
def test_the_label_of_qwen3_follows_the_closed_block(qwen_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])  # as in Qwen3's vocabulary: tokens, and not special
    tokenizer.chat_template, tokenizer.eos_token = QWEN3, "<|im_end|>"
    prompt, answer = _require_the_same_tokens(tokenizer)
    opened, closed = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert prompt[-4:] == [opened, 271, closed, 271]  # 271: two line ends
    assert tokenizer.convert_ids_to_tokens(answer)[-1] == "<|im_end|>"
    assert tokenizer.decode(answer[:-1]) == "利好"
    labels = LabelSpace(("0",), ("利好",))
    renderer = Renderer(tokenizer, Prompt.of("{text}", labels, "chat", "closed", tokenizer), labels, 200)
    assert renderer.encode(["想 <think> 了"])[0].count(opened) == 1  # a mark in a text is characters


def _require_the_same_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Check a prompt and a training row against the rendered template; return the prompt and its continuation."""
    asked = "A：{text}。B"
    renderer = Renderer(tokenizer, Prompt.of(asked, LABELS, "chat", "closed", tokenizer), LABELS, 200)
    turns = [{"role": "user", "content": asked.format(text="公司大涨")}, {"role": "assistant", "content": "利好"}]
    prompt = renderer.encode(["公司大涨"])[0]
    settings = {"add_generation_prompt": True, "enable_thinking": False}
    assert prompt == tokenizer.apply_chat_template(turns[:1], **settings)["input_ids"]
    row = renderer.row(prompt, 1, "response")
    end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert [*row["input_ids"], *end] == tokenizer.apply_chat_template(turns)["input_ids"]
    assert row["labels"] == [IGNORE] * len(prompt) + row["input_ids"][len(prompt) :]
    return prompt, row["input_ids"][len(prompt) :]


def test_models_that_think_are_known(project: Path) -> None:
    """By the published templates: Qwen3 is hybrid, R1 and GLM-Z1 open a block; Qwen3-4B-Instruct-2507 does neither."""
    files = sorted((project / "conf" / "model").glob("*.yaml"))
    assert len(files) > 20
    found = {file.stem for file in files if yaml.safe_load(file.read_text(encoding="utf-8")).get("think") == "closed"}
    hybrid = {"qwen3_0_6b", "qwen3_1_7b", "qwen3_4b", "qwen3_8b"}
    assert found == hybrid | {"r1_distill_1_5b", "r1_distill_qwen_7b", "glm9b"}


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>\n先想\n</think>\n\n涨", "涨"),
        ("<think></think>涨<THINK>x</THINK>停", "涨停"),
        ("先想</think>\n涨", "涨"),
        ("涨\n<think>再想", "涨"),
        ("<think>想不完", ""),
        (" 涨 < think ", "涨 < think"),
    ],
)
def test_thoughts_are_stripped(text: str, rest: str) -> None:
    assert without_thoughts(text) == rest


def test_a_template_that_cannot_render_is_one_message(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"chat template cannot render a user's message \(no users here\); set model"):
        Prompt.of("{text}", LABELS, "chat", "none", _chat(tokenizer, "{{ raise_exception('no users here') }}"))


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
def test_a_sentiment_prompt_with_intent_labels_is_reported(config: Configure, labels: list[str], fits: bool) -> None:
    said = mismatch(config("data=table", "data.files=x.csv").data.prompt, labels)
    assert (said is None) == fits
    assert fits or str(said).startswith("data.prompt asks for the sentiment, which the labels do not name; for other")
    assert mismatch("判断类别（{labels}）：{text}", labels) is None
