"""Mutated commands are refused with the right path and suggestion before anything starts; `make mutations`: more."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import compositions
import mutations
import pytest

from finsa.config import catalogue, command_line

BASES: tuple[tuple[str, ...], ...] = ((), ("train=smoke",), ("stage=check",))


def test_mutated_commands_are_refused_and_the_right_one_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "check", partial(command_line.check, compositions=compositions.shared()))
    found = mutations.run(72, of=BASES)
    assert {verdict.mutation.kind for verdict in found} >= {"look-alike", "smuggled", "given twice", "contradictory"}
    missed = [(verdict.base, verdict.mutation, verdict.said) for verdict in found if not verdict.caught]
    assert missed == []
    hinted = [verdict for verdict in found if verdict.mutation.suggested is not None]
    helped = sum(verdict.helped for verdict in hinted)
    assert helped >= 0.95 * len(hinted), [(v.mutation, v.said) for v in hinted if not v.helped]


def test_every_stage_is_mutated() -> None:
    stages = {f"stage={name}" for name in catalogue.choices_of("stage")}
    assert stages <= {base[0] for base in mutations.bases("stage") if base}


def test_a_verdict_can_be_negative() -> None:
    """The tests would detect an accepted command, a wrong path and a wrong suggestion."""
    right = mutations.judge((), mutations.Mutation("none", ("seed=3",), "seed"))
    assert (right.started, right.caught) == (True, False)
    assert not mutations.judge((), mutations.Mutation("none", ("seed=-3",), "train.epochs")).caught
    other = mutations.judge((), mutations.Mutation("none", ("method=lroa",), "method", "full"))
    assert (other.caught, other.helped) == (True, False)


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, mutations; found = mutations.run(12, of=((),)); "
        "sys.exit('torch' in sys.modules or not all(verdict.caught for verdict in found))"
    )
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(Path(mutations.__file__).parent), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
