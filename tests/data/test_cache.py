"""Cached data equal newly built data; another input, setting or code is another entry; damage is repaired."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import Data, RunConfig
from finsa.data import cache, dataset, tokenized
from finsa.data.dataset import Dataset
from finsa.errors import DataError

Configure = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear this process's memory, so that the cache on disk is tested."""
    monkeypatch.setattr(cache, "MANY_BYTES", 0)
    monkeypatch.setattr(cache, "MANY_TEXTS", 0)


def _data(config: Configure, folder: Path, rows: int = 24, *overrides: str) -> Data:
    file = folder / "posts.csv"
    lines = [f"{n},利好消息{n},{'ab'[n % 2]}" for n in range(rows)]
    file.write_text("\n".join(["id,text,label", *lines, "e,,a", "d,利好消息0,a"]) + "\n", encoding="utf-8")
    return config("data=table", f"data.files={file}", f"data.cache={folder}/cache", *overrides).data


def _load(data: Data) -> Dataset:
    return dataset.load(data)


def _entries(folder: Path, kind: str = "") -> set[str]:
    names = {place.name for place in (folder / "cache").glob(f"{kind}*")} if (folder / "cache").is_dir() else set()
    return {name for name in names if not name.startswith(".lock-")}


def _same(first: Dataset, second: Dataset) -> bool:
    frames = [*zip(first.splits.values(), second.splits.values(), strict=True), (first.dropped, second.dropped)]
    alike = (first.labels, first.ledger, first.fingerprint) == (second.labels, second.ledger, second.fingerprint)
    return alike and all(one.equals(other) and one.schema == other.schema for one, other in frames)


# ------------------------------------------------------------------------------------------------ tables


def test_table_from_the_cache_is_the_table(config: Configure, tmp_path: Path) -> None:
    data = _data(config, tmp_path)
    plain = _load(data.model_copy(update={"cache": None}))
    assert _entries(tmp_path) == set()
    made, read = _load(data), _load(data)
    assert len(_entries(tmp_path)) == 1
    assert _same(plain, made)
    assert _same(made, read)
    assert read.ledger.buckets["never"] == 0, "a counter is a counter again"


def test_second_reading_builds_nothing(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(config, tmp_path)
    first = _load(data)
    monkeypatch.setattr(dataset, "collect", lambda data: pytest.fail("built again"))
    assert _same(_load(data), first)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ("b", "a")},
        {"labels": {"a": "涨", "b": "跌"}},
        {"label_map": {"a": "b", "b": "a"}},
        {"on_duplicate": "keep"},
        {"extract": "(消.*)"},
        {"name": "other"},
    ],
)
def test_other_settings_are_another_entry(config: Configure, tmp_path: Path, change: dict[str, Any]) -> None:
    data = _data(config, tmp_path)
    _load(data)
    other = data.model_copy(update=change)
    made = _load(other)
    assert len(_entries(tmp_path)) == 2
    assert _same(made, _load(other.model_copy(update={"cache": None})))


@pytest.mark.parametrize("change", [{"prompt": "{text}："}, {"max_length": 99}])
def test_unrelated_settings_use_the_same_entry(config: Configure, tmp_path: Path, change: dict[str, Any]) -> None:
    data = _data(config, tmp_path)
    _load(data)
    _load(data.model_copy(update=change))
    assert len(_entries(tmp_path)) == 1


