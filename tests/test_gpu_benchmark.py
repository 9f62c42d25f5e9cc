"""The small version of `benchmarks/gpu.py`: its equalities hold on a CPU, and failures are isolated."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import commands
import pytest

from benchmarks import gpu

FAR = 600.0
# Rows of each section that are checked on a CPU, and parts that say that they need a GPU.
CHECKED = {
    "machine": (2, 2),
    "correctness": (27, 0),
    "precision": (11, 0),
    "attention": (3, 0),
    "training": (2, 0),
    "inference": (4, 0),
    "glm9b": (3, 2),
    "memory": (0, 4),
    "behavior": (2, 2),
    "runs": (0, 2),
}


def test_the_small_version_meets_every_limit(tmp_path: Path) -> None:
    """Losses, gradients, scores and answers of finsa equal those of plain transformers, one row at a time."""
    file = tmp_path / "events.jsonl"
    done = commands.run("--device", "cpu", "--child", str(file), script="benchmarks/gpu.py")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [event["section"] for event in events if event["event"] == "end"] == list(gpu.SECTIONS)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in gpu.SECTIONS}
    for event in events:
        if event["event"] == "row":
            rows[event["section"]].append(event["row"])
    assert [(name, row) for name, found in rows.items() for row in found if row["ok"] is False] == []
    counted = {
        name: (sum(row["ok"] is True for row in found), sum(row["value"] == "needs a GPU" for row in found))
        for name, found in rows.items()
    }
    assert counted == CHECKED
    named = {row["name"]: row["figures"] for row in rows["correctness"]}
    assert named["loss: a shared prefix once"]["off"] < 1e-6
    assert named["gradients: packed"]["off"] < 1e-5
    assert named["generated answers, batched"]["same"] == 1
    nf4 = {row["name"]: row["figures"] for row in rows["precision"]}
    assert 0.8 < nf4["gradients: nf4"]["cosine"] < 0.9999  # rounding to 16 values is seen, and is no more than that


def test_a_section_that_ends_its_process_is_a_row(tmp_path: Path) -> None:
    """An unknown section simulates one that ends the process."""
    first, last = gpu.events(["gone", "machine"], "cpu", time.monotonic() + FAR, tmp_path)
    assert (first["section"], first["row"]["ok"], last["event"]) == ("gone", False, "end")
    assert first["row"]["value"].startswith("the process ended with exit code 2: ")
    assert "invalid choice: 'gone'" in first["row"]["value"]


def test_nothing_is_started_when_no_time_is_left(tmp_path: Path) -> None:
    first, last = gpu.events(["machine"], "cpu", time.monotonic() + gpu.LEAST - 0.5, tmp_path)
    assert first["row"]["value"] == "skipped: the time of this call was used up; run it by --only"
    assert (first["row"]["ok"], last) == (None, {"event": "end", "section": "machine", "seconds": 0.0})


def test_a_section_that_exceeds_its_time_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SMALL_BUDGET", 0.2)  # sooner than anything is imported
    first, last = gpu.events(["machine"], "cpu", time.monotonic() + FAR, tmp_path)
    assert (first["row"]["ok"], last["event"]) == (False, "end")
    assert first["row"]["value"] == "stopped after 0 s: out of its time"


def test_results_are_written_after_every_row(tmp_path: Path) -> None:
    """A killed call leaves its measurements, as JSON and as a table, and no process."""
    file = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--only", "machine", "runs", "correctness", "--output", str(file)]
    process = commands.Command(*words, script="benchmarks/gpu.py")
    for _ in range(900):
        if file.is_file() and json.loads(file.read_text())["sections"]["machine"]["rows"]:
            break
        time.sleep(0.1)
    process.signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    found = json.loads(file.read_text())
    assert (found["form"], list(found["sections"])) == ("small", ["machine", "correctness", "runs"])
    assert found["sections"]["machine"]["rows"][0]["name"] == "packages"
    assert found["provenance"]["versions"]["torch"]
    table = file.with_suffix(".md").read_text().splitlines()
    assert table[2:4] == ["| section | what | measured | limit | check |", "|---|---|---|---|---|"]
    assert table[4].startswith("| machine | packages | torch ")


def test_a_failed_check_is_shown_in_the_table() -> None:
    rows = [gpu.row("a", "off by 1 | 2", False, "<= 0"), gpu.row("b", "3 s")]
    values: dict[str, Any] = {"card": "H", "driver": "1", "clock": "2", "form": "full", "seconds": 4}
    values["provenance"] = {"versions": dict.fromkeys(("torch", "transformers", "trl", "peft", "bitsandbytes"), "5")}
    values["sections"] = {"memory": {"rows": rows}}
    lines = gpu.markdown(values).splitlines()
    assert lines[0].endswith("commit unknown; full form, 4 s; 0 of 1 checks met (`python benchmarks/gpu.py`).")
    assert lines[4:] == ["| memory | a | off by 1 / 2 | <= 0 | **not met** |", "| memory | b | 3 s |  |  |"]
