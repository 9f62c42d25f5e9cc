"""The embedded model's own tokenizer: byte-level BPE, trained on the project's documents."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    The 3,755 most common Chinese characters (level 1 of the standard GB 2312) are one token each even where the
    documents lack them, so that real text does not fall apart into bytes; so are the usual English label words.

    Args:
        documents: texts to take merges from.
        vocabulary: size, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: numbers are compared by the model, not looked up.
    split = pre_tokenizers.Split(_pattern(), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, OPEN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # two Chinese characters as the library counts: words, never the generator's phrases
        show_progress=False,
    )
    # Each common character this often makes its bytes' merges frequent enough to be taken before rarer words.
    common = ["。".join([*common_characters(), "positive", "neutral", "negative"])] * 400
    tokenizer.train_from_iterator([*documents, *common], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def common_characters() -> list[str]:
    """Level 1 of GB 2312: rows 16 to 55 of the code table."""
    found = []
    for row in range(0xB0, 0xD8):
        for column in range(0xA1, 0xFF):
            try:
                found.append(bytes([row, column]).decode("gb2312"))
            except UnicodeDecodeError:
                continue
    return found


def _pattern() -> Regex:
    return Regex(r"\d|[A-Za-z]+| ?[A-Za-z]+|[\u4e00-\u9fff]+|[^\sA-Za-z\d\u4e00-\u9fff]|\s+")
