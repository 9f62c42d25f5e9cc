"""Every row read ends in one bucket; no test row is trained on; errors name the fix."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finsa.config import Data, RunConfig
from finsa.data.dataset import Dataset, load
from finsa.errors import DataError
from finsa.session import Session

Configure = Callable[..., RunConfig]
Rows = list[tuple[str | None, str | None]]


def _data(config: Configure, folder: Path, tables: dict[str, Rows], **changes: object) -> Data:
    for name, rows in tables.items():
        pl.DataFrame(rows, schema={"text": pl.String, "label": pl.String}, orient="row").write_parquet(
            folder / f"{name}.parquet"
        )
    return config("data=table").data.model_copy(update={"files": str(folder), **changes})


def _texts(table: Dataset, split: str) -> list[str]:
    return table.splits[split]["text"].to_list()


def _many(prefix: str, count: int) -> Rows:
    return [(f"{prefix}{n}", "ab"[n % 2]) for n in range(count)]


TEXT = st.sampled_from([None, "", " ", "x", "x ", " y", "z", "净利", "u", "v", "w"])
LABEL = st.sampled_from([None, "", "a", "b ", "b", "c", "strange"])
ROWS = st.lists(st.tuples(TEXT, LABEL), max_size=25)


@settings(deadline=None, max_examples=60)
@given(tables=st.dictionaries(st.sampled_from(["train", "valid", "test", "other"]), ROWS, min_size=1))
def test_ledger_balances(config: Configure, tables: dict[str, Rows]) -> None:
    assume(any(rows for name, rows in tables.items() if name != "other" or len(tables) == 1))
    with tempfile.TemporaryDirectory() as folder:
        table = load(_data(config, Path(folder), tables, labels=("a", "b", "c"), on_unknown_label="drop"))
    named = {name: rows for name, rows in tables.items() if name != "other"} or tables
    read = [row for rows in named.values() for row in rows]
    ledger, parts = table.ledger, table.splits
    assert ledger.read.total() == ledger.buckets.total() == len(read)
    assert ledger.buckets["used"] == sum(part.height for part in parts.values())
    assert table.dropped.height == len(read) - ledger.buckets["used"] == ledger.dropped()
    assert Counter(table.dropped["fate"]) == Counter(
        {name: n for name, n in ledger.buckets.items() if name != "used" and n}
    )
    assert ledger.buckets["empty text"] == sum(not (text or "").strip() for text, _ in read)
    kept = [row for row in read if (row[0] or "").strip()]
    assert ledger.buckets["unknown label"] == sum((label or "").strip() not in ("a", "b", "c") for _, label in kept)
    for name, part in parts.items():
        counts = Counter(part["label"].to_list())
        assert ledger.splits[name] == {label: counts[number] for number, label in enumerate("abc")}
    trained = set(_texts(table, "train"))
    assert trained.isdisjoint(_texts(table, "validation"))
    assert trained.isdisjoint(_texts(table, "test"))


def test_copies_of_held_out_rows_leave_training_and_are_counted(config: Configure, tmp_path: Path) -> None:
    tables: dict[str, Rows] = {
        "train": [("x", "a"), (" x ", "b"), ("y", "a"), ("z", "b"), ("w", "a")],
        "valid": [("y", "a"), ("v", "b")],
        "test": [("x", "a"), ("u", "b")],
    }
    table = load(_data(config, tmp_path, tables))
    assert _texts(table, "train") == ["z", "w"]
    assert _texts(table, "validation") == ["y", "v"]
    assert _texts(table, "test") == ["x", "u"]
    assert table.ledger.buckets == {
        "conflicting label": 2,  # x is both a and b in the training file itself
        "leak: training copy of a validation row": 1,
        "used": 6,
    }
    kept = load(_data(config, tmp_path, tables, on_conflict="keep"))
    assert _texts(kept, "train") == ["z", "w"]
    assert kept.ledger.buckets["leak: training copy of a test row"] == 2


def test_copies_are_also_found_when_splitting(config: Configure, tmp_path: Path) -> None:
    rows: Rows = [("same", "a")] * 30 + _many("t", 30)
    assert load(_data(config, tmp_path, {"all": rows})).ledger.buckets == {"duplicate": 29, "used": 31}
    table = load(_data(config, tmp_path, {"all": rows}, on_duplicate="keep"))
    held = {*_texts(table, "validation"), *_texts(table, "test")}
    assert "same" in held
    assert held.isdisjoint(_texts(table, "train"))
    assert table.ledger.buckets["leak: training copy of a test row"] > 0
    assert table.ledger.notes == ["29 rows have text and label of an earlier row; kept, because data.on_duplicate=keep"]


def test_validation_copies_of_test_rows_are_counted(config: Configure, tmp_path: Path) -> None:
    """Validation selects the checkpoint: a test row among its rows would let the test split select."""
    tables = {"train": _many("t", 6), "valid": [*_many("v", 4), ("x", "a")], "test": [*_many("s", 4), ("x", "a")]}
    table = load(_data(config, tmp_path, tables))
    assert _texts(table, "test") == ["s0", "s1", "s2", "s3", "x"]
    assert [(bucket, count) for bucket, count in table.ledger.buckets.items() if "copy" in bucket] == [
        ("leak: validation copy of a test row", 1)
    ]


def test_an_unknown_label_is_reported_with_its_count_and_the_fix(config: Configure, tmp_path: Path) -> None:
    rows: Rows = [("x", "positive"), ("y", "negative"), ("z", "postive"), ("w", "postive"), ("v", None)]
    with pytest.raises(DataError) as caught:
        load(_data(config, tmp_path, {"all": rows}, labels=("positive", "negative")))
    message = str(caught.value)
    assert "unknown label: 'postive' (2 rows), '(none)' (1 row); known are positive, negative." in message
    assert "Did you mean 'positive'?" in message
    assert "List them all in data.labels. Set data.on_unknown_label=drop (counted)" in message
    assert "\n  " + str(tmp_path / "all.parquet") + ":3: z [postive]" in message


def test_label_only_in_the_test_split_is_unknown(config: Configure, tmp_path: Path) -> None:
    tables: dict[str, Rows] = {"train": _many("t", 4), "test": [("x", "c"), ("y", "a")]}
    with pytest.raises(DataError, match=r"unknown label: 'c' \(1 row\); known are a, b\."):
        load(_data(config, tmp_path, tables))


def test_dropped_labels_are_counted(config: Configure, tmp_path: Path) -> None:
    rows: Rows = [*_many("t", 10), ("x", "c"), ("y", None)]
    table = load(_data(config, tmp_path, {"all": rows}, labels=("a", "b"), on_unknown_label="drop"))
    assert table.ledger.buckets == {"unknown label": 2, "used": 10}


def test_labels_found_are_sorted_and_numbered(config: Configure, tmp_path: Path) -> None:
    rows: Rows = [(f"t{n}", "cab"[n % 3]) for n in range(30)]
    table = load(_data(config, tmp_path, {"train": rows}))
    assert table.labels.names == table.labels.words == ("a", "b", "c")
    label_of = dict(rows)
    for part in table.splits.values():
        for text, number in part.select("text", "label").iter_rows():
            assert table.labels.names[number] == label_of[text]


def test_configured_order_gives_the_numbers(config: Configure, tmp_path: Path) -> None:
    table = load(
        _data(config, tmp_path, {"train": _many("t", 10), "test": [("x", "a"), ("y", "b")]}, labels=("b", "a"))
    )
    assert table.splits["test"]["label"].to_list() == [1, 0]


def test_map_of_labels_gives_words(config: Configure, tmp_path: Path) -> None:
    table = load(_data(config, tmp_path, {"test": [("x", "b"), ("y", "a")]}, labels={"a": "涨", "b": "跌"}))
    assert (table.labels.names, table.labels.words) == (("a", "b"), ("涨", "跌"))
    assert table.splits["test"]["label"].to_list() == [1, 0]


def _labeled(config: Configure, folder: Path, labels: list[str], *overrides: str) -> Dataset:
    """A file of forty rows with these labels in turn."""
    rows = "".join(f"text {number},{labels[number % len(labels)]}\n" for number in range(40))
    (folder / "rows.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    return load(config("data=table", f"data.files={folder / 'rows.csv'}", *overrides).data)


@pytest.mark.parametrize(
    ("written", "names"),
    [
        (["-1.0", "0.0", "1.0"], ("-1", "0", "1")),
        (["-1", "1.0", "0", "1", "-1.0", "0.0"], ("-1", "0", "1")),
        (["10", "9", "-2"], ("-2", "9", "10")),
        (["0.5", "0.50", "1.5"], ("0.5", "1.5")),
        (["007", "7"], ("007", "7")),  # codes of digits
        (["True", "FALSE", "true"], ("FALSE", "True")),
        (["1", "one"], ("1", "one")),
    ],
)
def test_equal_numbers_are_one_label(
    config: Configure, tmp_path: Path, written: list[str], names: tuple[str, ...]
) -> None:
    assert _labeled(config, tmp_path, written).labels.names == names


@pytest.mark.parametrize(
    ("written", "labels", "names"),
    [
        (["-1.0", "0.0", "1.0"], "[-1,0,1]", ("-1", "0", "1")),
        (["-1", "0", "1"], "[1.0,-1.0,0.0]", ("1.0", "-1.0", "0.0")),
        (["True", "False"], "[false,true]", ("false", "true")),
        (["yes", "no"], "[no,yes]", ("no", "yes")),
        (["0.0", "1.0"], "{0: bad, 1: good}", ("0", "1")),
    ],
)
def test_numbers_and_booleans_may_be_listed(
    config: Configure, tmp_path: Path, written: list[str], labels: str, names: tuple[str, ...]
) -> None:
    table = _labeled(config, tmp_path, written, f"data.labels={labels}")
    assert table.labels.names == names
    assert table.ledger.buckets == {"used": 40}


def test_number_that_is_listed_twice_is_an_error(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.labels: the number 1 is listed more than once: 0, 1, 1\.0"):
        _labeled(config, tmp_path, ["0", "1"], "data.labels=[0,1,1.0]")


def test_labels_that_yaml_reads_as_booleans_are_reported(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="YAML reads yes, no, on and off as true and false: quote them"):
        _labeled(config, tmp_path, ["yes", "no"], "data.labels=[true,false]")


def test_unused_key_of_a_label_map_is_noted(config: Configure, tmp_path: Path) -> None:
    table = _labeled(config, tmp_path, ["negative", "positive"], "data.label_map={negative: bad, postive: good}")
    assert table.labels.names == ("bad", "positive")
    assert table.ledger.notes == [
        "data.label_map: no row has the label 'postive'. Did you mean 'positive'? Not translated: 'positive'."
    ]


def test_label_map_that_translates_nothing_is_an_error(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no row has the label '1', '2'\. Not translated: 'a', 'b'\. The map translates no"
    ):
        _labeled(config, tmp_path, ["a", "b"], "data.label_map={1: x, 2: y}")


def test_label_map_of_rows_that_are_classes_already_needs_no_note(config: Configure, tmp_path: Path) -> None:
    assert _labeled(config, tmp_path, ["a", "b"], "data.label_map={1: a, 2: b}").ledger.notes == []


def test_a_missing_number_is_not_a_label(config: Configure, tmp_path: Path) -> None:
    """pandas keeps a column of numbers with holes as floats and NaN."""
    numbers = [float("nan") if number % 4 == 0 else float(number % 2) for number in range(40)]
    table = pl.DataFrame({"text": [f"text {number}" for number in range(40)], "label": numbers})
    table.write_parquet(tmp_path / "rows.parquet")
    data = config("data=table", f"data.files={tmp_path / 'rows.parquet'}", "data.on_unknown_label=drop").data
    loaded = load(data)
    assert loaded.labels.names == ("0", "1")
    assert loaded.ledger.buckets == {"used": 30, "unknown label": 10}


def test_texts_and_labels_are_stripped(config: Configure, tmp_path: Path) -> None:
    table = load(_data(config, tmp_path, {"test": [("\u3000x\n", " a"), ("y", "b\t")]}))
    assert (_texts(table, "test"), table.labels.names) == (["x", "y"], ("a", "b"))


@pytest.mark.parametrize(("count", "each"), [(50, 3), (51, 3), (77, 6), (150, 4)])
def test_more_than_fifty_labels_need_enough_rows(config: Configure, tmp_path: Path, count: int, each: int) -> None:
    """77 are Banking77, 150 CLINC150."""
    rows: Rows = [(f"t{n}", f"label {n % count:03d}") for n in range(count * each)]
    data = _data(config, tmp_path, {"all": rows})
    listed = load(data.model_copy(update={"labels": tuple(f"label {n:03d}" for n in range(count))}))
    assert len(listed.labels) == count
    if count != 51:
        assert load(data).labels == listed.labels
    else:
        with pytest.raises(
            DataError, match="column 'label' has 51 distinct values in 153 rows, such as .* that is not a label column"
        ):
            load(data)


@pytest.mark.parametrize("rows", [[("x", "a"), ("y", "a")], [("x", None), ("y", "")]])
def test_fewer_than_two_labels_are_refused(config: Configure, tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(DataError, match="at least two labels are needed, found .* in data=table"):
        load(_data(config, tmp_path, {"train": rows}))


def test_a_file_with_only_a_header_is_one_message(config: Configure, tmp_path: Path) -> None:
    data = _data(config, tmp_path, {"train": []})
    with pytest.raises(
        DataError, match=r"data\.files: there are no rows in .*train.*, only a header; give a file with"
    ):
        load(data)


def test_one_of_several_files_with_only_a_header_is_noted(config: Configure, tmp_path: Path) -> None:
    table = load(_data(config, tmp_path, {"train": [("x", "a"), ("y", "b")], "valid": [], "test": [("z", "a")]}))
    (note,) = [note for note in table.ledger.notes if "no rows" in note]
    assert re.fullmatch(r"valid.*: has a header and no rows", note)


def test_files_without_usable_rows_are_reported_with_reasons(config: Configure, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n' * 3, encoding="utf-8")
    data = config("data=messages").data.model_copy(update={"files": str(tmp_path)})
    with pytest.raises(DataError) as caught:
        load(data)
    reason = "unreadable: the last turn is not an answer, and there is no label (3 rows)"
    assert str(caught.value) == f"data.files: no row of data=messages can be used: {reason}"


def test_one_file_is_divided_by_the_published_rule(config: Configure, tmp_path: Path) -> None:
    table = load(_data(config, tmp_path, {"all": _many("t", 100)}))
    assert table.ledger.splits == {
        "train": {"a": 40, "b": 40},
        "validation": {"a": 5, "b": 5},
        "test": {"a": 5, "b": 5},
    }


@pytest.mark.parametrize(("given", "filled"), [("test", "validation"), ("valid", "test")])
def test_missing_split_is_filled_from_training_rows(config: Configure, tmp_path: Path, given: str, filled: str) -> None:
    table = load(_data(config, tmp_path, {"train": _many("t", 40), given: _many("s", 6)}))
    kept = "validation" if given == "valid" else "test"
    assert _texts(table, kept) == [f"s{n}" for n in range(6)]
    assert table.ledger.splits[filled] == {"a": 2, "b": 2}
    assert table.ledger.splits["train"] == {"a": 18, "b": 18}
    assert all(text.startswith("t") for text in _texts(table, filled))


def test_given_splits_are_not_changed(config: Configure, tmp_path: Path) -> None:
    tables = {"train": _many("t", 5), "dev": _many("v", 3), "test": _many("s", 4)}
    table = load(_data(config, tmp_path, tables))
    assert {split: part.height for split, part in table.splits.items()} == {"train": 5, "validation": 3, "test": 4}
    table.require("train", "validation", "test")


def test_files_of_one_split_add_up(config: Configure, tmp_path: Path) -> None:
    _data(
        config, tmp_path, {"train": _many("t", 6), "valid": _many("v", 2), "dev": _many("d", 3), "test": _many("s", 2)}
    )
    table = load(config("data=table").data.model_copy(update={"files": str(tmp_path)}))
    assert sorted(_texts(table, "validation")) == ["d0", "d1", "d2", "v0", "v1"]


def test_evaluation_set_alone_is_not_divided(config: Configure, tmp_path: Path) -> None:
    table = load(_data(config, tmp_path, {"test": _many("s", 10)}))
    assert {split: part.height for split, part in table.splits.items()} == {"train": 0, "validation": 0, "test": 10}
    with pytest.raises(
        DataError, match=r"the train split is empty \(train 0, validation 0, test 10\)\. Give it a file"
    ):
        table.require("test", "train")


def test_a_given_split_without_remaining_rows_is_not_refilled(config: Configure, tmp_path: Path) -> None:
    """The user's own test file was dropped row by row: training rows must not silently take its place."""
    tables: dict[str, Rows] = {"train": _many("t", 40), "test": [("x", "strange"), ("", "a")]}
    data = _data(config, tmp_path, tables, labels=("a", "b"), on_unknown_label="drop")
    with pytest.raises(DataError, match="the test split is empty"):
        load(data).require("test")


