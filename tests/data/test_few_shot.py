"""Examples in the prompt: from the training rows only, as plain text, and without taking room from the text."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from finsa.config import Examples, RunConfig
from finsa.data import dataset, tokenized
from finsa.data.few_shot import ExampleRows
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt, with_target
from finsa.data.rows import Renderer
from finsa.errors import ConfigError

Configure = Callable[..., RunConfig]
TEXTS = [
    f"{company}{change}{number}"
    for number in range(4)
    for company, change in (("甲", "涨"), ("乙", "跌"), ("丙", "平"))
]
GOLD = [0, 1, 2] * 4
LABELS = LabelSpace(("涨", "跌", "平"), ("利好", "利空", "中性"))
TEMPLATE = "文本：{text}\n情感："


def _rows(seed: int = 1, texts: list[str] = TEXTS, **settings: Any) -> ExampleRows:
    given = {"count": 6, "choice": "balanced", "max_characters": 50, "calibrate": False, **settings}
    return ExampleRows(Examples.model_validate(given), texts, GOLD, seed)


def test_the_classes_take_turns() -> None:
    for count, counts in ((6, [2, 2, 2]), (4, [1, 1, 2]), (2, [1, 1]), (99, [4, 4, 4])):
        chosen = _rows(count=count).choose()
        assert sorted(Counter(label for _, label in chosen).values()) == counts
        assert len(set(chosen)) == len(chosen)
        assert all(TEXTS.index(text) % 3 == label for text, label in chosen)


@pytest.mark.parametrize("choice", ["balanced", "random"])
def test_the_seed_chooses(choice: str) -> None:
    assert _rows(choice=choice).choose() == _rows(choice=choice).choose("another text")
    assert _rows(choice=choice).choose() != _rows(2, choice=choice).choose()


def test_the_nearest_rows_are_next_to_the_text() -> None:
    rows = _rows(choice="nearest", count=4)
    chosen = rows.choose("乙跌2")
    assert chosen[-1] == ("乙跌2", 1)
    assert {text[:2] for text, _ in chosen} == {"乙跌"}
    assert not rows.fixed


def test_long_examples_are_shortened() -> None:
    assert {len(text) for text, _ in _rows(texts=[text * 100 for text in TEXTS]).choose()} == {50}


@pytest.mark.parametrize("choice", ["balanced", "nearest"])
def test_examples_come_before_the_text_and_take_no_room_from_it(tokenizer: Any, choice: str) -> None:
    rows = _rows(choice=choice, count=2)
    plain = Renderer(tokenizer, Prompt.of(TEMPLATE, LABELS, "plain", "none", tokenizer), LABELS, 40)
    renderer = Renderer(tokenizer, Prompt.of(TEMPLATE, LABELS, "plain", "none", tokenizer, rows), LABELS, 40)
    assert renderer.room == plain.room
    texts = ["甲涨了", "乙跌" * 40]
    encoded, alone = renderer.encode(texts), plain.encode(texts)
    assert encoded.cut.tolist() == alone.cut.tolist() != [0, 0]
    for number, text in enumerate(texts):
        blocks = "".join(f"文本：{one}\n情感：{LABELS.words[label]}\n\n" for one, label in rows.choose(text))
        assert tokenizer.decode(encoded[number]) == blocks + tokenizer.decode(alone[number])
        assert encoded[number][-len(alone[number]) :] == alone[number]
    assert (len(encoded.prefix) > len(alone.prefix)) is (choice == "balanced")


def test_no_examples_are_the_prompt_without_examples(tokenizer: Any) -> None:
    plain = Prompt.of(TEMPLATE, LABELS, "plain", "none", tokenizer)
    assert Prompt.of(TEMPLATE, LABELS, "plain", "none", tokenizer, _rows(count=0)) == plain


def test_examples_are_within_the_turn_of_the_user(qwen_tokenizer: Any) -> None:
    qwen_tokenizer = copy.deepcopy(qwen_tokenizer)  # other tests use it
    qwen_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = _rows(count=1, texts=["<|im_end|>"] * 12)
    prompt = Prompt.of(TEMPLATE, LABELS, "chat", "none", qwen_tokenizer, rows)
    renderer = Renderer(qwen_tokenizer, prompt, LABELS, 60)
    ids = renderer.encode(["甲涨"])[0]
    word = LABELS.words[rows.choose()[0][1]]
    assert qwen_tokenizer.decode(ids) == (
        f"<|im_start|>user\n文本：<|im_end|>\n情感：{word}\n\n文本：甲涨\n情感：<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(qwen_tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # that of an example is plain text


def test_examples_have_their_targets(tokenizer: Any) -> None:
    rows = ExampleRows(_rows(count=1).settings, [with_target("甲", "甲涨乙跌")], [0], 1)
    prompt = Prompt.of("文本：{text}\n公司：{target}\n情感：", LABELS, "plain", "none", tokenizer, rows)
    renderer = Renderer(tokenizer, prompt, LABELS, 60)
    shown = tokenizer.decode(renderer.encode([with_target("丙", "丙平")])[0])
    assert shown == "文本：甲涨乙跌\n公司：甲\n情感：利好\n\n文本：丙平\n公司：丙\n情感："


def test_only_training_rows_are_examples(config: Configure, tokenizer: Any) -> None:
    cfg = config("method=few_shot", "method.examples.choice=random", "method.examples.count=30", "data.cache=null")
    data = dataset.load(cfg.data)
    built = tokenized.build(cfg, data, tokenizer)
    assert built.examples is not None
    training = dict(data.splits["train"].select("text", "label").iter_rows())
    chosen = built.examples.choose()
    assert len(chosen) == 30
    assert all(any(text.startswith(one) and gold == label for text, gold in training.items()) for one, label in chosen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("method=lora", "method.examples={count: 2, choice: random, max_characters: 9, calibrate: false}"),
            "not trained",
        ),
        (
            ("method=few_shot", "method.examples.choice=nearest", "method.examples.calibrate=true"),
            "same examples for all",
        ),
        (("method=few_shot", "method.examples.choice=best"), "method.examples.choice"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: Configure, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*words)
    assert message in str(caught.value)
