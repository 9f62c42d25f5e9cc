"""The audit detects wrong versions."""

from __future__ import annotations

import tomllib
from importlib import metadata

import audit
import clusters
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


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


def _allowed(requirement: Requirement, pins: dict[str, str]) -> bool:
    version = pins.get(canonicalize_name(requirement.name))
    return version is None or requirement.specifier.contains(version.partition("+")[0], prereleases=True)


def test_the_pins_satisfy_the_bounds_of_the_project_and_its_extras() -> None:
    pins = audit.pins(audit.CONSTRAINTS.read_text(encoding="utf-8"))
    project = tomllib.loads((audit.CONSTRAINTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = [project["dependencies"], *project["optional-dependencies"].values()]
    assert [line for group in bounds for line in group if not _allowed(Requirement(line), pins)] == []
    assert {canonicalize_name(Requirement(line).name) for line in project["optional-dependencies"]["ray"]} <= set(pins)


def test_everything_that_the_extra_ray_installs_is_pinned() -> None:
    """With versions that fit together; a pin that does not made the extra impossible to install once."""
    clusters.require_ray()
    pins = audit.pins(audit.CONSTRAINTS.read_text(encoding="utf-8"))
    todo, seen = [Requirement("hydra-ray-launcher"), Requirement("ray[data]")], set[str]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned"
        assert _allowed(requirement, pins), f"{requirement} is required, {pins[name]} is pinned"
        if name + str(requirement.extras) not in seen:
            seen.add(name + str(requirement.extras))
            for line in metadata.requires(name) or []:
                one = Requirement(line)
                if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in (*requirement.extras, "")):
                    todo.append(one)
