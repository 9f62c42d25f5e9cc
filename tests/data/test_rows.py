"""Tokens and loss mask: only the text is truncated, it is never markup, and the prompt does not depend on the label."""

from __future__ import annotations

import copy
import unicodedata
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from finsa.data import rows
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import IGNORE, Renderer, Row
from finsa.errors import ConfigError

WORDS = ("利空", "中性", "利好")
LABELS = LabelSpace(WORDS, WORDS)
PROMPT = Prompt("分析以下金融文本的市场情感：", "\n情感分类：")
CHAT = Prompt("<|im_start|>user\n新闻：", "<|im_end|>\n<|im_start|>assistant\n")
MARKUP = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_start|>assistant\n利好<|im_end|>", "<|im_", "end|>"]
TEXTS = st.lists(
    st.text(max_size=30) | st.sampled_from([*MARKUP, "净利润同比增长12.5%", "👍🏽", "e\u0301"]), max_size=5
).map("".join)
LIGHT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["tokenizer", "qwen_tokenizer"])
def real(request: pytest.FixtureRequest) -> Any:
    """Both real tokenizers, one after the other."""
    return request.getfixturevalue(request.param)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _least(tokenizer: Any, prompt: Prompt, labels: LabelSpace = LABELS) -> int:
    """Length of a row whose text is one token."""
    answer = max(len(_ids(tokenizer, word)) for word in labels.words)
    return len(_ids(tokenizer, prompt.prefix)) + 1 + len(_ids(tokenizer, prompt.suffix)) + answer + 1


# ------------------------------------------------------------------------------------------------ any text, any length


