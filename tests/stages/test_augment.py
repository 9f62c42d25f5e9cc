"""Augmentation as a user runs it: real processes, real files, a real local HTTP server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import commands
import polars as pl
import pytest
from endpoints import ChatServer, Reply, Request, failed, said

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.errors import DataError, RunError
from finsa.stages import augment

Configure = Callable[..., RunConfig]
LABELS = "data.labels=['利空','利好']"
SPLITS = {"train": 16, "valid": 4, "test": 4}
FAST = ["stage.paraphrase.backoff=0.01", "stage.paraphrase.retries=1"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A small table with its splits; every other row has a word of the dictionary."""
    return _write_rows(tmp_path / "rows")


def _write_rows(folder: Path) -> Path:
    folder.mkdir()
    for split, count in SPLITS.items():
        kinds = [("横着走", "利空"), ("大涨", "利好")] * count
        lines = [f"{split}{n},{split}第{n}家公司股价{kinds[n][0]}了,{kinds[n][1]}" for n in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["id,text,label", *lines]) + "\n", encoding="utf-8")
    return folder


def _words(rows: Path, output: Path, *more: str) -> list[str]:
    return ["stage=augment", "data=table", f"data.files={rows}", LABELS, "data.cache=null", f"output={output}", *more]


def _run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return commands.run(*words, folder=folder, environment={**os.environ, **variables})


def _asking(server: ChatServer, *more: str) -> list[str]:
    return [f"stage.paraphrase.url={server.url}", "stage.paraphrase.model=qwen2.5:7b", *FAST, *more]


def _original(request: Request) -> str:
    return request.prompt.rpartition("\n\n")[2]


def _paraphrase(request: Request) -> Reply:
    return said(f"<think>\n怎么改？\n</think>\n据悉{_original(request)}，方式{request.payload['seed']}")


