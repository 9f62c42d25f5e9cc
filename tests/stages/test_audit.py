"""The stage as a user runs it: answer files in, a table, a page and numbers out."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import commands
from matplotlib import image


def test_two_answer_files(tmp_path: Path) -> None:
    """The tables, the remark and the JSON have the same numbers; the picture is drawn."""
    for name, form, right in (("words", "{}", 8), ("sentences", "It is {}.", 7)):
        lines = [
            {
                "gold": gold,
                "answer": form.format(gold if number < right else "negative" if gold != "negative" else "neutral"),
            }
            for gold in ("positive", "neutral", "negative")
            for number in range(10)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    files = f"input=[{tmp_path / 'words.jsonl'},{tmp_path / 'sentences.jsonl'}]"
    done = commands.run(
        "stage=audit", files, f"output={tmp_path / 'out'}", "tracking=none", environment={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines() if line[0] in "┏┃│└") <= 80
    assert "By finlora, sentences has a higher weighted-F1 than words" in " ".join(done.stdout.split())
    values = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    with (tmp_path / "out" / "audit.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rule"] for row in rows] == [record["rule"] for record in values["records"]]
    assert [row["weighted_f1"] for row in rows] == [f"{record['weighted_f1']:.4f}" for record in values["records"]]
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    for row in rows:
        assert row["weighted_f1"] in page
        assert row["weighted_f1"] in done.stdout
    assert image.imread(tmp_path / "out" / "audit.png").shape[1] == 1020


def test_wrong_commands(tmp_path: Path) -> None:
    for words, message in (
        (("stage=audit",), "stage=audit needs input=<file with answers>"),
        (("stage=predict", "input=[a,b]", "output=c", "run=d"), "stage=predict reads one input, not 2"),
        (("stage=audit", "input=a.csv", "stage.reading_rules.strict.parse=exactly"), "there is no 'exactly'"),
    ):
        done = commands.run(*words, f"output_dir={tmp_path}")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
