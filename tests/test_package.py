"""The package from ``pip install .``: the same command from anywhere, including conf/ and the embedded default."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finsa.config import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built wheel installed, and without the checkout."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("finsa-*.whl")
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder / "site"),
    ]
    subprocess.run([*words, str(wheel)], check=True, capture_output=True)
    return folder / "site"


def _command(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_wheel_contains_every_file_of_conf_and_the_embedded_default(site: Path) -> None:
    (wheel,) = (site.parent / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    folders = ("conf", "data/sample", "data/tiny")
    wanted = [file.relative_to(ROOT).as_posix() for folder in folders for file in (ROOT / folder).rglob("*.*")]
    assert len(wanted) > 90
    assert {f"finsa/home/{name}" for name in wanted} <= held
    templates = [file.relative_to(ROOT).as_posix() for file in (ROOT / "finsa").rglob("templates/*")]
    assert len(templates) >= 5
    fonts = [file.relative_to(ROOT).as_posix() for file in (ROOT / "finsa").rglob("fonts/*")]
    assert len(fonts) == 2
    assert {*templates, *fonts} <= held


def test_the_installed_command_lists_its_choices(site: Path, tmp_path: Path) -> None:
    where = _command(site, tmp_path, sys.executable, "-c", "import finsa.config.catalogue as c; print(c.CONF)")
    assert where.stdout.strip() == str(site / "finsa" / "home" / "conf"), where.stderr
    listed = _command(site, tmp_path, str(site / "bin" / "finsa"), "stage=list", "stage.group=experiment")
    assert listed.returncode == 0, listed.stderr
    assert "aidf_ablation" in listed.stdout


def test_installed_module_plans_the_default_from_another_folder(site: Path, tmp_path: Path) -> None:
    done = _command(site, tmp_path, sys.executable, "-m", "finsa", "stage=check")
    assert done.returncode == 0, done.stderr
    assert "train 3,608" in done.stdout
    assert "28,672 trainable of 3,768,576 total" in done.stdout
    assert list(tmp_path.iterdir()) == []