def _with_domains(config: Configure, folder: Path, **changes: object) -> Data:
    rows = [(f"t{n}", "ab"[n % 2], ("news", "forum", None)[n % 3]) for n in range(60)]
    frame = pl.DataFrame(rows, schema=["text", "label", "domain"], orient="row")
    frame.write_csv(folder / "all.csv")
    return config("data=table").data.model_copy(update={"files": str(folder), **changes})


def test_domain_keeps_its_rows_and_counts_the_others(config: Configure, tmp_path: Path) -> None:
    table = load(_with_domains(config, tmp_path, domain="news"))
    assert table.ledger.buckets == {"filtered: not of domain news": 40, "used": 20}
    assert {domain for part in table.splits.values() for domain in part["domain"]} == {"news"}


def test_domain_that_no_row_has_is_reported(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(_with_domains(config, tmp_path, domain="nwes"))
    assert "nwes" in str(caught.value)
    assert "news" in str(caught.value)


def test_domain_of_a_table_without_domains_only_names_it(config: Configure, tmp_path: Path) -> None:
    assert load(_data(config, tmp_path, {"all": _many("t", 20)}, domain="news")).ledger.buckets == {"used": 20}


def test_same_call_gives_the_same_object_within_a_session(config: Configure, tmp_path: Path) -> None:
    data, session = _data(config, tmp_path, {"all": _many("t", 20)}), Session()
    assert load(data, session) is load(data.model_copy(), session)
    assert load(data, session) is not load(data.model_copy(update={"labels": ("b", "a")}), session)
    assert load(data, session) is not load(data)


def test_changed_file_is_read_again(config: Configure, tmp_path: Path) -> None:
    session = Session()
    first = load(_data(config, tmp_path, {"all": _many("t", 20)}), session)
    second = load(_data(config, tmp_path, {"all": _many("t", 22)}), session)
    assert (first.ledger.buckets["used"], second.ledger.buckets["used"]) == (20, 22)


def _fingerprint(config: Configure, folder: Path, name: str, rows: Rows, **changes: object) -> str:
    place = folder / name
    place.mkdir()
    return load(_data(config, place, {"all": rows}, **changes)).fingerprint


def test_fingerprints_distinguish_data(config: Configure, tmp_path: Path) -> None:
    rows = _many("t", 20)
    first = _fingerprint(config, tmp_path, "first", rows)
    assert first == _fingerprint(config, tmp_path, "again", rows)
    other_split = config("data=table").data.split.model_copy(update={"seed": 7})
    others = [
        _fingerprint(config, tmp_path, "text", [("changed", "a"), *rows[1:]]),
        _fingerprint(config, tmp_path, "last", [*rows[:-1], ("t19.", "b")]),
        _fingerprint(config, tmp_path, "label", [("t0", "b"), *rows[1:]]),
        _fingerprint(config, tmp_path, "fewer", rows[:-1]),
        _fingerprint(config, tmp_path, "split", rows, split=other_split),
        _fingerprint(config, tmp_path, "order", rows, labels=("b", "a")),
    ]
    assert len({first, *others}) == 7


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "read"), [("finfe_forum", 11_498), ("zh_news_mix", 13_479)])
def test_public_set_balances(config: Configure, shared_data: Path, name: str, read: int) -> None:
    table = load(config("data=table").data.model_copy(update={"files": str(shared_data / name)}))
    assert table.ledger.read.total() == table.ledger.buckets.total() == read
    table.require("train", "validation", "test")
    trained = set(_texts(table, "train"))
    assert trained.isdisjoint([*_texts(table, "validation"), *_texts(table, "test")])


