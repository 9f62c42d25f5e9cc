from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from finsa.config import ROOT, RunConfig
from finsa.models import tokenizers

DOCUMENTS = ["公司净利润同比增长12.5%，这是利好消息。", "股价下跌，投资者谨慎。GDP growth slowed in Q3."] * 50
TOKENIZER = tokenizers.train(DOCUMENTS, vocabulary=4600)


def test_common_characters_are_level_1_of_gb_2312() -> None:
    found = tokenizers.common_characters()
    assert len(found) == len(set(found)) == 3755
    assert found[0] == "啊"
    assert "涨" in found


def test_common_characters_are_single_tokens_even_if_unseen() -> None:
    lengths = [len(TOKENIZER(character)["input_ids"]) for character in tokenizers.common_characters()]
    assert sum(length == 1 for length in lengths) / len(lengths) > 0.99


def test_digits_are_single_tokens() -> None:
    assert len(TOKENIZER("12345")["input_ids"]) == 5


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_is_restored_from_its_tokens(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_chat_template_ends_where_the_answer_starts() -> None:
    rendered = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


# ------------------------------------------------------------------------------------------------ without transformers

TEXTS = ["公司净利润同比增长12.5%", "<|im_start|>user\n涨<|im_end|>", " GDP  growth\t\n", "鱻😀", "", "a"]


def write(folder: Path, **changed: Any) -> Path:
    """The tokenizer as transformers saves it, with changed settings; None removes one."""
    TOKENIZER.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    known = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))
    return folder


def assert_same(bare: Any, folder: Path) -> None:
    full = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(bare, tokenizers.BareTokenizer)
    assert bare.backend_tokenizer.to_str() == full.backend_tokenizer.to_str()
    assert (bare.eos_token_id, len(bare)) == (full.eos_token_id, len(full))
    for text in TEXTS:
        for special in (True, False):
            assert (
                bare(text, add_special_tokens=special)["input_ids"] == full(text, add_special_tokens=special).input_ids
            )


def test_both_routes_to_the_embedded_tokenizer_are_the_same(config: Callable[..., RunConfig]) -> None:
    assert_same(tokenizers.load_without_torch(config("model=tiny").model), tokenizers.EMBEDDED_TOKENIZER)


@pytest.mark.parametrize("changed", [{}, {"eos_token": None}, {"bos_token": "<|im_start|>"}])
def test_a_saved_tokenizer_is_read_without_transformers(
    config: Callable[..., RunConfig], tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = write(tmp_path, **changed)
    assert_same(tokenizers.load_without_torch(config("model=tiny", f"model.tokenizer={folder}").model), folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"add_bos_token": True, "bos_token": "<|im_start|>"},
        {"bos_token": "<s>"},
        {"eos_token": {"content": "<|endoftext|>"}},
    ],
)
def test_settings_that_may_change_a_tokenizer_are_left_to_transformers(
    config: Callable[..., RunConfig], tmp_path: Path, changed: dict[str, Any]
) -> None:
    assert tokenizers.BareTokenizer.read(write(tmp_path, **changed)) is None


def test_truncation_and_post_processing_are_left_to_transformers(tmp_path: Path) -> None:
    file = write(tmp_path) / "tokenizer.json"
    written = json.loads(file.read_text())
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    for changed in ({"truncation": truncation}, {"post_processor": None}):
        file.write_text(json.dumps({**written, **changed}))
        assert tokenizers.BareTokenizer.read(tmp_path) is None
    file.write_text(json.dumps(written))
    assert tokenizers.BareTokenizer.read(tmp_path) is not None


def test_a_chat_template_is_rendered_by_transformers(config: Callable[..., RunConfig]) -> None:
    found = tokenizers.load_without_torch(config("model=tiny", "model.prompt=chat").model)
    assert isinstance(found, PreTrainedTokenizerFast)


def test_a_prompt_without_room_is_reported_without_torch_and_transformers() -> None:
    code = (
        "import sys; sys.argv = ['run.py', 'data.max_length=10', 'tracking=none']\nfrom finsa.cli import run\n"
        "print(run(), sorted({'torch', 'transformers', 'trl', 'datasets', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2 []"
    assert "10 leaves no room for text" in done.stderr
