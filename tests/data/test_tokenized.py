"""One dataset, one renderer: prompts in row order, rows as the method requires, fingerprints that distinguish runs."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from finsa.config import RunConfig
from finsa.data import dataset, tokenized
from finsa.data import rows as encoding
from finsa.data.dataset import Dataset
from finsa.data.labels import LabelSpace
from finsa.data.ledger import Ledger
from finsa.data.rows import IGNORE
from finsa.errors import ConfigError, DataError
from finsa.models import tokenizers
from finsa.runs import progress
from finsa.session import Session

Configure = Callable[..., RunConfig]
LABELS = LabelSpace(("利空", "中性", "利好"), ("利空", "中性", "利好"))


def _table(labels: LabelSpace = LABELS) -> Dataset:
    """Training rows 3, 5 and 2 of the classes; one long text in the test split."""
    classes = [0] * 3 + [1] * 5 + [2] * 2
    texts = [f"公告{n}净利润" for n in range(len(classes))]
    schema = {"id": pl.String, "text": pl.String, "label": pl.Int64, "domain": pl.String}
    train = pl.DataFrame([(str(n), texts[n], classes[n], None) for n in range(10)], schema=schema, orient="row")
    held = pl.DataFrame([("x", "涨", 2, None), ("y", "1" * 400, 0, None)], schema=schema, orient="row")
    return Dataset({"train": train, "validation": held[:1], "test": held}, labels, Ledger(), "0")


def test_prompts_are_in_row_order_and_rendered_once(config: Configure, tokenizer: Any) -> None:
    made = tokenized.build(config(), _table(), tokenizer)
    prompts = made.prompts("train")
    assert list(prompts) == list(made.renderer.encode(made.dataset.splits["train"]["text"].to_list()))
    assert made.prompts("train") is prompts
    assert made.gold("train") == [0] * 3 + [1] * 5 + [2] * 2


def test_the_prompt_is_that_of_the_data_set(config: Configure, tokenizer: Any) -> None:
    made = tokenized.build(config(), _table(), tokenizer)
    assert (made.prompt.prefix, made.prompt.suffix) == ("文本：", "\n情感分类：")


@pytest.mark.parametrize("method", ["lora_response", "lora"])
def test_training_rows_end_with_their_answer(config: Configure, tokenizer: Any, method: str) -> None:
    made = tokenized.build(config(), _table(), tokenizer)
    rows = made.training_rows(config(f"method={method}"))
    assert len(rows) == 10
    for prompt, label, row in zip(made.prompts("train"), made.gold("train"), rows, strict=True):
        answer = [*tokenizer(LABELS.words[label], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert row["input_ids"] == prompt + answer
        learned = [place for place, target in enumerate(row["labels"]) if target != IGNORE]
        assert learned[0] == (len(prompt) if method == "lora_response" else 1)
        assert learned == list(range(learned[0], len(prompt) + len(answer)))


def test_training_rows_are_a_sequence(config: Configure, tokenizer: Any) -> None:
    rows = tokenized.build(config(), _table(), tokenizer).training_rows(config("method.rows_per_class=2"))
    assert len(rows) == 6
    assert [rows[at] for at in range(-6, 0)] == list(rows) == rows[:]
    assert rows[1:5:2] == [rows[1], rows[3]]


def test_prompts_are_the_same_in_training_and_evaluation(config: Configure, tokenizer: Any) -> None:
    """One text in all splits, with a different label in each: the tokens before the answer do not depend on it."""
    schema = {"id": pl.String, "text": pl.String, "label": pl.Int64, "domain": pl.String}
    parts = {
        split: pl.DataFrame([("1", "净利润同比下降" * 40, number, None)], schema=schema, orient="row")
        for number, split in enumerate(("train", "validation", "test"))
    }
    made = tokenized.build(config(), Dataset(parts, LABELS, Ledger(), "0"), tokenizer)
    prompts = [made.prompts(split)[0] for split in parts]
    assert prompts[0] == prompts[1] == prompts[2] == made.renderer.encode(["净利润同比下降" * 40])[0]
    (row,) = made.training_rows(config())
    assert row["input_ids"][: len(prompts[0])] == prompts[0]


@pytest.mark.parametrize("method", ["lora_downsample", "lora_response_downsample"])
def test_downsampled_rows_have_equal_classes(config: Configure, tokenizer: Any, method: str) -> None:
    made = tokenized.build(config(), _table(), tokenizer)
    order = made.training_order(config(f"method={method}"))
    assert Counter(made.gold("train")[row] for row in order) == {0: 2, 1: 2, 2: 2}
    assert made.training_order(config(f"method={method}")) == order
    assert len({tuple(made.training_order(config(f"method={method}", f"seed={seed}"))) for seed in range(4)}) > 1


def test_all_rows_are_used_without_balance(config: Configure, tokenizer: Any) -> None:
    made = tokenized.build(config(), _table(), tokenizer)
    assert made.training_order(config("method=lora")) == list(range(10))


def test_ledger_counts_truncated_texts(config: Configure, tokenizer: Any) -> None:
    made = tokenized.build(config(), _table(), tokenizer)
    made.prompts("test")
    made.prompts("train")
    assert made.truncated() == {"test": 1, "train": 0}


def test_ledger_counts_truncated_texts_of_this_tokenization(
    config: Configure, tokenizer: Any, qwen_tokenizer: Any
) -> None:
    """Jobs of a sweep over models share the table: each has to report its own truncation, even when it comes again."""
    table = _table()
    longer = table.splits["test"].with_columns(pl.Series("text", ["涨", "positive " * 60]))
    table = Dataset({**table.splits, "test": longer}, table.labels, table.ledger, "0")
    counts = []
    for words in (tokenizer, qwen_tokenizer, tokenizer, qwen_tokenizer):
        made = tokenized.build(config("data.max_length=130"), table, words)
        made.prompts("test")
        counts.append((made.truncated()["test"], made.prompts("test").truncated))
    assert len({own for _, own in counts}) == 2, "the two vocabularies should not cut alike here"
    assert [told for told, _ in counts] == [own for _, own in counts]


def test_jobs_with_the_same_data_and_tokenizer_share_their_tokens(config: Configure, tokenizer: Any) -> None:
    table = _table()
    session = Session()
    first = tokenized.build(config("method=lora"), table, tokenizer, session)
    assert tokenized.build(config("method=lora_response", "seed=3"), table, tokenizer, session) is first
    assert tokenized.build(config("data.max_length=200"), table, tokenizer, session) is not first
    assert tokenized.build(config("model.prompt=chat"), table, tokenizer, session) is not first
    assert tokenized.build(config(), _table(), tokenizer, session) is not first
    assert tokenized.build(config(), table, copy.copy(tokenizer), session) is not first


def test_fingerprints_distinguish_templates_and_labels(config: Configure, tokenizer: Any) -> None:
    table = _table()
    base = tokenized.build(config(), table, tokenizer).fingerprints()
    assert base == tokenized.build(config("method=lora"), _table(), tokenizer).fingerprints()
    other_prompt = tokenized.build(config("data.prompt='{text}：'"), table, tokenizer).fingerprints()
    assert other_prompt["template_fingerprint"] != base["template_fingerprint"]
    assert other_prompt["label_fingerprint"] == base["label_fingerprint"]
    longer = tokenized.build(config("data.max_length=200"), table, tokenizer).fingerprints()
    assert longer["template_fingerprint"] != base["template_fingerprint"]
    turned = LabelSpace(LABELS.names[::-1], LABELS.words[::-1])
    assert (
        tokenized.build(config(), _table(turned), tokenizer).fingerprints()["label_fingerprint"]
        != base["label_fingerprint"]
    )


def test_prompt_without_room_is_reported(config: Configure, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length: 8 leaves no room for text: the prompt takes \d+ \+ \d+"):
        tokenized.build(config("data.max_length=8"), _table(), tokenizer)


def _instructions(length: int, inputs: int = 1) -> Dataset:
    """Rows whose instruction has this many letters; the first `inputs` of each split are followed by an input."""
    table = _table()
    for split, rows in table.splits.items():
        told = [f"{'判' * length}\n{text}" if row < inputs else text for row, text in enumerate(rows["text"])]
        fixed = [length + 1 if row < inputs else 0 for row in range(rows.height)]
        table.splits[split] = rows.with_columns(pl.Series("text", told), pl.Series("fixed", fixed))
    return table


def test_an_instruction_that_leaves_no_room_for_the_input_is_refused(config: Configure, tokenizer: Any) -> None:
    """Either the whole instruction, or an error with the excess length: never prompts without their input."""
    cfg = config("data.max_length=100")
    room = tokenized.build(cfg, _table(), tokenizer).renderer.room
    for source, advice in (("alpaca", "shorten the instruction"), ("messages", "set data.turns=last")):
        given = cfg.model_copy(update={"data": cfg.data.model_copy(update={"source": source})})
        with pytest.raises(DataError) as caught:
            tokenized.build(given, _instructions(room), tokenizer)
        text = str(caught.value)
        assert text.startswith("data.max_length: in 3 of 13 rows (train 1, validation 1, test 1)")
        assert f"up to {room + 1} tokens, but only {room} are available. Only the input may be truncated" in text
        assert text.endswith(f"Set data.max_length=165 or more, or {advice}")


def test_only_the_input_is_truncated(config: Configure, tokenizer: Any) -> None:
    """The longest instruction that leaves eight tokens is kept whole; a long text without one is truncated as usual."""
    cfg = config("data.max_length=100")
    room = tokenized.build(cfg, _table(), tokenizer).renderer.room
    table = _instructions(room - 9)
    table.splits["test"] = table.splits["test"].with_columns(pl.col("text") + "跌" * 50)
    made = tokenized.build(cfg, table, tokenizer)
    text = tokenizer.decode(made.prompts("test")[0][len(made.renderer.prefix) : -len(made.renderer.suffix)])
    assert text.startswith("判" * (room - 9) + "\n涨跌")
    assert made.truncated() == {"test": 2}
    with pytest.raises(DataError, match="no room for the input"):
        table.splits["test"] = _instructions(room - 8).splits["test"].with_columns(pl.col("text") + "跌" * 50)
        tokenized.build(cfg, Dataset(table.splits, LABELS, Ledger(), "1"), tokenizer)


def test_reading_and_tokenizing_report_their_progress(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PREPARING", 0.002)
    monkeypatch.setattr(encoding, "CHUNK", 200)
    cfg = config("data=sample", "data.cache=null", "data.split.seed=4711")  # read by no other test
    loaded = dataset.load(cfg.data)
    job = tokenized.build(cfg, loaded, tokenizers.load_tokenizer(cfg.model))
    job.prompts("train")
    said = capsys.readouterr().err
    assert re.search(r"^  reading data=sample: 0:00:\d\d elapsed$", said, re.MULTILINE)
    assert re.search(r"^  tokenizing train rows: [\d,]+ of 3,608, 0:00:\d\d elapsed", said, re.MULTILINE)
