"""Every published data set loads from files in its format, with the published rules, and its ledger balances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finsa.config import Data, RunConfig
from finsa.data.dataset import Dataset, load
from finsa.data.splits import SPLITS

Configure = Callable[..., RunConfig]
FINNF = ["利空", "中性", "利好"]
INTENTS = ["行业板块问询", "个股问询", "大盘问询", "客服问询", "基金问询"]


def _load(config: Configure, *overrides: str) -> tuple[Dataset, Data]:
    data = config(*overrides, "data.cache=null").data
    table = load(data)
    ledger = table.ledger
    assert ledger.read.total() == ledger.buckets.total()
    assert ledger.buckets["used"] == sum(part.height for part in table.splits.values())
    assert table.dropped.height == ledger.dropped()
    assert ledger.splits == {
        split: {name: (part["label"] == number).sum() for number, name in enumerate(table.labels.names)}
        for split, part in table.splits.items()
    }
    return table, data


def _json(folder: Path, name: str, rows: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if name.endswith("l") else json.dumps(rows)  # type: ignore[attr-defined]
    (folder / name).write_text(lines, encoding="utf-8")


def _names(table: Dataset, split: str) -> list[tuple[str, str]]:
    part = table.splits[split]
    return [(text, table.labels.names[label]) for text, label in part.select("text", "label").iter_rows()]


def _heights(table: Dataset) -> tuple[int, ...]:
    return tuple(table.splits[split].height for split in SPLITS)


# ------------------------------------------------------------------------------------------------ FinNF


def _finnf(folder: Path, name: str, counts: dict[str, int]) -> None:
    labels = [label for label, count in counts.items() for _ in range(count)]
    frame = pl.DataFrame(
        {"id": range(1, len(labels) + 1), "text": [f"{name}{n}公告" for n in range(len(labels))], "label": labels}
    )
    folder.mkdir(parents=True, exist_ok=True)
    frame.sample(fraction=1, shuffle=True, seed=1).write_csv(folder / f"{name}.csv")


NEWS = {"利好": 310, "中性": 250, "利空": 90}
FORUM = {"利好": 58, "中性": 14, "利空": 64}


@pytest.mark.parametrize(
    ("data", "counts", "share", "domain"), [("finnf_news", NEWS, 0.01, "news"), ("finnf_forum", FORUM, 0.2, "forum")]
)
def test_finnf(config: Configure, tmp_path: Path, data: str, counts: dict[str, int], share: float, domain: str) -> None:
    _finnf(tmp_path, "all", counts)
    table, settings = _load(config, f"data={data}", f"data.files={tmp_path}")
    assert settings.domain == domain
    assert list(table.labels.words) == list(table.labels.names) == FINNF
    held = {label: max(1, int(share * count + 1e-9)) for label, count in counts.items()}
    assert table.ledger.splits == {
        "train": {label: counts[label] - 2 * held[label] for label in FINNF},
        "validation": {label: held[label] for label in FINNF},
        "test": {label: held[label] for label in FINNF},
    }


def test_finnf_with_given_splits_whose_ids_restart(config: Configure, tmp_path: Path) -> None:
    for name, rows in {"train": 30, "valid": 6, "test": 9}.items():
        _finnf(tmp_path, name, dict.fromkeys(FINNF, rows // 3))
    table, _ = _load(config, "data=finnf_forum", f"data.files={tmp_path}")
    assert _heights(table) == (30, 6, 9)
    assert table.ledger.buckets == {"used": 45}
    assert table.splits["test"]["id"].to_list() != table.splits["train"]["id"].to_list()[:9]


def test_finnf_joint_is_both_split_by_split(config: Configure, tmp_path: Path) -> None:
    _finnf(tmp_path / "news", "news", NEWS)
    _finnf(tmp_path / "forum", "forum", FORUM)
    news, _ = _load(config, "data=finnf_news", f"data.files={tmp_path / 'news'}")
    forum, _ = _load(config, "data=finnf_forum", f"data.files={tmp_path / 'forum'}")
    joint, _ = _load(
        config,
        "data=finnf_joint",
        f"data.parts.news.files={tmp_path / 'news'}",
        f"data.parts.forum.files={tmp_path / 'forum'}",
    )
    assert joint.labels == news.labels == forum.labels
    for split in SPLITS:
        assert joint.splits[split]["text"].to_list() == [*news.splits[split]["text"], *forum.splits[split]["text"]]
        domains = ["news"] * news.splits[split].height + ["forum"] * forum.splits[split].height
        assert joint.splits[split]["domain"].to_list() == domains
    assert joint.ledger.read == news.ledger.read + forum.ledger.read


# ------------------------------------------------------------------------------------------------ OpenFinData


def _question(number: int, letter: str) -> dict[str, str]:
    prompt = (
        f"请分析以下问句的意图类型。\n\n问句: 第{number}问\n\n请从以下选项中选择最合适的意图类型：\nA. 行业板块问询"
    )
    return {"instruction": prompt, "input": "", "output": letter}


def test_openfindata_intent(config: Configure, tmp_path: Path) -> None:
    for name, start, rows in (("train.json", 0, 25), ("valid.json", 100, 10), ("test.json", 200, 5)):
        _json(tmp_path, name, [_question(start + n, "ABCDE"[n % 5]) for n in range(rows)])
    table, data = _load(config, "data=openfindata_intent", f"data.files={tmp_path}")
    assert (table.labels.names, table.labels.words) == (tuple(INTENTS), tuple("ABCDE"))
    assert _heights(table) == (25, 10, 5)
    assert _names(table, "test") == [(f"第{200 + n}问", INTENTS[n]) for n in range(5)]
    assert data.prompt.count("{text}") == 1


def test_openfindata_raw_looks_up_the_letter_in_its_row(config: Configure, tmp_path: Path) -> None:
    rows = []
    for number, letter in enumerate(["A", "B", "C", "d ", "E", "F"]):
        turned = INTENTS[number:] + INTENTS[:number]  # another order of the options in every row
        asked = f"你是一个意图情绪助手。请分析以下问句的意图是[…]中的哪一个？请给出正确选项。\n问句:问{number}"
        rows.append({"id": str(number), "question": asked, **dict(zip("ABCDE", turned, strict=True)), "answer": letter})
    _json(tmp_path, "test.json", rows)
    table, _ = _load(config, "data=openfindata_raw", f"data.files={tmp_path}", "data.on_unknown_label=drop")
    expected = [(f"问{n}", (INTENTS[n:] + INTENTS[:n])[n]) for n in range(5)]
    assert _names(table, "test") == expected
    assert table.splits["test"]["id"].to_list() == list("01234")
    assert table.ledger.buckets == {"used": 5, "unknown label": 1}
    assert table.ledger.examples == {"unknown label": ["test.json:6: 问5 [F]"]}
    assert table.ledger.notes == ["test.json: label 'd ' (1 row) is read as 'D'"]


@pytest.mark.real_data
def test_both_forms_of_openfindata_are_one_set(config: Configure, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "openfindata_intent"
    (tmp_path / "test.jsonl").write_bytes((folder / "intent_alpaca.jsonl").read_bytes())
    raw, _ = _load(config, "data=openfindata_raw", f"data.files={folder / 'test.jsonl'}")
    alpaca, _ = _load(config, "data=openfindata_intent", f"data.files={tmp_path}")
    assert _heights(raw) == (0, 0, 75)
    assert _names(raw, "test") == _names(alpaca, "test")
    counts = {"行业板块问询": 10, "个股问询": 27, "大盘问询": 3, "客服问询": 25, "基金问询": 10}
    assert raw.ledger.splits["test"] == counts


# ------------------------------------------------------------------------------------------------ AIDF


def test_aidf_news(config: Configure, tmp_path: Path) -> None:
    sentiments = ["negative", "neutral", "positive"]
    news = [
        {
            "id": n,
            "Title": f"Title {n}",
            "Description": f"About  {n}",
            "Content": f"Body\n{n}",
            "Type": "Markets" if n % 8 else "Sports",
        }
        for n in range(160)
    ]
    labels = [
        {
            "id": n,
            "entities": [{"entity": "A", "sentiment": sentiments[n % 3]}, {"entity": "B", "sentiment": "positive"}],
        }
        for n in range(160)
    ]
    _json(tmp_path, "news.json", news)
    _json(tmp_path, "labels.json", labels)
    table, data = _load(config, "data=aidf_news", f"data.files={tmp_path}")
    assert table.ledger.buckets == {"used": 140, "filtered: category Sports": 20}
    assert _heights(table) == (110, 16, 14), "14 = ceil(140 / 10), 16 = ceil(126 / 8)"
    for split in SPLITS:
        for text, label in _names(table, split):
            number = int(text.split()[1])
            assert text == f"Title {number}\n\nAbout {number}\n\nBody {number}"
            assert label == sentiments[number % 3], "ties go to negative, then neutral"
    assert data.prompt.startswith("<|user|>\n新闻内容：{text}\n")


# ------------------------------------------------------------------------------------------------ FinLLM


def test_finllm_maps_both_sources_correctly(config: Configure, tmp_path: Path) -> None:
    degrees = ("strong", "moderately", "mildly")
    seven = [f"{degree} {sign}" for sign in ("negative", "positive") for degree in degrees]
    seven += ["negative", "neutral", "positive"]
    ask = "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."
    fingpt = pl.DataFrame(
        {
            "input": [f"news {n}" for n in range(90)],
            "output": [seven[n % 9] for n in range(90)],
            "instruction": [ask] * 90,
        }
    )
    (tmp_path / "fingpt").mkdir()
    fingpt.write_parquet(tmp_path / "fingpt" / "train-00000-of-00001-abc.parquet")
    twitter = pl.DataFrame({"text": [f"tweet {n}" for n in range(60)], "label": [n % 3 for n in range(60)]})
    (tmp_path / "twitter").mkdir()
    twitter.write_csv(tmp_path / "twitter" / "sent_train.csv")
    places = [f"data.parts.{name}.files={tmp_path / name}" for name in ("fingpt", "twitter")]
    table, _ = _load(config, "data=finllm", *places)
    assert table.labels.names == ("negative", "neutral", "positive")
    assert table.labels.words == (" negative", " neutral", " positive")
    right = {f"news {n}": seven[n % 9].split()[-1] for n in range(90)}
    right |= {f"tweet {n}": {0: "negative", 1: "positive", 2: "neutral"}[n % 3] for n in range(60)}
    assert dict(pair for split in SPLITS for pair in _names(table, split)) == right
    assert _heights(table) == (63 + 42, 9 + 6, 18 + 12)
    assert set(table.splits["test"]["domain"]) == {"fingpt", "twitter"}


def test_finllm_copies_do_not_reach_the_test_split(config: Configure, tmp_path: Path) -> None:
    """Published: about 80 % of the test rows were also training rows, because every row occurs several times."""
    for name, columns in (("fingpt", ("input", "output")), ("twitter", ("text", "label"))):
        (tmp_path / name).mkdir()
        labels = [("neutral", "positive")[n % 2] if name == "fingpt" else 2 - n % 2 for n in range(40)] * 5
        texts = [f"{'shared' if n < 10 else name} {n}" for n in range(40)] * 5
        pl.DataFrame({columns[0]: texts, columns[1]: labels}).write_csv(tmp_path / name / "all.csv")
    table, _ = _load(
        config, "data=finllm", *(f"data.parts.{name}.files={tmp_path / name}" for name in ("fingpt", "twitter"))
    )
    assert table.ledger.buckets["duplicate"] >= 2 * 40 * 4
    texts = {split: set(part["text"]) for split, part in table.splits.items()}
    assert texts["train"].isdisjoint(texts["test"] | texts["validation"])
    assert texts["validation"].isdisjoint(texts["test"])
    assert sum(map(len, texts.values())) == table.ledger.buckets["used"] == 70


# ------------------------------------------------------------------------------------------------ the general forms


ROWS = [{"id": str(n), "text": f"利好消息{n}", "label": ("a", "b")[n % 2]} for n in range(40)]


def _expected(table: Dataset) -> None:
    assert {pair for split in SPLITS for pair in _names(table, split)} == {(row["text"], row["label"]) for row in ROWS}
    assert _heights(table) == (32, 4, 4)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "arrow", "feather", "xlsx"])
def test_table_in_every_format_with_mapped_columns(config: Configure, tmp_path: Path, suffix: str) -> None:
    frame = pl.DataFrame(ROWS).rename({"id": "nr", "text": "body", "label": "y"})
    file = tmp_path / f"posts.{suffix}"
    write: dict[str, Callable[[Any], object]] = {
        "csv": frame.write_csv,
        "tsv": lambda to: frame.write_csv(to, separator="\t"),
        "json": frame.write_json,
        "jsonl": frame.write_ndjson,
        "parquet": frame.write_parquet,
        "arrow": frame.write_ipc,
        "feather": frame.write_ipc_stream,
        "xlsx": lambda to: frame.to_pandas().to_excel(to, index=False),
    }
    write[suffix](file)
    named = ["data.columns.id=nr", "data.columns.text=body", "data.columns.label=y"]
    table, _ = _load(config, "data=table", f"data.files={tmp_path}/*.{suffix}", *named)
    _expected(table)
    assert table.splits["test"]["id"].is_in([row["id"] for row in ROWS]).all()


def test_alpaca_and_messages_give_the_table(config: Configure, tmp_path: Path) -> None:
    _json(
        tmp_path / "alpaca",
        "all.json",
        [{"instruction": row["text"], "input": "", "output": row["label"]} for row in ROWS],
    )
    chats = [[{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}] for row in ROWS]
    _json(tmp_path / "messages", "all.jsonl", [{"messages": chat} for chat in chats])
    _json(tmp_path / "table", "all.json", ROWS)
    tables = [
        _load(config, f"data={name}", f"data.files={tmp_path / name}")[0] for name in ("table", "alpaca", "messages")
    ]
    for table in tables:
        _expected(table)
        for split in SPLITS:
            assert _names(table, split) == _names(tables[0], split)


def test_hub_folder_gives_the_table(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    _json(tmp_path / "set", "train.jsonl", ROWS)
    only = ["~data.hub.splits.validation", "~data.hub.splits.test"]
    table, _ = _load(config, "data=hub", f"data.hub.id={tmp_path / 'set'}", *only)
    _expected(table)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "source", "read"), [("instruct_sentiment_en", "alpaca", 17_867), ("aidf_shape_en_news", "table", 9_076)]
)
def test_public_set(config: Configure, shared_data: Path, name: str, source: str, read: int) -> None:
    table, _ = _load(config, f"data={source}", f"data.files={shared_data / name}")
    assert table.ledger.read.total() == read
    assert table.labels.names == ("negative", "neutral", "positive")
    table.require("train", "validation", "test")
