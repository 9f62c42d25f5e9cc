"""The list of choices: every name once, with the sentence from its file, without importing torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finsa.config import ROOT, RunConfig, catalogue
from finsa.stages import list as listing

GROUPS = ("model", "method", "data", "train", "stage", "experiment", "published", "behavior", "tracking")


def test_every_choice_is_listed_with_the_first_sentence_of_its_header(
    config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(GROUPS) == set(catalogue.groups())
    for group in GROUPS:
        done = listing.run(config("stage=list", f"stage.group={group}"))
        shown = " ".join(capsys.readouterr().out.split())
        assert done.metrics == {group: len(catalogue.choices_of(group))}
        for name in catalogue.choices_of(group):
            assert f"{name} {catalogue.summary(catalogue.file_of(group, name))}" in shown


FILES = [
    (
        "# A thing (Liu et al. 2024), of 3.7 parts. More of it.\n# python run.py x=y\nname: x\n",
        "A thing (Liu et al. 2024), of 3.7 parts.",
        "A thing (Liu et al. 2024), of 3.7 parts. More of it.",
    ),
    ("# @package _global_\n# Two\n# lines.\nname: x\n# not this\n", "Two lines.", "Two lines."),
]


@pytest.mark.parametrize(("text", "summary", "whole"), FILES)
def test_summary_is_the_first_sentence(tmp_path: Path, text: str, summary: str, whole: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    assert (catalogue.summary(file), catalogue.description(file)) == (summary, whole)


def test_list_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['run.py', 'stage=list']; from finsa.cli import run; code = run();"
        "print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert all(f"{group}=" in done.stdout for group in GROUPS)
