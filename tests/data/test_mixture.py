"""A mixture consists of its parts, each processed by its rules, and training and held-out rows share nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import Data, RunConfig
from finsa.data.dataset import Dataset, load
from finsa.data.splits import SPLITS
from finsa.errors import DataError

Configure = Callable[..., RunConfig]
Row = tuple[str | None, ...]


def _part(
    config: Configure, folder: Path, rows: list[Row], columns: tuple[str, ...] = ("text", "label"), **changes: Any
) -> Data:
    folder.mkdir(parents=True)
    pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row").write_parquet(folder / "all.parquet")
    return config("data=table").data.model_copy(update={"files": str(folder), **changes})


def _mixture(config: Configure, parts: dict[str, Data], **changes: Any) -> Data:
    return config("data=mixture", "data.cache=null").data.model_copy(update={"parts": parts, **changes})


def _many(prefix: str, count: int, labels: str = "ab") -> list[Row]:
    return [(f"{prefix}{n}", labels[n % len(labels)]) for n in range(count)]


def _texts(table: Dataset, split: str) -> list[str]:
    return table.splits[split]["text"].to_list()


def _balanced(table: Dataset) -> Dataset:
    assert table.ledger.read.total() == table.ledger.buckets.total()
    assert table.ledger.buckets["used"] == sum(part.height for part in table.splits.values())
    assert table.dropped.height == table.ledger.dropped()
    return table


TEXT = st.sampled_from([None, "", "x", " X", "y", "z", "净利", "u", "v", "w", "公告", "1", "2", "3"])
ROWS = st.lists(st.tuples(TEXT, st.sampled_from([None, "a", "A", "b", "strange"])), min_size=1, max_size=20)


@settings(deadline=None, max_examples=30)
@given(first=ROWS, second=ROWS)
def test_ledger_balances_and_nothing_held_out_is_trained_on(
    config: Configure, first: list[Row], second: list[Row]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            name: _part(config, Path(folder) / name, rows, labels=("a", "b"), on_unknown_label="drop")
            for name, rows in {"one": first, "two": second}.items()
        }
        table = _balanced(load(_mixture(config, parts, labels=("a", "b"))))
    assert table.ledger.read.total() == len(first) + len(second)
    assert table.ledger.buckets["empty text"] == sum(not text for text, _ in first + second)
    folded = {split: {text.lower().strip() for text in _texts(table, split)} for split in SPLITS}
    assert folded["train"].isdisjoint(folded["validation"] | folded["test"])
    assert folded["validation"].isdisjoint(folded["test"])


def test_parts_are_split_as_they_are_alone(config: Configure, tmp_path: Path) -> None:
    split = config("data=table").data.split
    parts = {
        "one": _part(
            config, tmp_path / "one", _many("x", 50), split=split.model_copy(update={"rule": "random", "seed": 1})
        ),
        "two": _part(config, tmp_path / "two", _many("y", 80), split=split.model_copy(update={"test": 0.3})),
    }
    alone = {name: load(part) for name, part in parts.items()}
    table = _balanced(load(_mixture(config, parts)))
    for split_name in SPLITS:
        assert _texts(table, split_name) == [text for one in alone.values() for text in _texts(one, split_name)]


def test_the_domain_is_that_of_the_row_or_of_its_part(config: Configure, tmp_path: Path) -> None:
    parts = {
        "own": _part(
            config, tmp_path / "own", [(*row, "posts") for row in _many("x", 20)], ("text", "label", "domain")
        ),
        "named": _part(config, tmp_path / "named", _many("y", 20), domain="news"),
        "plain": _part(config, tmp_path / "plain", _many("z", 20)),
    }
    table = load(_mixture(config, parts))
    domains = {
        text[0]: domain for part in table.splits.values() for text, domain in part.select("text", "domain").iter_rows()
    }
    assert domains == {"x": "posts", "y": "news", "z": "plain"}
    news = _balanced(load(_mixture(config, parts, domain="news")))
    assert {text[0] for split in SPLITS for text in _texts(news, split)} == {"y"}
    assert news.ledger.buckets == {"filtered: not of domain news": 40, "used": 20}


# ------------------------------------------------------------------------------------------------ labels


def test_spellings_of_two_parts_are_one_class(config: Configure, tmp_path: Path) -> None:
    parts = {
        "one": _part(config, tmp_path / "one", _many("x", 20, "PN")),
        "two": _part(config, tmp_path / "two", _many("y", 40, "pn")),
    }
    table = _balanced(load(_mixture(config, parts)))
    assert table.labels.names == ("n", "p")
    assert table.ledger.buckets == {"used": 60}


def test_part_may_have_one_class_only(config: Configure, tmp_path: Path) -> None:
    parts = {
        "one": _part(config, tmp_path / "one", _many("x", 20, "a")),
        "two": _part(config, tmp_path / "two", _many("y", 20, "b")),
    }
    assert load(_mixture(config, parts)).labels.names == ("a", "b")


def test_label_that_the_mixture_does_not_list_is_reported(config: Configure, tmp_path: Path) -> None:
    parts = {
        "one": _part(config, tmp_path / "one", _many("x", 20)),
        "two": _part(config, tmp_path / "two", _many("y", 20, "ac"), labels=("a", "c")),
    }
    with pytest.raises(
        DataError, match=r"data\.on_unknown_label: 10 rows have an unknown label: 'c' \(10 rows\); known are a, b"
    ):
        load(_mixture(config, parts, labels=("a", "b")))
    dropped = _balanced(load(_mixture(config, parts, labels=("a", "b"), on_unknown_label="drop")))
    assert dropped.ledger.buckets == {"used": 30, "unknown label": 10}
    kept = _balanced(load(_mixture(config, parts, labels=("a", "b"), on_unknown_label="keep")))
    assert kept.labels.names == ("a", "b", "c")


def test_the_label_map_of_a_part_takes_precedence(config: Configure, tmp_path: Path) -> None:
    """Twitter's 0 bearish 1 bullish 2 neutral, with another data set whose 0 means something else."""
    rows = [(f"x{n}", str(n % 2)) for n in range(20)]
    parts = {
        "one": _part(config, tmp_path / "one", rows, label_map={"0": "down", "1": "up"}),
        "two": _part(
            config, tmp_path / "two", [(f"y{text}", label) for text, label in rows], label_map={"0": "up", "1": "down"}
        ),
    }
    table = load(_mixture(config, parts, labels=("down", "up")))
    for part in table.splits.values():
        for text, label in part.select("text", "label").iter_rows():
            assert label == (int(text.split("x")[1]) + text.startswith("y")) % 2