def test_changed_text_is_another_entry_even_with_the_same_size_and_time(config: Configure, tmp_path: Path) -> None:
    import os

    data = _data(config, tmp_path)
    first, file = _load(data), tmp_path / "posts.csv"
    stat = file.stat()
    file.write_text(file.read_text(encoding="utf-8").replace("消息7,", "消息x,"), encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    second = dataset.load(data)
    assert len(_entries(tmp_path)) == 2
    texts = [text for part in second.splits.values() for text in part["text"]]
    assert "利好消息x" in texts
    assert "利好消息7" not in texts
    assert first.fingerprint != second.fingerprint


def test_other_source_code_is_another_entry(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(config, tmp_path)
    _load(data)
    monkeypatch.setattr(cache, "CODE", "other")
    _load(data)
    assert len(_entries(tmp_path)) == 2


def test_code_is_every_file_of_both_packages(tmp_path: Path, project: Path) -> None:
    folders = [tmp_path / "data", tmp_path / "synthetic"]
    for folder in folders:
        shutil.copytree(project / "finsa" / folder.name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert cache.code(*folders) == cache.CODE
    hashes, files = set(), [file for folder in folders for file in folder.iterdir()]
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before + b"#")
        hashes.add(cache.code(*folders))
        file.write_bytes(before)
    assert len(hashes) == len(files) >= 15
    assert "lexicon.yaml" in {file.name for file in files}
    (folders[0] / "ledger.py").rename(folders[0] / "book.py")
    assert cache.code(*folders) not in {*hashes, cache.CODE}


def test_generated_and_downloaded_rows_are_not_cached(config: Configure, tmp_path: Path) -> None:
    place = f"data.cache={tmp_path}/cache"
    _load(config("data=generated", "data.generator.rows=60", place).data)
    (tmp_path / "hub").mkdir()
    hub = config("data=hub", f"data.hub.id={tmp_path}/hub", place).data
    mixture = config("data=mixture", place).data.model_copy(
        update={"parts": {"one": _data(config, tmp_path), "two": hub}}
    )
    with pytest.raises(DataError, match=r"data\.parts\.two\.hub: .* cannot be loaded"):
        _load(mixture)
    assert _entries(tmp_path) == set()


# ------------------------------------------------------------------------------------------------ damage


def _place(folder: Path) -> Path:
    (place,) = (entry for entry in (folder / "cache").iterdir() if not entry.name.startswith("."))
    return place


@pytest.mark.parametrize("name", ["train.arrow", "dropped.arrow", "table.json", "sizes.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage", "empty"])
def test_a_damaged_entry_is_rebuilt(config: Configure, tmp_path: Path, name: str, damage: str) -> None:
    data = _data(config, tmp_path)
    whole = _load(data)
    file = _place(tmp_path) / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-9], "garbage": b"\x00" * len(content), "empty": b""}[damage])
    again = _load(data)
    assert _same(again, whole)
    assert file.read_bytes() == content
    assert _place(tmp_path) == file.parent


def test_a_partially_written_entry_is_ignored(config: Configure, tmp_path: Path) -> None:
    """A killed process leaves a folder under a temporary name, or an empty entry."""
    data = _data(config, tmp_path)
    whole = _load(data)
    place = _place(tmp_path)
    place.rename(place.with_name(f".{place.name}-1-abc"))
    place.mkdir()
    assert _same(_load(data), whole)
    assert (place / "table.json").is_file()


