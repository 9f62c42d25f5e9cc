"""Every common table format gives the same rows; what cannot be read is told with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from finsa.config import Columns, Data, RunConfig
from finsa.data.sources import READERS, find_files, read
from finsa.errors import DataError

Configure = Callable[..., RunConfig]
COLUMNS = Columns(id="id", text="text", label="label", domain="domain")
FRAME = pl.DataFrame(
    {
        "id": ["007", "b"],
        "text": ["净利润，同比\n增长“3%”", 'he said "no", twice\ttoday'],
        "label": ["利好", "利空"],
        "domain": ["news", "forum"],
    }
)
WRITERS: dict[str, Callable[[Path], object]] = {
    ".csv": FRAME.write_csv,
    ".tsv": lambda file: FRAME.write_csv(file, separator="\t"),
    ".jsonl": FRAME.write_ndjson,
    ".json": FRAME.write_json,
    ".parquet": FRAME.write_parquet,
}


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


# ------------------------------------------------------------------------------------------------ reading


def test_every_reader_is_covered() -> None:
    assert set(WRITERS) == set(READERS)


@pytest.mark.parametrize("suffix", WRITERS)
def test_format_round_trip(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"table{suffix}"
    WRITERS[suffix](file)
    assert read(file, COLUMNS).equals(FRAME)
    assert read(file.rename(tmp_path / f"TABLE{suffix.upper()}"), COLUMNS).equals(FRAME)


def test_digits_stay_text(tmp_path: Path) -> None:
    file = _file(tmp_path, "t.csv", "id,text,label,domain\n01,002,3,4.50\n")
    assert read(file, COLUMNS).rows() == [("01", "002", "3", "4.50")]


def test_numbers_of_a_jsonl_become_text(tmp_path: Path) -> None:
    file = _file(tmp_path, "t.jsonl", '{"id": 7, "text": "x", "label": 1}\n{"id": 8, "text": "y", "label": "a"}\n')
    assert read(file, COLUMNS).rows() == [("7", "x", "1", None), ("8", "y", "a", None)]


def test_columns_are_mapped_and_others_left_out(tmp_path: Path) -> None:
    file = _file(tmp_path, "t.csv", "nr,body,y,src,extra\n1,x,a,web,!\n")
    columns = Columns(id="nr", text="body", label="y", domain="src")
    frame = read(file, columns)
    assert (frame.columns, frame.rows()) == (["id", "text", "label", "domain"], [("1", "x", "a", "web")])


def test_label_column_may_be_the_text_column_of_another_task(tmp_path: Path) -> None:
    file = _file(tmp_path, "t.csv", "label,text\nx,a\n")
    assert read(file, Columns(id=None, text="label", label="text", domain=None)).rows() == [("t-1", "x", "a", None)]


def test_missing_id_column_is_numbered(tmp_path: Path) -> None:
    file = _file(tmp_path, "posts.csv", "text,label\nx,a\ny,b\n")
    assert read(file, COLUMNS)["id"].to_list() == ["posts-1", "posts-2"]
    assert read(file, COLUMNS.model_copy(update={"id": None}))["id"].to_list() == ["posts-1", "posts-2"]


def test_unwanted_id_column_is_not_read(tmp_path: Path) -> None:
    file = _file(tmp_path, "posts.csv", "id,text,label\nq,x,a\n")
    assert read(file, COLUMNS.model_copy(update={"id": None}))["id"].to_list() == ["posts-1"]


def test_ids_that_some_rows_lack_are_numbered(tmp_path: Path) -> None:
    file = _file(tmp_path, "t.jsonl", '{"text": "x", "label": "a"}\n{"id": "q", "text": "y", "label": "b"}\n')
    assert read(file, COLUMNS)["id"].to_list() == ["t-1", "q"]


def test_missing_values_stay_missing(tmp_path: Path) -> None:
    file = _file(tmp_path, "t.csv", 'text,label\nx,\n,b\n"",c\nNA,null\n')
    assert read(file, COLUMNS).select("text", "label").rows() == [
        ("x", None),
        (None, "b"),
        ("", "c"),
        ("NA", "null"),
    ]


@pytest.mark.parametrize("content", ["\ufefftext,label\nx,a\n", "text,label\r\nx,a\r\n", "text,label\nx,a"])
def test_byte_order_mark_and_line_ends(tmp_path: Path, content: str) -> None:
    assert read(_file(tmp_path, "t.csv", content), COLUMNS).select("text", "label").rows() == [("x", "a")]


def test_table_without_rows(tmp_path: Path) -> None:
    assert read(_file(tmp_path, "t.csv", "text,label\n"), COLUMNS).height == 0


# ------------------------------------------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ragged.csv", "text,label\nx,a\ny,b,c\n"),
        ("open_quote.csv", 'text,label\n"x,a\ny,b\n'),
        ("nothing.csv", ""),
        ("gbk.csv", "text,label\n利好消息,a\n".encode("gbk")),
        ("nothing.jsonl", ""),
        ("broken.jsonl", '{"text": "x", "label": "a"}\ngarbage\n'),
        ("cut.jsonl", '{"text": "x", "label": "a"}\n{"text": "y"'),
        ("broken.json", "garbage"),
        ("strings.json", '["x", "y"]'),
        ("broken.parquet", b"garbage"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: str | bytes) -> None:
    file = _file(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read(file, COLUMNS)
    message = str(caught.value)
    assert message.startswith(f"data.files: {file} cannot be read: ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["t.xlsx", "t.txt", "t"])
def test_unknown_format_lists_the_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"is not read\. Choose from: \.csv, \.json, \.jsonl, \.parquet, \.tsv\."):
        read(_file(tmp_path, name), COLUMNS)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("Text,label", "data.columns.text: {file} has no column 'text'; it has Text, label. "),
        ("text,lable", "data.columns.label: {file} has no column 'label'; it has text, lable. "),
    ],
)
def test_missing_column_suggests_the_near_one(tmp_path: Path, header: str, message: str) -> None:
    file = _file(tmp_path, "t.csv", f"{header}\nx,a\n")
    with pytest.raises(DataError) as caught:
        read(file, COLUMNS)
    wrong = next(name for name in header.split(",") if name not in ("text", "label"))
    assert str(caught.value).startswith(message.format(file=file))
    assert "Did you mean" in str(caught.value)
    assert wrong in str(caught.value).split("Did you mean")[1]


def test_missing_column_says_which_key_to_set(tmp_path: Path) -> None:
    file = _file(tmp_path, "t.csv", "q,z\nx,a\n")
    with pytest.raises(DataError, match="no column 'text'; it has q, z.*[Ss]et data.columns.text="):
        read(file, COLUMNS)


@pytest.mark.parametrize("name", ["id", "domain"])
def test_column_that_the_user_named_must_exist(tmp_path: Path, name: str) -> None:
    file = _file(tmp_path, "t.csv")
    with pytest.raises(DataError, match=rf"data\.columns\.{name}: .* has no column 'source'; it has text, label"):
        read(file, COLUMNS.model_copy(update={name: "source"}))


def test_nested_column_is_refused(tmp_path: Path) -> None:
    file = _file(tmp_path, "t.json", '[{"text": ["x"], "label": "a"}]')
    with pytest.raises(DataError, match="data.columns.text: column 'text' of .* not text"):
        read(file, COLUMNS)


# ------------------------------------------------------------------------------------------------ finding


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
        ("all", None),
        ("train_2", None),
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


def test_file_that_the_user_listed_is_not_left_alone(config: Configure, tmp_path: Path) -> None:
    """In a folder other files are none of ours; a list says what is meant: read it, or say why not."""
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


def test_existing_file_with_a_bracket_is_no_glob(config: Configure, tmp_path: Path) -> None:
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


def test_missing_data_set_says_where_it_comes_from(config: Configure, tmp_path: Path) -> None:
    data = config("data=finnf_news").data.model_copy(update={"files": str(tmp_path / "nowhere" / "x")})
    with pytest.raises(DataError, match="no such file or folder: .*\n  data=finnf_news is the news part of FinNF"):
        find_files(data)


def test_empty_folder(config: Configure, tmp_path: Path) -> None:
    _file(tmp_path, "README.md")
    with pytest.raises(DataError, match=r"data\.files: no \.csv, \.tsv, \.jsonl, \.json, \.parquet file in "):
        find_files(_data(config, tmp_path))


@pytest.mark.parametrize("files", [None, ()])
def test_no_files_at_all(config: Configure, files: object) -> None:
    with pytest.raises(DataError, match=r"data\.files: data=table needs files; for instance data\.files="):
        find_files(_data(config, files))
