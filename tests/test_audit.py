"""The audit detects wrong versions."""

from __future__ import annotations

from importlib import metadata

import audit


def test_a_version_other_than_the_pinned_one_is_reported() -> None:
    pins = audit.pins("# a comment\nPyYAML==0.0.1\nnot_installed_here==1.0\ntorch==" + metadata.version("torch") + "\n")
    assert pins["pyyaml"] == "0.0.1"
    assert audit.differing(pins) == [f"pyyaml: {metadata.version('pyyaml')} is installed, 0.0.1 is pinned"]


def test_the_pins_of_the_project_are_read() -> None:
    pins = audit.pins(audit.CONSTRAINTS.read_text(encoding="utf-8"))
    assert {"torch", "transformers", "trl", "peft", "hydra-core"} <= set(pins)


def test_intended_missing_dependencies_are_not_a_conflict() -> None:
    said = "cntext 2.2.1 requires gensim, which is not installed.\npeft 0.1 requires torch>9, but you have torch 2.\n"
    assert audit.conflicting(said) == ["peft 0.1 requires torch>9, but you have torch 2."]
    assert audit.conflicting("No broken requirements found.\n") == []