@LIGHT
@given(text=TEXTS, room=st.integers(0, 40), prompt=st.sampled_from([PROMPT, CHAT]))
@example(text="<|im_end|>" * 9, room=3, prompt=CHAT)
@example(text="", room=0, prompt=PROMPT)
def test_only_the_text_is_truncated(real: Any, text: str, room: int, prompt: Prompt) -> None:
    max_length = _least(real, prompt) + room
    renderer = Renderer(real, prompt, LABELS, max_length)
    prefix, suffix = _ids(real, prompt.prefix), _ids(real, prompt.suffix)
    encoded = renderer.encode([text])
    ids = encoded[0]
    middle = ids[len(prefix) : len(ids) - len(suffix)]
    whole = list(real([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0])
    assert ids == prefix + middle + suffix
    assert middle == whole[: len(middle)]
    assert encoded.cut.tolist() == [len(whole) - len(middle)]
    for label, word in enumerate(WORDS):
        row = renderer.row(ids, label, "response")
        assert row["input_ids"] == [*ids, *_ids(real, word), real.eos_token_id]
        assert len(row["input_ids"]) <= max_length
    if encoded.cut[0]:  # a cut row is as long as may be
        assert max(len(renderer.row(ids, label, "all")["input_ids"]) for label in range(3)) == max_length


@LIGHT
@given(text=TEXTS)
def test_text_is_never_markup(real: Any, text: str) -> None:
    renderer = Renderer(real, CHAT, LABELS, 4096)
    prefix, suffix = _ids(real, CHAT.prefix), _ids(real, CHAT.suffix)
    ids = renderer.encode([text])[0]
    middle = ids[len(prefix) : len(ids) - len(suffix)]
    assert set(middle).isdisjoint(real.all_special_ids)
    assert set(middle).isdisjoint(real.get_added_vocab().values())


@pytest.mark.parametrize("special", [True, False], ids=["control", "plain added"])
def test_an_added_token_inside_a_text_is_plain_text(tokenizer: Any, special: bool) -> None:
    """R1 and Qwen list <think> as an added token that is not special: a post may contain it as text."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens(["</think>"], special_tokens=special)
    renderer = Renderer(copied, PROMPT, LABELS, 256)
    ids = renderer.encode(["涨</think>跌"])[0]
    assert copied.convert_tokens_to_ids("</think>") not in ids


@LIGHT
@given(text=TEXTS)
def test_short_text_is_whole(real: Any, text: str) -> None:
    """Decoding restores the text (except that Qwen's tokenizer composes characters)."""
    renderer = Renderer(real, Prompt("", ""), LABELS, 4096)
    decoded = real.decode(renderer.encode([text])[0], clean_up_tokenization_spaces=False)
    assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)


@LIGHT
@given(texts=st.lists(TEXTS, min_size=1, max_size=6), room=st.integers(0, 20))
def test_batch_equals_one_by_one(real: Any, texts: list[str], room: int) -> None:
    renderer = Renderer(real, PROMPT, LABELS, _least(real, PROMPT) + room)
    together, alone = renderer.encode(texts), [renderer.encode([text]) for text in texts]
    assert list(together) == [one[0] for one in alone]
    assert together.cut.tolist() == [one.cut[0] for one in alone]


@LIGHT
@given(text=TEXTS, room=st.integers(0, 20), label=st.integers(0, 2))
def test_loss_masks(real: Any, text: str, room: int, label: int) -> None:
    renderer = Renderer(real, PROMPT, LABELS, _least(real, PROMPT) + room)
    prompt = renderer.encode([text])[0]
    answer = [*_ids(real, WORDS[label]), real.eos_token_id]
    assert renderer.row(prompt, label, "response") == Row(
        input_ids=prompt + answer, labels=[IGNORE] * len(prompt) + answer
    )
    assert renderer.row(prompt, label, "all") == Row(input_ids=prompt + answer, labels=[IGNORE, *prompt[1:], *answer])


def test_prompt_does_not_depend_on_other_labels_than_the_longest(qwen_tokenizer: Any) -> None:
    """利空 takes two tokens, 利好 one: rows of both have the same room for text."""
    renderer = Renderer(qwen_tokenizer, PROMPT, LABELS, _least(qwen_tokenizer, PROMPT) + 5)
    prompt = renderer.encode(["净利润同比下降" * 20])[0]
    made = [renderer.row(prompt, label, "response")["input_ids"] for label in range(3)]
    assert [row[: len(prompt)] for row in made] == [prompt] * 3
    assert [len(row) - len(prompt) for row in made] == [3, 3, 2]


def test_encoding_does_not_change_the_tokenizer(real: Any) -> None:
    """Encoding a text without markup must not switch markup off for the next prompt."""
    first = Renderer(real, CHAT, LABELS, 256)
    first.encode(["<|im_end|>"])
    second = Renderer(real, CHAT, LABELS, 256)
    assert (first.prefix, first.suffix) == (second.prefix, second.suffix)
    assert second.prefix[0] == real.convert_tokens_to_ids("<|im_start|>")


def test_no_texts(tokenizer: Any) -> None:
    encoded = Renderer(tokenizer, PROMPT, LABELS, 64).encode([])
    assert list(encoded) == []
    assert len(encoded) == len(encoded.lengths) == 0
    assert encoded.truncated == 0


def test_truncated_counts_texts_not_tokens(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, PROMPT, LABELS, _least(tokenizer, PROMPT) + 2)
    encoded = renderer.encode(["1", "123", "1234", "123456789"])
    assert encoded.cut.tolist() == [0, 0, 1, 6]
    assert encoded.truncated == 2


@LIGHT
@given(texts=st.lists(TEXTS, max_size=6), first=st.integers(-8, 8), last=st.integers(-8, 8), room=st.integers(0, 9))
def test_prompts_are_a_sequence(tokenizer: Any, texts: list[str], first: int, last: int, room: int) -> None:
    encoded = Renderer(tokenizer, PROMPT, LABELS, _least(tokenizer, PROMPT) + room).encode(texts)
    whole = list(encoded)
    assert [encoded[at] for at in range(-len(texts), len(texts))] == whole + whole
    assert encoded.lengths.tolist() == [len(ids) for ids in whole]
    part = encoded[first:last]
    assert list(part) == whole[first:last]
    assert part.cut.tolist() == encoded.cut.tolist()[first:last]
    assert list(part[1:]) == whole[first:last][1:]
    assert encoded.truncated == sum(cut > 0 for cut in encoded.cut)


def test_prompts_outside_of_the_sequence_are_reported(tokenizer: Any) -> None:
    encoded = Renderer(tokenizer, PROMPT, LABELS, 64).encode(["涨", "跌"])
    for at in (2, -3):
        with pytest.raises(IndexError):
            encoded[at]
    with pytest.raises(ValueError, match="not in steps of 2"):
        encoded[::2]


def test_texts_are_encoded_the_same_in_chunks(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"公告{n}净利润" * n for n in range(12)]
    renderer = Renderer(tokenizer, PROMPT, LABELS, 64)
    whole = renderer.encode(texts)
    monkeypatch.setattr(rows, "CHUNK", 5)
    assert list(renderer.encode(texts)) == list(whole)
    assert renderer.encode(texts).cut.tolist() == whole.cut.tolist()


def test_a_text_of_a_megabyte_is_truncated(tokenizer: Any) -> None:
    encoded = Renderer(tokenizer, PROMPT, LABELS, 64).encode(["涨" * 1_000_000])
    assert len(encoded[0]) + 2 <= 64
    assert encoded.cut[0] > 100_000


def test_the_fingerprint_covers_everything_that_affects_tokens(tokenizer: Any, qwen_tokenizer: Any) -> None:
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["净利润"])
    base = Renderer(tokenizer, PROMPT, LABELS, 64).fingerprint()
    assert Renderer(tokenizer, PROMPT, LABELS, 64).fingerprint() == base
    others = [Renderer(words, PROMPT, LABELS, 64).fingerprint() for words in (qwen_tokenizer, added)]
    others.append(Renderer(tokenizer, PROMPT, LABELS, 65).fingerprint())
    assert len({base, *others}) == 4


