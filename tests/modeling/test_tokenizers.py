from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.modeling import tokenizers

DOCUMENTS = ["公司净利润同比增长12.5%，这是利好消息。", "股价下跌，投资者谨慎。GDP growth slowed in Q3."] * 50
TOKENIZER = tokenizers.train(DOCUMENTS, vocabulary=4600)


def test_common_characters_are_level_one_of_the_standard() -> None:
    found = tokenizers.common_characters()
    assert len(found) == len(set(found)) == 3755
    assert found[0] == "啊"
    assert "涨" in found


def test_common_characters_are_one_token_each_though_no_document_has_them() -> None:
    lengths = [len(TOKENIZER(character)["input_ids"]) for character in tokenizers.common_characters()]
    assert sum(length == 1 for length in lengths) / len(lengths) > 0.99


def test_digits_stand_alone() -> None:
    assert len(TOKENIZER("12345")["input_ids"]) == 5


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_chat_template_ends_where_the_answer_starts() -> None:
    rendered = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
