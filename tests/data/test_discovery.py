"""Files are found by folder, list, pattern and map; their names determine the splits, and skipped files are noted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finsa.config import Data, RunConfig
from finsa.data import dataset
from finsa.data.discovery import find, find_files
from finsa.errors import DataError

Configure = Callable[..., RunConfig]


def _data(config: Configure, files: object, **changes: object) -> Data:
    written = str(files) if isinstance(files, Path) else files
    return config("data=table").data.model_copy(update={"files": written, **changes})


def _file(folder: Path, name: str, content: str | bytes = "text,label\nx,a\n") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def _names(files: dict[Path, str | None]) -> dict[str, str | None]:
    return {file.name: split for file, split in files.items()}


def test_folder_with_split_names(config: Configure, tmp_path: Path) -> None:
    for name in ("train.csv", "valid.jsonl", "test.parquet", "notes.csv", "README.md"):
        _file(tmp_path, name)
    assert _names(find_files(_data(config, tmp_path))) == {
        "train.csv": "train",
        "valid.jsonl": "validation",
        "test.parquet": "test",
    }


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Train", "train"),
        ("valid", "validation"),
        ("validation", "validation"),
        ("val", "validation"),
        ("dev", "validation"),
        ("test", "test"),
        ("fpb_train", "train"),
        ("fpbTrain", "train"),
        ("train_2", "train"),
        ("2024-training data", "train"),
        ("trainset", "train"),
        ("train-00000-of-00001", "train"),
        ("财经train", "train"),
        ("财经训练集", "train"),
        ("my.valid", "validation"),
        ("val1", "validation"),
        ("验证集", "validation"),
        ("testing", "test"),
        ("eval", "test"),
        ("fpb-evaluation", "test"),
        ("test_eval", "test"),
        ("测试集", "test"),
        ("all", None),
        ("constraint", None),
        ("attest", None),
        ("values", None),
        ("device", None),
        ("train_dev", None),
    ],
)
def test_split_of_a_file_name(config: Configure, tmp_path: Path, name: str, split: str | None) -> None:
    assert find_files(_data(config, _file(tmp_path, f"{name}.csv"))) == {tmp_path / f"{name}.csv": split}


def test_folder_without_split_names_is_read_whole_and_in_order(config: Configure, tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "c.TSV", "SOURCE.md"):
        _file(tmp_path, name)
    assert list(_names(find_files(_data(config, tmp_path)))) == ["a.jsonl", "b.csv", "c.TSV"]


def test_list_of_files_keeps_its_order(config: Configure, tmp_path: Path) -> None:
    files = (str(_file(tmp_path, "z.csv")), str(_file(tmp_path, "sub/a.csv")))
    assert [str(file) for file in find_files(_data(config, files))] == list(files)


def test_a_file_listed_by_the_user_is_not_skipped(config: Configure, tmp_path: Path) -> None:
    """Other files in a folder are ignored, but a listed file must be read or reported."""
    files = (str(_file(tmp_path, "train.csv")), str(_file(tmp_path, "more.csv")))
    try:
        found = find_files(_data(config, files))
    except DataError as error:
        assert "more.csv" in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert set(_names(found)) == {"train.csv", "more.csv"}


def test_glob(config: Configure, tmp_path: Path) -> None:
    for name in ("2024/train.csv", "2025/train.csv", "2025/test.csv", "2025/x.txt"):
        _file(tmp_path, name)
    found = find_files(_data(config, f"{tmp_path}/**/*.csv"))
    assert [file.relative_to(tmp_path).as_posix() for file in found] == [
        "2024/train.csv",
        "2025/test.csv",
        "2025/train.csv",
    ]
    assert set(found.values()) == {"train", "test"}


def test_glob_without_a_match(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.files: nothing matches .*\*\.csv"):
        find_files(_data(config, f"{tmp_path}/*.csv"))


def test_an_existing_file_with_a_bracket_is_not_a_glob(config: Configure, tmp_path: Path) -> None:
    file = _file(tmp_path, "posts[1].csv")
    assert find_files(_data(config, file)) == {file: None}


def test_relative_glob_falls_back_to_the_project_as_a_path_does(
    config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(find_files(_data(config, "data/sample"))) == 3
    assert len(find_files(_data(config, "data/sample/*.csv"))) == 3


def test_missing_file_suggests_its_sibling(config: Configure, tmp_path: Path) -> None:
    _file(tmp_path, "posts.csv")
    with pytest.raises(DataError) as caught:
        find_files(_data(config, tmp_path / "post.csv"))
    message = str(caught.value)
    assert message.startswith(f"data.files: no such file or folder: {tmp_path / 'post.csv'}.")
    assert "Did you mean" in message
    assert "posts.csv" in message


def test_a_missing_data_set_is_reported_with_its_origin(config: Configure, tmp_path: Path) -> None:
    data = config("data=finnf_news").data.model_copy(update={"files": str(tmp_path / "nowhere" / "x")})
    with pytest.raises(DataError, match="no such file or folder: .*\n  data=finnf_news is the news part of FinNF"):
        find_files(data)


def test_folders_and_editor_backups_are_ignored(config: Configure, tmp_path: Path) -> None:
    for name in ("posts.csv", "._posts.csv", ".posts.csv", "~$posts.xlsx", "more.parquet/part.parquet"):
        _file(tmp_path, name)
    assert _names(find_files(_data(config, tmp_path))) == {"posts.csv": None}
    assert _names(find_files(_data(config, f"{tmp_path}/*.*"))) == {"posts.csv": None, "~$posts.xlsx": None}


def test_empty_folder(config: Configure, tmp_path: Path) -> None:
    _file(tmp_path, "README.md")
    with pytest.raises(DataError, match=r"data\.files: no \.csv, \.tsv, .* file in "):
        find_files(_data(config, tmp_path))


@pytest.mark.parametrize("files", [None, ()])
def test_no_files_at_all(config: Configure, files: object) -> None:
    with pytest.raises(DataError, match=r"data\.files: data=table needs files; for instance data\.files="):
        find_files(_data(config, files))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.csv", "eval.csv"], {"train.csv": "train", "eval.csv": "test"}),
        (["train.csv", "eval.csv", "test.csv"], {"train.csv": "train", "eval.csv": "validation", "test.csv": "test"}),
        (
            ["train.csv", "dev.csv", "eval.csv", "test.csv"],
            {"train.csv": "train", "dev.csv": "validation", "eval.csv": "test", "test.csv": "test"},
        ),
    ],
)
def test_eval_is_the_test_split_unless_there_is_another(
    config: Configure, tmp_path: Path, files: list[str], expected: dict[str, str]
) -> None:
    for name in files:
        _file(tmp_path, name)
    assert _names(find_files(_data(config, tmp_path))) == expected


def test_inferred_splits_and_skipped_files_are_noted(config: Configure, tmp_path: Path) -> None:
    for name in ("fpb_train.csv", "fpb_test.csv", "notes.csv", "dev.csv"):
        _file(tmp_path, name)
    assert find(_data(config, tmp_path)).notes == [
        "train split, by file name: fpb_train.csv",
        "test split, by file name: fpb_test.csv",
        "skipped, because it names no split while others do: notes.csv",
    ]


def test_plain_names_need_no_note(config: Configure, tmp_path: Path) -> None:
    for name in ("train.csv", "valid.csv", "test.csv"):
        _file(tmp_path, name)
    assert find(_data(config, tmp_path)).notes == []


def test_notes_on_files_reach_the_ledger(config: Configure, tmp_path: Path) -> None:
    rows = "text,label\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(40))
    _file(tmp_path, "fpb_train.csv", rows)
    _file(tmp_path, "fpb_test.csv", "text,label\nother,a\nanother,b\n")
    loaded = dataset.load(_data(config, tmp_path))
    assert {split: frame.height for split, frame in loaded.splits.items()} == {"train": 36, "validation": 4, "test": 2}
    assert loaded.ledger.notes[:2] == [
        "train split, by file name: fpb_train.csv",
        "test split, by file name: fpb_test.csv",
    ]


@pytest.mark.parametrize("inside", ["", "data/"])
def test_hub_style_shards_are_read(config: Configure, tmp_path: Path, inside: str) -> None:
    for split, shards in {"train": 2, "validation": 1, "test": 1}.items():
        for shard in range(shards):
            _file(tmp_path, f"{inside}{split}-{shard:05d}-of-{shards:05d}.parquet")
    found = find(_data(config, tmp_path))
    assert list(found.splits.values()) == ["test", "train", "train", "validation"]
    assert found.notes[0] == "train split, by file name: train-00000-of-00002.parquet, train-00001-of-00002.parquet"


def test_folders_named_after_splits(config: Configure, tmp_path: Path) -> None:
    for name in ("set/train/a.csv", "set/train/b.csv", "set/dev/a.csv", "set/test_data/a.csv", "set/.cache/test/c.csv"):
        _file(tmp_path, name)
    expected = {"train/a.csv": "train", "train/b.csv": "train", "dev/a.csv": "validation", "test_data/a.csv": "test"}
    folders = [str(tmp_path / "set" / name) for name in ("train", "dev", "test_data")]
    for files in (tmp_path / "set", f"{tmp_path}/set/*/*.csv", tuple(folders)):
        found = find_files(_data(config, files))
        assert {file.relative_to(tmp_path / "set").as_posix(): split for file, split in found.items()} == expected


def test_folder_that_was_given_names_no_split(config: Configure, tmp_path: Path) -> None:
    """The location of the data is up to the user; the folders of pytest itself are called test_..."""
    file = _file(tmp_path, "test/posts.csv")
    assert find_files(_data(config, file)) == find_files(_data(config, file.parent)) == {file: None}


def test_map_assigns_splits_whatever_the_names(config: Configure, tmp_path: Path) -> None:
    for name in ("test_reviews.csv", "more/x.csv", "more/train.csv", "c.csv"):
        _file(tmp_path, name)
    files = {"train": str(tmp_path / "test_reviews.csv"), "test": (str(tmp_path / "more"), str(tmp_path / "c.csv"))}
    found = find(_data(config, files))
    assert _names(found.splits) == {
        "test_reviews.csv": "train",
        "x.csv": "test",
        "train.csv": "test",
        "c.csv": "test",
    }
    assert found.notes == []


def test_map_is_given_on_the_command_line(config: Configure, tmp_path: Path) -> None:
    one, two = _file(tmp_path, "one.csv"), _file(tmp_path, "two.csv")
    data = config("data=table", f"data.files={{train: {one}, validation: {two}}}").data
    assert find_files(data) == {one: "train", two: "validation"}
    with pytest.raises(DataError, match=r"one\.csv is assigned to two splits, train and test"):
        find(_data(config, {"train": str(one), "test": str(one)}))


def test_a_name_of_two_splits_among_others_is_an_error(config: Configure, tmp_path: Path) -> None:
    both = _file(tmp_path, "train_dev.csv")
    assert find(_data(config, both)).notes == ["names two splits, so its rows are divided: train_dev.csv"]
    _file(tmp_path, "test.csv")
    with pytest.raises(DataError, match=r"train_dev\.csv names two splits, train and validation; rename it, or assign"):
        find(_data(config, tmp_path))


def test_a_missing_shard_is_an_error(config: Configure, tmp_path: Path) -> None:
    """Otherwise half of a data set could be missing silently."""
    _file(tmp_path, "train-00000-of-00002.csv")
    _file(tmp_path, "test-00000-of-00001.csv")
    with pytest.raises(DataError, match="train-00001-of-00002.csv is missing beside train-00000-of-00002.csv"):
        find_files(_data(config, tmp_path))
    assert len(find_files(_data(config, tmp_path / "train-00000-of-00002.csv"))) == 1  # one shard by its name
    (tmp_path / "train-00000-of-00002.csv").rename(tmp_path / "train-00002-of-00002.csv")
    _file(tmp_path, "train-00001-of-00002.csv")  # counted from 1
    assert len(find_files(_data(config, tmp_path))) == 3
