"""Rows from a prompt as a user generates them: real processes, real files, a real local HTTP server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import commands
import polars as pl
import pytest
from endpoints import ChatServer, Reply, Request, failed, said

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.data.synthesize import reasons_of
from finsa.errors import RunError
from finsa.stages import synthesize

Configure = Callable[..., RunConfig]
CLASSES = ("行业板块问询", "个股问询", "大盘问询", "客服问询", "基金问询")
SMALL = ["data=table", "data.labels=['利空','利好']", "stage.train=6", "stage.validation=3"]


def _words(server: ChatServer, output: Path, *more: str) -> list[str]:
    known = [f"stage.url={server.url}", "stage.model=m", "stage.backoff=0.01", "stage.retries=1", f"output={output}"]
    return ["stage=synthesize", *known, *more]


def _new_texts(each: int) -> Callable[[Request], Reply]:
    numbers = count()
    return lambda request: said("\n".join(f"{n}. 第{next(numbers)}个问题" for n in range(1, each + 1)))


def _recipe(folder: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    return recipe


def test_the_intent_set_by_a_command_without_its_files(tmp_path: Path, config: Configure) -> None:
    with ChatServer(_new_texts(5)) as server:
        words = _words(server, tmp_path / "out", "data=openfindata_intent", "stage.workers=8")
        done = commands.run(*words, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(server.requests) == 5 * 27, "27 blocks of 5 make 132 rows of a class"
    assert all("5条" in request.prompt and "、".join(CLASSES) in request.prompt for request in server.requests)
    train, valid = (pl.read_csv(tmp_path / "out" / name, infer_schema=False) for name in ("train.csv", "valid.csv"))
    assert train.columns == valid.columns == ["id", "text", "label"]
    assert Counter(train["label"]) == dict.fromkeys(CLASSES, 100)
    assert Counter(valid["label"]) == dict.fromkeys(CLASSES, 32)
    assert train["label"].to_list() == [label for label in CLASSES for _ in range(5)] * 20
    assert len({*train["id"], *valid["id"]}) == len({*train["text"], *valid["text"]}) == 660
    assert _recipe(tmp_path / "out")["counts"] == {
        "answers": 135,
        "answers without a text": 0,
        "kept": 660,
        "dropped: more than wanted": 15,
    }
    hint = next(line for line in done.stdout.splitlines() if line.startswith("read them with: "))
    read = dataset.load(config(*hint.removeprefix("read them with: ").split(), "data.cache=null").data)
    assert read.ledger.buckets == {"used": 660}
    assert (read.labels.names, read.labels.words) == (CLASSES, ("A", "B", "C", "D", "E"))


def test_repeated_texts_are_requested_again(tmp_path: Path, config: Configure) -> None:
    replies = iter(["甲\n乙\n丙\n丁\n戊", "甲\n乙\n己\n庚\n辛", "一\n二\n三\n四\n五", "甲\n六\n七\n八\n九", "壬\n癸"])
    with ChatServer(lambda request: said(next(replies))) as server:
        synthesize.run(config(*_words(server, tmp_path / "out", *SMALL, "stage.workers=1")))
    asked = [(request.prompt.split("“")[1][:2], request.payload["seed"]) for request in server.requests]
    assert asked == [("利空", 42), ("利空", 43), ("利好", 42), ("利好", 43), ("利空", 44)]
    texts = {label: part["text"].to_list() for (label,), part in pl.concat(
        pl.read_csv(tmp_path / "out" / name, infer_schema=False) for name in ("train.csv", "valid.csv")
    ).group_by("label", maintain_order=True)}  # fmt: skip
    assert texts == {"利空": list("甲乙丙丁戊己庚辛壬"), "利好": list("一二三四五六七八九")}
    counts = _recipe(tmp_path / "out")["counts"]
    assert (counts["kept"], counts["dropped: repeated"], counts["dropped: more than wanted"]) == (18, 3, 1)


def test_faulty_answers_are_counted_and_replaced(tmp_path: Path, config: Configure) -> None:
    new = _new_texts(5)
    first = iter([Reply(b"<html>"), failed(400, "no"), said("<think>...</think>")])
    with ChatServer(lambda request: next(first, None) or new(request)) as server:
        synthesize.run(config(*_words(server, tmp_path / "out", *SMALL, "stage.workers=1")))
    counts = _recipe(tmp_path / "out")["counts"]
    assert (counts["malformed answer"], counts["refused by the endpoint"], counts["answers without a text"]) == (
        1,
        1,
        1,
    )
    assert counts["kept"] == 18


def test_too_few_rows_after_all_rounds(tmp_path: Path, config: Configure) -> None:
    with ChatServer(lambda request: said("涨" if "“利好”" in request.prompt else "跌\n落")) as server:
        words = _words(server, tmp_path / "out", *SMALL, "stage.rounds=3")
        with pytest.raises(RunError) as caught:
            synthesize.run(config(*words))
        asked = len(server.requests)
        assert str(caught.value).startswith(
            "stage.rounds: after 3 rounds there are fewer than 9 rows of 利空 2, 利好 1 ({'answers': 12, "
        )
        assert asked == 12
        assert not (tmp_path / "out").exists()
        with pytest.raises(RunError, match="after 4 rounds"):
            synthesize.run(config(*words, "stage.rounds=4"))
    assert len(server.requests) == asked + 4, "what was answered is not asked for again"


def test_a_failed_command_resumes_without_repeating_requests(tmp_path: Path, config: Configure) -> None:
    new, left = _new_texts(5), iter(range(2))
    with ChatServer(lambda request: new(request) if next(left, None) is not None else failed(503)) as server:
        words = _words(server, tmp_path / "out", *SMALL, "stage.workers=1")
        with pytest.raises(RunError, match="keeps failing"):
            synthesize.run(config(*words))
        answered = {(request.prompt, request.payload["seed"]) for request in server.requests[:2]}
    with ChatServer(new) as again:
        synthesize.run(config(*_words(again, tmp_path / "out", *SMALL)))
    assert len(again.requests) == 2
    assert answered.isdisjoint((request.prompt, request.payload["seed"]) for request in again.requests)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "train.csv",
        "valid.csv",
        "recipe.json",
        "answers.jsonl",
    }


def test_no_validation_rows_no_file(tmp_path: Path, config: Configure) -> None:
    with ChatServer(_new_texts(5)) as server:
        synthesize.run(config(*_words(server, tmp_path / "out", *SMALL, "stage.validation=0")))
    assert not (tmp_path / "out" / "valid.csv").exists()
    assert pl.read_csv(tmp_path / "out" / "train.csv").height == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage.model=m"], "stage=synthesize needs output=<folder>"),
        (["output=o"], "stage=synthesize needs stage.model=<model>, and data.labels"),
        (["output=o", "stage.model=m", "data=table"], "needs stage.model=<model>, and data.labels"),
        (["output=o", "stage.model=m", "stage.prompt='{label}'"], "stage.prompt: needs {count} and {label}, may have"),
        (["output=o", "stage.model=m", "stage.prompt='{label}{count}{text}'"], "may have {labels}, and no other"),
    ],
)
def test_a_wrong_option_is_one_message(config: Configure, words: list[str], message: str) -> None:
    with pytest.raises(Exception, match="(?s).*") as caught:
        config("stage=synthesize", *words)
    assert message in str(caught.value)


def _teacher(request: Request) -> Reply:
    """A teacher that is right about every row but those of 利好 at its first attempt, and about 中性 never."""
    text = request.prompt.split("文本：")[1]
    label = text[:2]
    if label == "中性" or (label == "利好" and request.payload["seed"] == 42):
        return said(f"看不出{text}\n类别：利空")
    return said(f"<think>\n想\n</think>\n\n原文写了{text}。\n所以：\n\n**{label}**")


def test_rationales_are_kept_where_the_label_is_right(tmp_path: Path, config: Configure) -> None:
    files = {"train": 12, "valid": 3, "test": 3}
    for name, rows in files.items():
        written = [f"{name}{n},{label}第{n}{name}条,{label}" for n in range(rows) for label in ("利空", "中性", "利好")]
        (tmp_path / f"{name}.csv").write_text("\n".join(["id,text,label", *written]) + "\n", encoding="utf-8")
    names = {"train": "train", "validation": "valid", "test": "test"}
    listed = ", ".join(f"{split}: {tmp_path / name}.csv" for split, name in names.items())
    data = [f"data.files={{{listed}}}"]
    data += ["data=table", "data.labels=['利空','中性','利好']", "data.columns.id=null"]
    with ChatServer(_teacher) as server:
        words = _words(server, tmp_path / "out", *data, "stage.write=rationales", "stage.train=8", "stage.rounds=2")
        done = commands.run(*words, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(server.requests) == 24 + 16
    assert all("train条" in request.prompt for request in server.requests)  # no validation or test row
    assert _recipe(tmp_path / "out")["counts"] == {"kept": 16, "dropped: wrong label": 24}
    hint = next(line for line in done.stdout.splitlines() if line.startswith("read them with: "))
    labels = "data.labels=['利空','中性','利好']"
    read = dataset.load(config(*hint.removeprefix("read them with: ").split(), labels, "data.cache=null").data)
    assert {split: part.height for split, part in read.splits.items()} == {"train": 16, "validation": 9, "test": 9}
    assert read.splits["test"]["rationale"].null_count() == 9
    for text, rationale in read.splits["train"].select("text", "rationale").iter_rows():
        assert rationale == f"原文写了{text}。\n所以："


def test_a_teacher_that_is_never_right_is_an_error(tmp_path: Path, config: Configure) -> None:
    with ChatServer(lambda request: said("不知道")) as server:
        words = _words(server, tmp_path / "out", "stage.write=rationales", "stage.train=2", "stage.rounds=1")
        with pytest.raises(RunError, match="no answer has reasons and the right label"):
            synthesize.run(config(*words))


@pytest.mark.parametrize(
    ("answer", "reasons", "label"),
    [
        ("Sales rose.\nLabel: Positive.", "Sales rose.", 2),
        ("Sales rose.\nnot positive but neutral", "Sales rose.", None),
        ("very positive", "", 3),
        ("A\n\nB\nvery positive\n", "A\nB", 3),
        ("", "", None),
    ],
)
def test_the_last_line_names_the_label(answer: str, reasons: str, label: int | None) -> None:
    assert reasons_of(answer, ("negative", "neutral", "positive", "very positive")) == (reasons, label)