# ------------------------------------------------------------------------------------------------ shared between parts


def test_leaks_between_parts_leave_training(config: Configure, tmp_path: Path) -> None:
    for name, rows in {
        "one/train": [("s", "a"), *_many("x", 4)],
        "one/test": _many("t", 2),
        "two/train": [*_many("y", 4), ("t0", "a")],
        "two/test": [("s ", "b"), ("q", "a")],
    }.items():
        file = tmp_path / f"{name}.parquet"
        file.parent.mkdir(exist_ok=True)
        pl.DataFrame(rows, schema=["text", "label"], orient="row").write_parquet(file)
    base = config("data=table").data
    split = base.split.model_copy(update={"rule": "random", "validation": 0.3})
    parts = {name: base.model_copy(update={"files": str(tmp_path / name), "split": split}) for name in ("one", "two")}
    table = _balanced(load(_mixture(config, parts)))
    gone = table.dropped.sort("text").select("text", "fate").rows()
    assert [text for text, _ in gone] == ["s", "t0"]
    assert {fate for _, fate in gone} <= {"leak: training copy of a test row", "leak: validation copy of a test row"}
    assert _texts(table, "test") == ["t0", "t1", "s", "q"]
    with pytest.raises(DataError, match=r"data\.on_leak: "):
        load(_mixture(config, parts, on_leak="error"))


def test_ids_of_two_parts_are_not_mixed_up(config: Configure, tmp_path: Path) -> None:
    """Both parts have the same row numbers; a variant of row 7 of one part is unrelated to row 7 of the other."""
    columns = ("id", "text", "label", "parent")
    one: list[Row] = [(str(n), f"x{n}", "ab"[n % 2], None) for n in range(30)]
    two: list[Row] = [(f"v{n}", f"y{n}", "ab"[n % 2], str(n)) for n in range(30)]
    parts = {"one": _part(config, tmp_path / "one", one, columns), "two": _part(config, tmp_path / "two", two, columns)}
    assert _balanced(load(_mixture(config, parts))).ledger.buckets == {"used": 60}
    together = load(_part(config, tmp_path / "both", one + two, columns))
    place = {text: split for split in SPLITS for text in _texts(together, split)}
    assert all(place[f"x{n}"] == place[f"y{n}"] for n in range(30))


def test_copies_and_conflicts_across_parts(config: Configure, tmp_path: Path) -> None:
    split = config("data=table").data.split
    rows = {
        "one": [*_many("x", 30), ("same", "a"), ("torn", "a")],
        "two": [*_many("y", 30), ("SAME", "a"), ("torn", "b")],
    }
    parts = {name: _part(config, tmp_path / name, part, split=split) for name, part in rows.items()}
    alone = {name: load(part) for name, part in parts.items()}
    table = _balanced(load(_mixture(config, parts)))
    texts = [text.lower() for name in SPLITS for text in _texts(table, name)]
    assert len(texts) == len(set(texts))
    assert sum(one.ledger.buckets["used"] for one in alone.values()) == 64
    kept = _balanced(load(_mixture(config, parts, on_duplicate="keep", on_conflict="keep", on_leak="keep")))
    assert kept.ledger.buckets == {"used": 64}
    assert any("keep" in note for note in kept.ledger.notes)