@pytest.mark.parametrize("kind", ["table", "tokens"])
def test_folder_that_cannot_be_written_is_reported(
    config: Configure, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    """A file in place of the folder, because permissions do not restrict root."""
    data = _data(config, tmp_path)
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.cache: .*/cache cannot be written: .*data\.cache=null to keep nothing"):
        if kind == "table":
            _load(data)
        else:
            cfg = config().model_copy(update={"data": data})
            tokenized.build(cfg, _load(data.model_copy(update={"cache": None})), tokenizer).prompts("train")


def test_a_failed_build_leaves_no_files(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("no")

    def fail_writing(made: int, folder: Path) -> None:
        (folder / "half").write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError):
        cache.arrays(tmp_path / "entry", fail)
    with pytest.raises(DataError, match="cannot be written: .*No space left on device"):
        cache.kept(tmp_path / "entry", lambda: 1, fail_writing, lambda folder: 1)
    assert [place.name for place in tmp_path.iterdir()] == [".lock-entry"], "which means nothing without a process"


def test_unreadable_input_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.files: .*nowhere\.csv cannot be read: No such file"):
        cache.file_hash(tmp_path / "nowhere.csv")


# ------------------------------------------------------------------------------------------------ tokens


def _tokens(config: Configure, folder: Path, tokenizer: Any, **changes: Any) -> tuple[list[list[int]], set[str]]:
    """Prompts of the training split, and the entries that exist afterwards."""
    data = _data(config, folder).model_copy(update=changes)
    cfg = config().model_copy(update={"data": data})
    prompts = tokenized.build(cfg, _load(data), tokenizer).prompts("train")
    return list(prompts), _entries(folder, "tokens-")


def test_tokens_from_the_cache_are_the_tokens(config: Configure, tokenizer: Any, tmp_path: Path) -> None:
    plain, none = _tokens(config, tmp_path, tokenizer, cache=None)
    made, one = _tokens(config, tmp_path, tokenizer)
    read, same = _tokens(config, tmp_path, tokenizer)
    assert plain == made == read
    assert (len(none), len(one), same) == (0, 1, one)


def test_anything_that_changes_tokens_is_another_entry(
    config: Configure, tokenizer: Any, qwen_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    seen = [_tokens(config, tmp_path, tokenizer)[1]]
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["利好"])
    for words, changes in (
        (tokenizer, {"max_length": 40}),
        (tokenizer, {"prompt": "{text}："}),  # more room for the text
        (tokenizer, {"labels": {"a": "非常非常好", "b": "b"}}),  # a longer answer leaves less
        (tokenizer, {"extract": "(消.*)"}),
        (qwen_tokenizer, {}),
        (added, {}),
    ):
        seen.append(_tokens(config, tmp_path, words, **changes)[1])
        assert len(seen[-1] - seen[-2]) == 1, changes
        plain, _ = _tokens(config, tmp_path, words, **changes, cache=None)
        assert _tokens(config, tmp_path, words, **changes)[0] == plain
    monkeypatch.setattr(cache, "CODE", "other")
    assert len(_tokens(config, tmp_path, tokenizer)[1] - seen[-1]) == 1


@settings(deadline=None)
@given(
    parts=st.lists(st.text(max_size=3), min_size=1, max_size=4),
    others=st.lists(st.text(max_size=3), min_size=1, max_size=4),
)
def test_key_depends_on_every_part(parts: list[str], others: list[str]) -> None:
    assert (cache.key(*parts) == cache.key(*others)) == (parts == others)


def test_fingerprint_depends_on_every_row_and_its_place() -> None:
    frame = pl.DataFrame({"a": ["x", "y", None], "b": [1, 2, 3]})
    others = [
        frame[::-1],
        frame[:2],
        frame.with_columns(pl.lit(1).alias("b")),
        frame.with_columns(pl.col("a").fill_null("z")),
    ]
    assert len({cache.fingerprint(one) for one in (frame, *others)}) == 5
    assert cache.fingerprint(frame) == cache.fingerprint(frame.clone())


TEXTS = st.lists(st.text(max_size=3), max_size=4)


@settings(deadline=None)
@given(texts=TEXTS, others=TEXTS)
def test_hash_of_texts_depends_on_every_text_and_its_end(texts: list[str], others: list[str]) -> None:
    hashes = [cache.text_hash(pl.Series(some, dtype=pl.String)) for some in (texts, others)]
    assert (hashes[0] == hashes[1]) == (texts == others)


def test_cached_tokens_depend_on_the_texts_not_only_on_the_fingerprint(
    config: Configure, tokenizer: Any, tmp_path: Path
) -> None:
    data = _data(config, tmp_path)
    whole, cfg = _load(data), config().model_copy(update={"data": data})
    half = replace(whole, splits={split: part[1:] for split, part in whole.splits.items()})
    first, second = (list(tokenized.build(cfg, one, tokenizer).prompts("train")) for one in (whole, half))
    assert second == first[1:]


def test_arrays_are_mapped_and_equal(tmp_path: Path) -> None:
    made = {"tokens": np.arange(1000, dtype=np.int32), "ends": np.zeros(0, np.int64), "cut": np.array([3])}
    first, again = (cache.arrays(tmp_path / "entry", made.copy) for _ in range(2))
    for found in (first, again):
        assert found.keys() == made.keys()
        assert all(np.array_equal(found[name], made[name]) and found[name].dtype == made[name].dtype for name in made)
    assert isinstance(again["tokens"], np.memmap)


# ------------------------------------------------------------------------------------------------ two processes


BUILD = """
import sys, time
from pathlib import Path
import numpy as np
from finsa.data import cache

folder, name = Path(sys.argv[1]), sys.argv[2]

def build():
    (folder / f"building-{name}").touch()
    while len(list(folder.glob("here-*"))) < 2:  # until the other one is about to ask as well
        time.sleep(0.01)
    time.sleep(0.3)
    return {"tokens": np.arange(5000), "ends": np.arange(7)}

(folder / f"here-{name}").touch()
found = cache.arrays(folder / "cache" / "tokens-x", build)
print(int(found["tokens"].sum()), sorted(found))
"""


def test_of_two_processes_one_builds_and_the_other_reads(tmp_path: Path, project: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    running = [subprocess.Popen([*command, name], cwd=project, stdout=subprocess.PIPE, text=True) for name in "ab"]
    told = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert told == [f"{sum(range(5000))} ['ends', 'tokens']\n"] * 2
    assert _entries(tmp_path) == {"tokens-x"}
    assert len(list(tmp_path.glob("building-*"))) == 1
    assert {place.name for place in (tmp_path / "cache").iterdir() if not place.name.startswith(".lock")} == {
        "tokens-x"
    }
    kept = cache.arrays(tmp_path / "cache" / "tokens-x", lambda: pytest.fail("built again"))
    assert np.array_equal(kept["tokens"], np.arange(5000))


def test_small_tables_leave_nothing_behind(
    config: Configure, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    _tokens(config, tmp_path, tokenizer)
    assert _entries(tmp_path) == set()