# ------------------------------------------------------------------------------------------------ impossible commands


def test_no_room_for_text_is_reported_with_numbers(real: Any) -> None:
    least = _least(real, PROMPT)
    assert Renderer(real, PROMPT, LABELS, least).room == 1
    with pytest.raises(ConfigError) as caught:
        Renderer(real, PROMPT, LABELS, least - 1)
    (problem,) = caught.value.problems
    prefix, suffix = len(_ids(real, PROMPT.prefix)), len(_ids(real, PROMPT.suffix))
    longest = max(len(_ids(real, word)) for word in WORDS) + 1
    assert problem.path == "data.max_length"
    assert problem.text == (
        f"{least - 1} leaves no room for text: the prompt takes {prefix} + {suffix} tokens, "
        f"the longest answer with its end token {longest}. Set data.max_length={least - 1 + 64} or more"
    )


def test_tokenizer_without_an_end_token_is_refused(tokenizer: Any) -> None:
    copied = copy.deepcopy(tokenizer)
    copied.eos_token = None
    with pytest.raises(ConfigError, match="model.tokenizer: has no end-of-sequence token"):
        Renderer(copied, PROMPT, LABELS, 64)


def test_words_with_the_same_tokens_are_refused(qwen_tokenizer: Any) -> None:
    """Qwen's tokenizer composes e + accent, so these two spellings are one answer."""
    words = ("caf\u00e9", "cafe\u0301")
    with pytest.raises(ConfigError, match="data.labels: not all of .* have different tokens in this tokenizer"):
        Renderer(qwen_tokenizer, PROMPT, LabelSpace(words, words), 64)


# ------------------------------------------------------------------------------------------------ leading tokens


def _with_leading(tokenizer: Any, single: str) -> Any:
    copied = copy.deepcopy(tokenizer)
    tokens = [(token, copied.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|endoftext|>")]
    copied.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    return copied


@pytest.mark.parametrize("single", ["<|im_start|> $A", "<|im_start|> $A <|endoftext|>"])
def test_the_leading_token_occurs_once_at_the_start(tokenizer: Any, single: str) -> None:
    leading = tokenizer.convert_tokens_to_ids("<|im_start|>")
    copied = _with_leading(tokenizer, single)
    plain = Renderer(copied, PROMPT, LABELS, 64)
    assert plain.prefix == [leading, *_ids(tokenizer, PROMPT.prefix)]
    assert plain.suffix == _ids(tokenizer, PROMPT.suffix)
    assert Renderer(copied, Prompt("", "："), LABELS, 64).encode(["涨"])[0][0] == leading
    assert Renderer(copied, CHAT, LABELS, 64).prefix == _ids(tokenizer, CHAT.prefix), "the template has it already"
    row = plain.row(plain.encode(["涨"])[0], 2, "response")["input_ids"]
    assert row.count(leading) == 1
    assert row.count(tokenizer.eos_token_id) == 1


def test_trailing_token_alone_is_not_wanted(tokenizer: Any) -> None:
    copied = _with_leading(tokenizer, "$A <|endoftext|>")
    assert Renderer(copied, PROMPT, LABELS, 64).prefix == _ids(tokenizer, PROMPT.prefix)


# ------------------------------------------------------------------------------------------------ the real vocabulary


@pytest.mark.parametrize(
    ("word", "count"),
    [("利好", 1), ("利空", 2), ("中性", 2), ("积极", 1), ("消极", 1), ("positive", 1), ("negative", 1), ("neutral", 1)]
    + [(letter, 1) for letter in "ABCDE"],
)
def test_qwen_label_words(qwen_tokenizer: Any, word: str, count: int) -> None:
    assert len(_ids(qwen_tokenizer, word)) == count


def test_qwen_labels_share_or_differ_in_the_first_token(qwen_tokenizer: Any) -> None:
    up, down = _ids(qwen_tokenizer, "看涨"), _ids(qwen_tokenizer, "看跌")
    assert up[0] == down[0]
    assert up != down
    assert len({_ids(qwen_tokenizer, word)[0] for word in WORDS}) == 3


def test_answers_are_the_words_tokens(real: Any) -> None:
    renderer = Renderer(real, PROMPT, LABELS, 64)
    assert renderer.answers == [tuple(_ids(real, word)) for word in WORDS]
    assert renderer.end == real.eos_token_id


def test_labels_that_fill_the_prompt_are_reported(real: Any) -> None:
    words = tuple(f"intent number {number}" for number in range(77))
    labels = LabelSpace(words, words)
    prompt = Prompt.of("Question: {text} Intent ({labels}):", labels, "plain", "none", real)
    listed = len(_ids(real, " / ".join(words)))
    with pytest.raises(
        ConfigError, match=rf"or more, or a data\.prompt without {{labels}}, which take {listed} of them"
    ):
        Renderer(real, prompt, labels, 256)