# ------------------------------------------------------------------------------------------------ arbitrary files


SAMPLES = {
    ".csv": 'id,text,label,domain,parent\n1,利好消息,a,n,\n2,"下,跌\n了",b,,1\n3,平,a,,\n',
    ".tsv": "text\tlabel\n利好\ta\n跌\tb\n",
    ".jsonl": '{"id": 1, "text": "利好", "label": "a"}\n{"id": 2, "text": "跌", "label": "b"}\n',
    ".json": '[{"id": 1, "text": "利好", "label": "a"}, {"id": 2, "text": "跌", "label": ["b"]}]',
}
BITS = [
    b'"',
    b",",
    b"\n",
    b"\x00",
    b"\xff",
    b"{",
    b"]",
    rb"\ud83d",
    b"null",
    b"NaN",
    b'"text": 1,',
    "涨".encode("gbk"),
    b"\r",
    b"",
]
EDITS = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 9), st.sampled_from(BITS)), max_size=5)
POLICIES = st.sampled_from(["error", "drop", "keep"])


@settings(deadline=None, max_examples=150)
@given(
    suffix=st.sampled_from(sorted(SAMPLES)),
    edits=EDITS,
    policies=st.tuples(POLICIES, POLICIES, POLICIES, POLICIES),
    labels=st.sampled_from([None, ("a", "b")]),
)
def test_any_file_is_read_to_the_last_row_or_reported(
    config: Configure, suffix: str, edits: list[tuple[int, int, bytes]], policies: tuple[str, ...], labels: Any
) -> None:
    content = SAMPLES[suffix].encode()
    for place, length, bit in edits:
        content = content[:place] + bit + content[place + length :]
    keys = ("on_unknown_label", "on_duplicate", "on_conflict", "on_leak")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"all{suffix}"
        file.write_bytes(content)
        changes = {"files": str(file), "labels": labels, **dict(zip(keys, policies, strict=True))}
        try:
            table = load(config("data=table", "data.cache=null").data.model_copy(update=changes))
        except DataError as error:
            assert str(error).startswith("data.")  # noqa: PT017 - either outcome is right
        else:
            assert (
                table.ledger.read.total()
                == table.ledger.buckets.total()
                == table.ledger.dropped() + sum(part.height for part in table.splits.values())
            )


