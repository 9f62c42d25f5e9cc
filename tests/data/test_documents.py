"""Pre-training documents: blocks keep the stream, and no document contains a text of the sample's held-out splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finsa.config import Data, RunConfig
from finsa.data import dataset, documents
from finsa.data.rows import IGNORE

Configure = Callable[..., RunConfig]


def _data(config: Configure, count: int) -> Data:
    data = config("data=tiny_corpus").data
    assert data.corpus is not None
    return data.model_copy(update={"corpus": data.corpus.model_copy(update={"documents": count})})


def _load(data: Data, heldout: float = 0.05) -> tuple[list[str], list[str]]:
    found = documents.load(data, heldout)
    assert found.ledger.read.total() == found.ledger.buckets.total()
    return found.learn, found.held


def _stream(tokenizer: Any, texts: list[str]) -> list[int]:
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return stream


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=8), length=st.integers(2, 30))
def test_blocks_keep_the_stream(tokenizer: Any, texts: list[str], length: int) -> None:
    rows = documents.blocks(texts, tokenizer, length)
    stream = _stream(tokenizer, texts)
    joined = [token for row in rows for token in row["input_ids"]]
    assert joined == stream[: len(joined)]
    assert 0 <= len(stream) - len(joined) < length
    for row in rows:
        assert len(row["input_ids"]) == length
        assert row["labels"] == [IGNORE, *row["input_ids"][1:]]


def test_every_document_ends_with_an_end_token(tokenizer: Any) -> None:
    (row,) = documents.blocks(["1", "22", "333"], tokenizer, 9)
    end = tokenizer.eos_token_id
    assert [place for place, token in enumerate(row["input_ids"]) if token == end] == [1, 4, 8]
    assert row["labels"][8] == end, "the end is learned"


def test_a_stream_shorter_than_a_block_gives_no_blocks(tokenizer: Any) -> None:
    assert documents.blocks(["1"], tokenizer, 3) == []


def test_protected_are_the_texts_of_validation_and_test(config: Configure) -> None:
    held = dataset.load(config().data)
    protected = documents.protected(config("data=tiny_corpus").data)
    assert protected == [*held.splits["validation"]["text"].to_list(), *held.splits["test"]["text"].to_list()]
    assert len(protected) >= 1_000


def test_nothing_is_protected_without_files(config: Configure) -> None:
    assert documents.protected(config("data=tiny_corpus").data.model_copy(update={"files": None})) == []


def test_no_document_holds_a_held_out_text(config: Configure) -> None:
    learned, heldout = _load(_data(config, 1_500))
    everything = "\x00".join([*learned, *heldout])
    assert [text for text in documents.protected(_data(config, 1_500)) if text in everything] == []


def test_exclusion_has_an_effect(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protected texts that the unprotected corpus contains are excluded, and the number of documents stays the same."""
    data = _data(config, 400)
    monkeypatch.setattr(documents, "protected", lambda _: [])
    free = [document for part in _load(data) for document in part]
    forbidden = sorted(free, key=len)[200:220]
    monkeypatch.setattr(documents, "protected", lambda _: forbidden)
    kept = [document for part in _load(data) for document in part]
    assert len(kept) == 400
    assert [text for text in forbidden if any(text in document for document in kept)] == []


def test_heldout_documents_are_others(config: Configure) -> None:
    learned, heldout = _load(_data(config, 300))
    assert (len(learned), len(heldout)) == (285, 15)
    assert set(learned).isdisjoint(heldout)
    assert _load(_data(config, 300)) == (learned, heldout)


def test_documents_are_not_in_blocks_of_one_kind(config: Configure) -> None:
    learned, _ = _load(_data(config, 300))
    lengths = [len(document) for document in learned]
    assert sum(a < b for a, b in pairwise(lengths)) > 90, "lengths go up and down, as in random order"


def test_only_documents_that_are_read_count_as_used(config: Configure, tmp_path: Path) -> None:
    for name, count in (("train", 20), ("test", 30)):
        lines = [json.dumps({"text": f"{name} document {number}"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = {"files": str(tmp_path), "column": "text", "documents": None}
    data = _data(config, 0)
    assert data.corpus is not None
    data = data.model_copy(update={"files": None, "corpus": data.corpus.model_copy(update=corpus)})
    found = documents.load(data, 0.1)
    assert (len(found.learn), len(found.held)) == (18, 2)
    assert found.ledger.read.total() == 50
    assert found.ledger.buckets == {"used": 20, "filtered: test split": 30}
    assert all(text.startswith("train") for text in found.learn + found.held)
    assert data.corpus is not None
    few = data.model_copy(update={"corpus": data.corpus.model_copy(update={"documents": 11})})
    found = documents.load(few, 0.1)
    assert (len(found.learn), len(found.held)) == (11, 2)
    assert found.ledger.buckets == {
        "used": 13,
        "filtered: test split": 30,
        "filtered: more than data.corpus.documents": 7,
    }