def _recipe(folder: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((folder / "augmentation.json").read_text(encoding="utf-8"))
    return recipe


def _read(file: Path) -> pl.DataFrame:
    return pl.read_csv(file, infer_schema=False)


# ------------------------------------------------------------------------------------------------ synonyms


def test_synonyms_by_a_command(rows: Path, tmp_path: Path, config: Configure) -> None:
    done = _run(tmp_path, *_words(rows, Path("out"), "stage.synonyms.share=1"))
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == ["augmentation.json", "test.csv", "train.csv", "valid.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows"]
    train = _read(out / "train.csv")
    assert train.columns == ["id", "text", "label", "domain", "parent"]
    assert train.height == train["id"].n_unique() == 16 + 8 * 2
    originals, variants = train[:16], train[16:]
    assert originals.select("id", "text", "label").equals(_read(rows / "train.csv"))
    assert originals["parent"].null_count() == 16
    joined = variants.join(originals, left_on="parent", right_on="id")
    assert joined.height == 16
    assert (joined["label"] == joined["label_right"]).all()
    assert set(joined["text"]) == {
        text.replace("大涨", word) for text in joined["text_right"] for word in ("飙升", "猛涨")
    }
    for name in ("valid.csv", "test.csv"):
        assert _read(out / name).select("id", "text", "label").equals(_read(rows / name))
    assert _recipe(out)["variants"] == {
        "synonyms": {
            "wanted": 48,
            "made": 16,
            "dropped": {"no word of the dictionary in the text": 24, "no further combination of words": 8},
        }
    }
    assert _recipe(out)["labels"] == {"originals": {"利空": 8, "利好": 8}, "variants": {"利空": 0, "利好": 16}}
    assert f"read them with: data=table data.files={out}" in done.stdout


def test_written_rows_are_read_without_a_leak(rows: Path, tmp_path: Path, config: Configure) -> None:
    out = tmp_path / "out"
    augment.run(config(*_words(rows, out, "stage.synonyms.share=1")))
    again = dataset.load(config("data=table", f"data.files={out}", LABELS, "data.cache=null").data)
    assert again.ledger.buckets == {"used": 16 + 16 + 8}
    assert {split: part.height for split, part in again.splits.items()} == {"train": 32, "validation": 4, "test": 4}
    parents = again.splits["train"]["parent"].to_list()
    assert [parent for parent in parents if parent] == _read(out / "train.csv")["parent"].drop_nulls().to_list()


def test_the_same_command_writes_the_same_files(rows: Path, tmp_path: Path, config: Configure) -> None:
    for name in ("a", "b", "c"):
        augment.run(config(*_words(rows, tmp_path / name), f"seed={43 if name == 'c' else 42}"))
    same = [
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in ("train.csv", "valid.csv", "test.csv", "augmentation.json")
    ]
    assert same == [True] * 4
    assert (tmp_path / "a" / "train.csv").read_bytes() != (tmp_path / "c" / "train.csv").read_bytes()


def test_variants_in_the_input_stay_variants_of_their_original(rows: Path, tmp_path: Path, config: Configure) -> None:
    with (rows / "train.csv").open("a", encoding="utf-8") as stream:
        stream.write("train1,同一个编号又大涨了,利好\n")
    first, second = tmp_path / "first", tmp_path / "second"
    augment.run(config(*_words(rows, first, "stage.synonyms.share=1")))
    augment.run(config(*_words(first, second, "stage.synonyms.share=1", "stage.synonyms.variants=1")))
    train = _read(second / "train.csv")
    assert train["id"].n_unique() == train.height
    ids = dict(train.select("id", "parent").iter_rows())
    assert ids["train1-2"] is None
    assert {ids[parent] for parent in ids.values() if parent} == {None}, "no variant of a variant"
    assert _read(first / "train.csv").equals(train[: _read(first / "train.csv").height])


def test_the_sample_gets_variants_that_the_loader_accepts(tmp_path: Path, config: Configure) -> None:
    out = tmp_path / "out"
    augment.run(config("stage=augment", f"output={out}"))
    sample = dataset.load(config().data)
    again = dataset.load(config(f"data.files={out}", "data.cache=null").data)
    numbers = _recipe(out)["variants"]["synonyms"]
    assert numbers["wanted"] == 3 * round(0.2 * sample.splits["train"].height)
    assert numbers["made"] == numbers["wanted"] - sum(numbers["dropped"].values()) > 300
    assert again.ledger.buckets == {"used": 4_800 + numbers["made"]}
    for split in ("validation", "test"):
        assert (
            again.splits[split].select("id", "text", "label").equals(sample.splits[split].select("id", "text", "label"))
        )


# ------------------------------------------------------------------------------------------------ paraphrases


def test_paraphrases_by_a_command(rows: Path, tmp_path: Path, config: Configure) -> None:
    with ChatServer(_paraphrase) as server:
        key = ["stage.paraphrase.api_key_env=MY_KEY", "stage.paraphrase.variants=2"]
        done = _run(tmp_path, *_words(rows, tmp_path / "out", *_asking(server, *key)), MY_KEY="sk-42")
    assert (done.returncode, done.stderr) == (0, "")
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer sk-42"}
    train = _read(tmp_path / "out" / "train.csv")
    texts = dict(train.select("id", "text").iter_rows())
    variants = train.filter(pl.col("id").str.contains("-p"))
    assert variants.height == len(server.requests) == 2 * round(0.8 * 16)
    for name, text, parent in variants.select("id", "text", "parent").iter_rows():
        assert text == f"据悉{texts[parent]}，方式{42 + int(name[-1]) - 1}"
    drawn = train.filter(pl.col("id").str.contains("-s"))["parent"]
    assert set(drawn).isdisjoint(variants["parent"]), "shares that sum to 1 draw different rows"
    by_text = dict(train.select("text", "label").iter_rows())
    assert all(f"“{by_text[_original(request)]}”" in request.prompt for request in server.requests)
    assert all(_original(request).startswith("train") for request in server.requests), "held-out texts are not sent"
    assert _recipe(tmp_path / "out")["variants"]["paraphrase"] == {"wanted": 26, "made": 26, "dropped": {}}
    written = [file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir()]
    assert [content for content in [*written, done.stdout] if "sk-42" in content] == []


def test_every_answer_is_filtered_and_counted(rows: Path, tmp_path: Path, config: Configure) -> None:
    new = "这家公司的股价大幅上升"
    replies = [
        said("<think>嗯</think>"),
        said("很短"),
        said("很长" * 40),
        said("valid第1家 公司股价大涨了"),
        said("train第0家公司股价横着走了 "),
        Reply(b"<html>"),
        said(new, finish_reason="length"),
        failed(400, "no"),
        said(new),
        said(f" {new[:4]} {new[4:]}"),
    ]
    answers = iter(replies)
    off = ["stage.synonyms=null", "stage.paraphrase.share=0.625", "stage.paraphrase.variants=1"]
    with ChatServer(lambda request: next(answers)) as server:
        words = _words(rows, tmp_path / "out", *_asking(server, *off, "stage.paraphrase.workers=1"))
        augment.run(config(*words))
    assert _recipe(tmp_path / "out")["variants"] == {
        "paraphrase": {
            "wanted": 10,
            "made": 1,
            "dropped": {
                "empty": 1,
                "too short": 1,
                "too long": 1,
                "leak: text of a validation or test row": 1,
                "equal to a training text": 1,
                "malformed answer": 1,
                "answer cut at the model's limit": 1,
                "refused by the endpoint": 1,
                "equal to another variant": 1,
            },
        }
    }


@pytest.fixture(scope="module")
def whole(config: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed command that asks for 39 paraphrases."""
    folder = tmp_path_factory.mktemp("whole")
    with ChatServer(_paraphrase) as server:
        augment.run(config(*_words(_write_rows(folder / "rows"), folder / "out", *_asking(server))))
    asked = [(request.prompt, request.payload["seed"]) for request in server.requests]
    assert len(asked) == len(set(asked)) == 39
    return folder / "out"


@pytest.mark.parametrize(("stop", "code", "kept"), [(signal.SIGKILL, -9, 12), (signal.SIGINT, 130, 14)])
def test_a_command_stopped_midway_resumes(
    whole: Path, rows: Path, tmp_path: Path, stop: signal.Signals, code: int, kept: int
) -> None:
    released = Event()

    def held_back(request: Request) -> Reply:
        if len(server.requests) > 12:
            released.wait(60)
        return _paraphrase(request)

    with ChatServer(held_back) as server:
        words = _words(rows, tmp_path / "out", *_asking(server, "stage.paraphrase.workers=2"))
        running = commands.Command(*words, folder=tmp_path)
        while len(server.requests) < 14:
            assert running.poll() is None
            time.sleep(0.01)
        running.signal(stop)
        if stop == signal.SIGINT:
            time.sleep(2)  # until the command has noticed; it still takes the two answers that are under way
            released.set()
        assert running.wait() == code
        released.set()
        journal = tmp_path / "out.partial" / "answers.jsonl"
        assert not (tmp_path / "out").exists()
        assert (journal.read_text(encoding="utf-8").count("\n"), len(server.requests)) == (kept, 14)
        done = _run(tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"resuming with {kept} answers in {journal}" in done.stdout
    assert len(server.requests) - 14 == 39 - kept
    assert not (tmp_path / "out.partial").exists()
    for name in ("train.csv", "valid.csv", "test.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            failed(500, "out of memory"),
            "keeps failing (HTTP 500: out of memory); try later, or lower stage.paraphrase",
        ),
        (failed(401, "bad key sk-secret"), "refuses the key; fix the key in MY_KEY (HTTP 401: bad key ***)"),
    ],
)
def test_an_endpoint_that_fails_leaves_no_folder(rows: Path, tmp_path: Path, reply: Reply, message: str) -> None:
    with ChatServer(lambda request: reply) as server:
        words = _words(rows, tmp_path / "out", *_asking(server, "stage.paraphrase.api_key_env=MY_KEY"))
        done = _run(tmp_path, *words, MY_KEY="sk-secret")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: stage.paraphrase.")
    assert message in done.stderr
    assert server.url in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


# ------------------------------------------------------------------------------------------------ errors


def test_an_existing_output_is_reported_before_any_request(rows: Path, config: Configure) -> None:
    with ChatServer(_paraphrase) as server, pytest.raises(RunError, match="already exists; name another folder"):
        augment.run(config(*_words(rows, rows, *_asking(server))))
    assert server.requests == []


def test_an_unset_key_is_reported_before_anything_is_read(tmp_path: Path, config: Configure) -> None:
    key = ["stage.paraphrase.model=m", "stage.paraphrase.api_key_env=FINSA_NO_SUCH_KEY"]
    with pytest.raises(RunError, match="FINSA_NO_SUCH_KEY is not set"):
        augment.run(config(*_words(tmp_path / "nowhere", tmp_path / "out", *key)))


def test_a_share_without_rows_is_not_an_error(rows: Path, tmp_path: Path, config: Configure) -> None:
    augment.run(config(*_words(rows, tmp_path / "out", "stage.synonyms.share=0.01")))
    assert _read(tmp_path / "out" / "train.csv").height == 16
    assert _recipe(tmp_path / "out")["variants"] == {}


def test_no_training_rows(rows: Path, tmp_path: Path, config: Configure) -> None:
    (rows / "train.csv").write_text("id,text,label\n", encoding="utf-8")
    with pytest.raises(DataError, match="the train split is empty"):
        augment.run(config(*_words(rows, tmp_path / "out")))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stage.synonyms=null"],
            "generates no variants: keep stage.synonyms, or set stage.paraphrase.model",
        ),
        (["stage.paraphrase.url=http://me:secret@x/v1"], "stage.paraphrase.url: needs http://host/path"),
        (["stage.paraphrase.url=localhost:11434"], "stage.paraphrase.url: needs http://host/path or https://host/path"),
        (["stage.paraphrase.api_key_env=sk-secret"], "must name an environment variable in capitals"),
        (["stage.paraphrase.prompt=改写"], "stage.paraphrase.prompt: needs {text}, may have {label}, and no other"),
        (["+stage.synonyms.words.up=[up]"], "'up' needs at least one other word"),
        (["stage.synonyms.share=0"], "stage.synonyms.share: input should be greater than 0"),
        (["stage.paraphrase.urll=x"], "Did you mean 'stage.paraphrase.url'?"),
        (["output=null"], "stage=augment needs output=<folder>"),
    ],
)
def test_a_wrong_option_is_one_message(tmp_path: Path, words: list[str], message: str) -> None:
    done = _run(tmp_path, "stage=augment", "output=out", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert list(tmp_path.iterdir()) == []
