"""The stage: its output, its files, and known properties of public data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.stages import inspect

Configure = Callable[..., RunConfig]
FIGURES = {"labels_by_split", "ledger", "token_lengths", "traits"}


def _run(config: Configure, out: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    result = inspect.run(config("stage=inspect", "tracking=none", f"output_dir={out}", *overrides))
    assert result.run_dir is not None
    return result.run_dir, json.loads((result.run_dir / "inspect.json").read_text(encoding="utf-8"))


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_sample(config: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, numbers = _run(config, tmp_path)
    shown = capsys.readouterr().out
    drawn = {file.stem for file in folder.glob("*.png")}
    assert {of["rows"] for of in numbers["splits"].values() if sum(of["cut"].values())} == set()
    pairs = sum(one["pairs"] for one in numbers["near_duplicates"]["between"])
    assert drawn == FIGURES | {"labels_by_domain"} | ({"near_duplicates"} if pairs else set())
    assert "truncation.png" not in (folder / "inspect.html").read_text(encoding="utf-8")
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "complete"
    assert {split: of["rows"] for split, of in numbers["splits"].items()} == {
        "train": 3608,
        "validation": 596,
        "test": 596,
    }
    assert _lines(folder / "dropped.jsonl") == []
    for part in ("prompt", "text", "answer", "end", "* 1", "文本：", "<|endoftext|>", "Labels by domain", "read 4,800"):
        assert part in shown
    assert "\x1b" not in shown  # readable without colors
    flat = " ".join(shown.split())
    assert [sentence for sentence in numbers["findings"] if sentence not in flat] == []
    assert shown.endswith(f"page: {folder / 'inspect.html'}\n")


def test_colors_on_a_terminal(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from finsa.evaluation import tables

    terminal = Console(force_terminal=True, width=120, record=True)
    monkeypatch.setattr(tables, "console", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _run(config, tmp_path, FEW, "data.max_length=24")
    styled = terminal.export_text(styles=True)
    assert "\x1b[1;4;32m" in styled  # the answer, with loss
    assert "\x1b[36m" in styled  # the text
    assert "\x1b[9;31m" in styled  # truncated text


def test_dropped_rows_near_duplicates_and_several_files(config: Configure, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, label in (("posts", "看多"), ("news", "看空")):
        rows = [(f"{name}的第{n * 7919}条消息说{n}", label if n % 4 else "观望") for n in range(60)]
        extra = {"posts": [("", "看多")], "news": [rows[0], ("news的第7919条消息说 1！", "看空")]}[name]
        pl.DataFrame([*rows, *extra], ["text", "label"], orient="row").write_csv(data / f"{name}.csv")
    folder, numbers = _run(
        config, tmp_path / "out", "data=table", f"data.files={data}", "data.near_duplicates.threshold=0.5"
    )
    dropped = _lines(folder / "dropped.jsonl")
    assert sorted(row["fate"] for row in dropped) == ["duplicate", "empty text"]
    kinds = {found["kind"]: found for found in numbers["groups"]}
    assert {group["name"]: group["rows"] for group in kinds["file"]["groups"]} == {"posts.csv": 60, "news.csv": 61}
    assert "File posts.csv (60 rows, 50 % of all) has no 看空 rows." in numbers["findings"]
    assert (folder / "near_duplicates.png").is_file()
    pairs = _lines(folder / "near_duplicates.jsonl")
    assert len(pairs) == sum(one["pairs"] for one in numbers["near_duplicates"]["between"]) > 0
    assert {pair["label"] for pair in pairs} <= {"看多", "看空", "观望"}


def test_an_empty_split_and_a_method_that_learns_nothing(config: Configure, tmp_path: Path) -> None:
    rows = pl.DataFrame([(f"文本{n}", "ab"[n % 2]) for n in range(20)], ["text", "label"], orient="row")
    rows.write_csv(tmp_path / "test.csv")
    folder, numbers = _run(config, tmp_path, "data=table", f"data.files={tmp_path}", "method=zero_shot")
    assert "The training split is empty." in numbers["findings"]
    assert "The validation split is empty." in numbers["findings"]
    assert (folder / "inspect.html").stat().st_size > 10_000


def test_an_unavailable_tokenizer_is_reported(
    config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder, numbers = _run(config, tmp_path, FEW, "model=glm9b", "method=lora_expert")
    assert numbers["findings"][0].startswith(
        "Tokens, masks and examples are those of another tokenizer: the embedded one"
    )
    assert "those of another tokenizer" in (folder / "inspect.html").read_text(encoding="utf-8")


@pytest.mark.real_data
def test_known_overlaps_and_confounds_of_public_news(shared_data: Path, config: Configure, tmp_path: Path) -> None:
    _, numbers = _run(config, tmp_path, "data=table", f"data.files={shared_data / 'zh_news_mix'}")
    findings = "\n".join(numbers["findings"])
    between = {(one["held_out"], one["other"]): one for one in numbers["near_duplicates"]["between"]}
    assert 0.04 <= between["test", "train"]["share"] <= 0.06  # SOURCE.md states 4.8 %, by an unnamed measure
    (prefixes,) = (found for found in numbers["groups"] if found["kind"] == "id prefix")
    assert [(group["name"], group["rows"], group["lacks"]) for group in prefixes["groups"]] == [
        ("wx", 8062, ["neutral"]),
        ("fpb", 4824, []),
        ("cfb", 593, []),
    ]
    assert "Id prefix wx (8,062 rows, 60 % of all) has no neutral rows." in findings
    assert "Id prefix and label are confounded" in findings
    assert "94 % of the neutral rows are id prefix fpb" in findings
    assert "Text length predicts the label neutral" in findings
    assert prefixes["association"] == pytest.approx(0.477, abs=0.001)
    assert prefixes["guess"]["accuracy"] > prefixes["guess"]["majority"] + 0.1


@pytest.mark.real_data
def test_public_forum_posts_are_not_confounded(shared_data: Path, config: Configure, tmp_path: Path) -> None:
    _, numbers = _run(config, tmp_path, "data=table", f"data.files={shared_data / 'finfe_forum'}")
    between = {(one["held_out"], one["other"]): one for one in numbers["near_duplicates"]["between"]}
    assert 0.005 <= between["test", "train"]["share"] <= 0.02
    assert [group["name"] for found in numbers["groups"] for group in found["groups"]] == ["finfe-train", "finfe-eval"]
    assert not [sentence for sentence in numbers["findings"] if "confounded" in sentence or "predicts" in sentence]