def test_ratios_are_those_of_what_is_left(config: Configure, tmp_path: Path) -> None:
    """Ratios are applied last: removed duplicates and leaks do not count."""
    parts = {
        "one": _part(config, tmp_path / "one", _many("x", 100) * 2),
        "two": _part(config, tmp_path / "two", _many("y", 50)),
    }
    table = _balanced(load(_mixture(config, parts, ratios={"one": 1.0, "two": 2.0})))
    trained = [text[0] for text in _texts(table, "train")]
    assert (trained.count("x"), trained.count("y")) == (21, 42)
    assert table.ledger.buckets["filtered: mixture ratio"] == 80 - 21
    whole = load(_mixture(config, parts))
    assert _texts(table, "test") == _texts(whole, "test")


def test_mixture_of_mixtures(config: Configure, tmp_path: Path) -> None:
    inner = _mixture(
        config,
        {
            "one": _part(config, tmp_path / "one", _many("x", 100)),
            "two": _part(config, tmp_path / "two", _many("y", 50)),
        },
        ratios={"one": 1.0, "two": 1.0},
    )
    outer = _mixture(
        config,
        {"both": inner, "three": _part(config, tmp_path / "three", _many("z", 200))},
        ratios={"both": 2.0, "three": 1.0},
    )
    table = _balanced(load(outer))
    trained = [text[0] for text in _texts(table, "train")]
    assert [trained.count(name) for name in "xyz"] == [42, 42, 42]
    assert set(table.splits["train"]["domain"]) == {"one", "two", "three"}


def test_parts_of_any_source(config: Configure, tmp_path: Path) -> None:
    """Articles, chats and generated rows have different column orders and different missing columns."""
    (tmp_path / "news").mkdir()
    news = [{"id": n, "Title": f"T{n}", "Description": "D", "Content": "C", "Type": "Markets"} for n in range(30)]
    votes = [{"id": n, "entities": [{"sentiment": ("negative", "positive")[n % 2]}]} for n in range(30)]
    chats = [
        {"messages": [{"role": "user", "content": f"c{n}"}, {"role": "assistant", "content": "neutral"}]}
        for n in range(30)
    ]
    for name, content in (("news/news.json", news), ("news/labels.json", votes), ("chats.json", chats)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    parts = {
        "news": config("data=aidf_news", f"data.files={tmp_path}/news").data,
        "chats": config("data=messages", f"data.files={tmp_path}/chats.json").data,
        "drawn": config("data=generated", "data.generator.rows=60").data,
    }
    labels = ("negative", "neutral", "positive", "利空", "中性", "利好")
    table = _balanced(load(_mixture(config, parts, labels=labels)))
    assert table.ledger.buckets == {"used": 120}
    drawn = load(parts["drawn"])
    for split in SPLITS:
        assert _texts(table, split)[-drawn.splits[split].height :] == _texts(drawn, split)
    assert set(table.splits["train"]["domain"]) == {"news", "chats", "forum"}


# ------------------------------------------------------------------------------------------------ messages


def test_an_error_in_a_part_is_reported_with_its_key(config: Configure, tmp_path: Path) -> None:
    good = _part(config, tmp_path / "good", _many("x", 20))
    bad = _part(config, tmp_path / "data.files", [*_many("y", 20), ("y0", "b")], on_conflict="error")
    with pytest.raises(DataError) as caught:
        load(_mixture(config, {"good": good, "bad": bad}))
    message = str(caught.value)
    assert message.startswith("data.parts.bad.on_conflict: 2 rows have the text of another row and a different label.")
    assert "Set data.parts.bad.on_conflict=drop (counted) or data.parts.bad.on_conflict=keep" in message
    with pytest.raises(DataError, match=rf"data\.parts\.bad\.files: no such file or folder: {tmp_path}/data\.files/no"):
        load(_mixture(config, {"good": good, "bad": bad.model_copy(update={"files": f"{tmp_path}/data.files/no"})}))


def test_notes_name_their_part_and_are_reported_once(config: Configure, tmp_path: Path) -> None:
    rows: list[Row] = [("1", f"x{n}", "ab"[n % 2]) for n in range(20)]
    parts = {
        "one": _part(config, tmp_path / "one", [*rows, ("2", "x0", "b")], ("id", "text", "label"), on_conflict="keep"),
        "two": _part(config, tmp_path / "two", _many("y", 20)),
    }
    notes = load(_mixture(config, parts)).ledger.notes
    assert notes == [
        "one: 20 rows share their id with another row of their file, such as '1'",
        "one: 2 rows have the text of another row and a different label; kept, because data.parts.one.on_conflict=keep",
    ]
