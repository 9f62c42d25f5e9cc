"""A row with a target: text and target together are what is compared, prompted and read, from files to single rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finsa.config import RunConfig
from finsa.data import dataset, tokenized
from finsa.data.dataset import Dataset
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt, with_target
from finsa.data.rows import Renderer
from finsa.data.schema import Reading
from finsa.errors import ConfigError, DataError

Configure = Callable[..., RunConfig]
Row = tuple[str, str | None, str]  # text, target, label
LABELS = LabelSpace(("利空", "利好"), ("利空", "利好"))
WORDS = ("data=table", "data.columns.target=target", "data.labels=['利空','利好']", "data.cache=null")
ASKING = "data.prompt='文本：{text}\n公司：{target}\n情感：'"
FIRST = Prompt("公司：", "\n情感：", "\n文本：", target_first=True)
LAST = Prompt("文本：", "\n情感：", "\n公司：")


def _load(config: Configure, folder: Path, *words: str, **splits: list[Row]) -> Dataset:
    for split, rows in splits.items():
        lines = [
            json.dumps(dict(zip(("text", "target", "label"), row, strict=True)), ensure_ascii=False) for row in rows
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return dataset.load(config(*WORDS, f"data.files={folder}", *words).data)


# ------------------------------------------------------------------------------------------------ ledger and splits


def test_text_and_target_are_compared_together(config: Configure, tmp_path: Path) -> None:
    found = _load(
        config,
        tmp_path,
        "data.on_conflict=drop",
        train=[
            ("甲涨乙跌", "甲", "利好"),
            ("甲涨乙跌", "乙", "利空"),  # another target: another row
            ("甲涨 乙跌", " 甲\u3000", "利好"),  # the same row, written differently
            ("丙平", "丙", "利好"),
            ("丙平", "丙", "利空"),  # a conflict
            ("丁涨", None, "利好"),
            ("丁涨", " \n", "利好"),
            ("丁\ufffd", "丁", "利好"),
            ("丁涨", "丁\x00", "利好"),
            ("戊涨", "己", "利好"),  # used, and noted
        ],
        valid=[("庚涨", "庚", "利好"), ("甲涨乙跌", "丙", "利好")],
        test=[("甲涨乙跌", "乙", "利空"), ("辛涨", "辛", "利好")],
    )
    train = found.splits["train"].select("text", "target").rows()
    assert train == [("甲涨乙跌", "甲"), ("戊涨", "己")]
    assert dict(found.ledger.buckets) == {
        "used": 6,
        "duplicate": 1,
        "conflicting label": 2,
        "empty target": 2,
        "unreadable: damaged characters": 1,
        "unreadable: damaged characters in the target": 1,
        "leak: training copy of a test row": 1,
    }
    assert found.ledger.notes[:3] == [
        "2 rows have a target that does not occur in their text, such as '己' (train.jsonl:10)",
        "1 row of the training split has the text of a test row, with another target",
        "1 row of the validation split has the text of a test row, with another target",
    ]


def test_rows_of_one_text_stay_in_one_split(config: Configure, tmp_path: Path) -> None:
    rows = [(f"甲{n}涨乙{n}跌", target, label) for n in range(40) for target, label in (("甲", "利好"), ("乙", "利空"))]
    found = _load(config, tmp_path, "data.split.validation=0.2", "data.split.test=0.2", rows=rows)
    texts = [set(part["text"]) for part in found.splits.values()]
    assert [part.height for part in found.splits.values()] == [48, 16, 16]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 40


def test_the_fingerprint_depends_on_the_targets(config: Configure, tmp_path: Path) -> None:
    prints = set()
    for number, target in enumerate(("甲", "乙")):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = [("甲涨乙跌", target, "利好"), ("丙跌", "丙", "利空")]
        prints.add(
            _load(config, folder, train=rows, valid=[("丁", "丁", "利好")], test=[("戊", "戊", "利空")]).fingerprint
        )
    assert len(prints) == 2


# ------------------------------------------------------------------------------------------------ prompts and tokens


def test_prompts_and_texts_contain_the_target_only_if_the_prompt_asks_for_it(
    config: Configure, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [("甲涨乙跌", "甲", "利好"), ("甲涨乙跌", "乙", "利空")]
    shown = {}
    for prompt in (ASKING, "data.prompt='文本：{text}\n情感：'", "data.prompt='{target}怎么样？{text}：'"):
        words = (prompt, "data.max_length=64")
        data = _load(config, tmp_path, *words, train=rows, valid=[("丁", "丁", "利好")], test=[("戊", "戊", "利空")])
        built = tokenized.build(config(*WORDS, f"data.files={tmp_path}", *words), data, tokenizer)
        shown[prompt] = [tokenizer.decode(ids) for ids in built.prompts("train")]
        assert built.fixed("train") == ([0, 0] if "target" not in prompt else [2, 2])
    assert list(shown.values()) == [
        ["文本：甲涨乙跌\n公司：甲\n情感：", "文本：甲涨乙跌\n公司：乙\n情感："],
        ["文本：甲涨乙跌\n情感：", "文本：甲涨乙跌\n情感："],
        ["甲怎么样？甲涨乙跌：", "乙怎么样？甲涨乙跌："],
    ]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("涨跌ab ", max_size=40), target=st.text("甲乙ab", min_size=1, max_size=6), more=st.integers(0, 12))
@pytest.mark.parametrize("prompt", [FIRST, LAST])
def test_only_the_text_is_truncated(tokenizer: Any, prompt: Prompt, text: str, target: str, more: int) -> None:
    def ids(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    middle = str(prompt.middle)
    kept = ids(target + middle) if prompt.target_first else ids(middle + target)
    length = len(ids(prompt.prefix)) + len(kept) + len(ids(prompt.suffix)) + 3 + more
    renderer = Renderer(tokenizer, prompt, LABELS, length)
    encoded = renderer.encode([with_target(target, text)])
    body = encoded[0][len(renderer.prefix) : len(encoded[0]) - len(renderer.suffix)]
    whole = ids(target + middle + text) if prompt.target_first else ids(text + middle + target)
    assert encoded.cut[0] == max(0, len(whole) - renderer.room)
    if not encoded.cut[0]:
        assert body == whole
    elif prompt.target_first:
        assert body == whole[: renderer.room]
    else:
        assert body == [*whole[: renderer.room - len(kept)], *kept]


def test_a_target_without_room_for_the_text_is_refused(config: Configure, tokenizer: Any, tmp_path: Path) -> None:
    rows = [("涨" * 200, "甲" * 30, "利好"), ("乙跌", "乙", "利空")]
    words = (ASKING, "data.max_length=40")
    data = _load(config, tmp_path, *words, train=rows, valid=[("丁", "丁", "利好")], test=[("戊", "戊", "利空")])
    with pytest.raises(DataError, match=r"in 1 of 4 rows \(train 1\) the target leaves no room .*shorten the targets"):
        tokenized.build(config(*WORDS, f"data.files={tmp_path}", *words), data, tokenizer)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.columns.target=null", ASKING), "prompt contains {target}, so columns.target must name the column"),
        (("data.prompt='{target}{text}{target}'",), "may have {target} once"),
        (("data.prompt='{target}'",), "needs {text} exactly once"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(config: Configure, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*WORDS, *words)
    assert message in str(caught.value)


def test_a_missing_column_is_reported(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.columns\.target: .*has no column 'firm'.*text, target, label"):
        _load(config, tmp_path, "data.columns.target=firm", train=[("甲涨", "甲", "利好")])


# ------------------------------------------------------------------------------------------------ single rows


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": " 甲涨 ", "target": "甲 \n公司"}, ("甲 公司\n甲涨", 5, None)),
        ({"text": "甲涨"}, ("", 0, "no target in the field 'target'")),
        ({"text": "甲涨", "target": " "}, ("", 0, "no target in the field 'target'")),
        ({"text": "甲涨", "target": 3}, ("", 0, "the target is not a string but int in the field 'target'")),
        ({"text": "甲涨", "target": "甲\x00"}, ("", 0, "unreadable: damaged characters in the target")),
        ({"text": "", "target": "甲"}, ("", 0, "empty text")),
    ],
)
def test_single_rows_are_read_with_their_target(config: Configure, values: dict[str, Any], expected: Any) -> None:
    assert Reading.of(config(*WORDS, ASKING).data).text_of(values) == expected


def test_a_prompt_without_a_target_reads_texts_only(config: Configure) -> None:
    reading = Reading.of(config(*WORDS).data)
    assert reading.text_of({"text": "甲涨"}) == ("甲涨", 0, None)
    assert reading.fields == []


# ------------------------------------------------------------------------------------------------ articles


def test_articles_have_a_row_per_entity(config: Configure, tmp_path: Path) -> None:
    news = [{"id": n, "Title": f"甲涨乙跌{n}", "Description": "", "Content": "", "Type": "Markets"} for n in (1, 2)]
    entities = [{"name": "甲", "sentiment": "positive"}, {"name": "乙", "sentiment": "negative"}]
    labels = [{"id": 1, "entities": entities}, {"id": 2, "entities": {"甲": "neutral", "乙": "?"}}]
    for name, content in (("news.json", news), ("labels.json", labels)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    data = config("data=aidf_news", f"data.files={tmp_path}", "data.columns.target=name").data
    rows = dataset.collect(data).frame.select("id", "target", "label").rows()
    assert rows == [("1-1", "甲", "positive"), ("1-2", "乙", "negative"), ("2-1", "甲", "neutral"), ("2-2", "乙", None)]