@pytest.mark.parametrize("codec", ["gb18030", "utf-8-sig", "utf-16"])
def test_encoding_is_noted_and_changes_nothing(config: Configure, tmp_path: Path, codec: str) -> None:
    content = "text,label\n" + "".join(f"第{n}条利好消息,{'ab'[n % 2]}\n" for n in range(20))
    tables = []
    for name, encoding in (("plain", "utf-8"), ("other", codec)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.csv").write_bytes(content.encode(encoding))
        tables.append(load(config("data=table").data.model_copy(update={"files": str(tmp_path / name), "cache": None})))
    plain, other = tables
    assert plain.fingerprint == other.fingerprint
    assert plain.ledger.notes == []
    assert len(other.ledger.notes) == 1
    assert other.ledger.notes[0].startswith("all.csv: ")


def test_unused_rows_are_shown_with_file_and_line(config: Configure, tmp_path: Path) -> None:
    good = "".join(f"t{n},{'ab'[n % 2]}\n" for n in range(10))
    (tmp_path / "all.csv").write_text(
        f"text,label\n{good}x,y,z\n,a\nt0,a\nlong {'涨' * 90},strange\n", encoding="utf-8"
    )
    table = load(config("data=table").data.model_copy(update={
        "files": str(tmp_path), "labels": ("a", "b"), "on_unknown_label": "drop", "cache": None
    }))  # fmt: skip
    assert table.ledger.buckets == {
        "unreadable: more fields than the header": 1,
        "empty text": 1,
        "duplicate": 1,
        "unknown label": 1,
        "used": 10,
    }
    assert table.ledger.examples == {
        "unreadable: more fields than the header": ["all.csv:12: x [y]"],
        "empty text": ["all.csv:13:  [a]"],
        "duplicate": ["all.csv:14: t0 [a]"],
        "unknown label": [f"all.csv:15: long {'涨' * 55} [strange]"],
    }
    assert table.dropped.columns == ["file", "line", "id", "text", "label", "fate"]
    assert table.dropped["line"].to_list() == [12, 13, 14, 15]


def test_group_column_keeps_rows_together(config: Configure, tmp_path: Path) -> None:
    rows = [(f"t{n}", "ab"[n % 2], f"firm {n // 4}") for n in range(120)]
    pl.DataFrame(rows, schema=["text", "label", "firm"], orient="row").write_csv(tmp_path / "all.csv")
    base = config("data=table", "data.cache=null").data
    table = load(
        base.model_copy(update={"files": str(tmp_path), "columns": base.columns.model_copy(update={"group": "firm"})})
    )
    groups = {split: set(part["group"]) for split, part in table.splits.items()}
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 30
    assert table.ledger.buckets == {"used": 120}


def test_variants_stay_with_their_parent(config: Configure, tmp_path: Path) -> None:
    """With the empty cells that CSV gives the originals."""
    rows = [(f"o{n}", f"t{n}", "ab"[n % 2], "") for n in range(40)]
    rows += [(f"v{n}", f"t{n} augmented", "ab"[n % 2], f"o{n}") for n in range(40)]
    pl.DataFrame(rows, schema=["id", "text", "label", "parent"], orient="row").write_csv(tmp_path / "all.csv")
    table = load(config("data=table", "data.cache=null").data.model_copy(update={"files": str(tmp_path)}))
    place = {name: split for split, part in table.splits.items() for name in part["id"]}
    assert all(place[f"o{n}"] == place[f"v{n}"] for n in range(40))
    assert {split: part.height for split, part in table.splits.items()} == {"train": 64, "validation": 8, "test": 8}


def test_labels_that_are_distributed_differently_are_noted(config: Configure, tmp_path: Path) -> None:
    """A published test file has two labels swapped; a model that is right then scores below chance."""

    def write(split: str, counts: dict[str, int]) -> None:
        rows = [f"{split} {label} {number},{label}" for label, count in counts.items() for number in range(count)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")

    write("train", {"negative": 130, "neutral": 560, "positive": 170})
    write("valid", {"negative": 20, "neutral": 60, "positive": 25})
    write("test", {"negative": 35, "neutral": 48, "positive": 157})
    words = ("data=table", f"data.files={tmp_path}", "data.cache=null", "data.columns.domain=null")
    notes = load(config(*words).data).ledger.notes
    found = [note for note in notes if "distributed" in note]
    assert found == [
        "labels are distributed differently: 'positive' is 20% of the training rows, 65% of the test rows; check that "
        "both use the same labels"
    ]
