"""The documentation: its files and commands run, its reference is complete, it builds without external resources."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import commands
import pytest
import yaml
from pydantic import BaseModel

from finsa import config
from finsa.config import ROOT, catalogue, command_line, compose

TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
EXTEND = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")


@cache
def _hooks() -> Any:
    spec = spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["docs_hooks"] = module
    spec.loader.exec_module(module)
    return module


@cache
def _sections() -> list[Any]:
    """The sections of the reference, with their keys."""
    return list(_hooks().sections())


@pytest.fixture
def my_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files shown on the page, written to the places that it names."""
    shown = {name: text for name, text in TITLED.findall(EXTEND) if name.startswith("my_conf/")}
    assert len(shown) == 5
    for name, text in shown.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = "".join(f"第{n}条帖子,{('看空', '观望', '看多')[n % 3]}\n" for n in range(90))
    (tmp_path / "my_forum.csv").write_text(f"post,mood\n{rows}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _commands(text: str) -> list[list[str]]:
    return [
        shlex.split(line)[3:] for line in re.findall(r"^(?:# )?(python run\.py --config-dir my_conf .*)$", text, re.M)
    ]


def test_every_command_with_the_shown_files_passes_the_check(my_conf: Path) -> None:
    commands = _commands(EXTEND)
    assert len(commands) == 9
    for words in commands:
        rest, folders = command_line.added_folders(
            ["--config-dir", *words[1:]] if words[0] != "my_conf" else ["--config-dir", *words]
        )
        expanded = command_line.expand(rest, folders)
        command_line.check([word for word in expanded if not word.startswith("-")], folders=folders)


def test_shown_data_set_is_planned_by_the_real_command(my_conf: Path) -> None:
    words = ["--config-dir", "my_conf", "stage=check", "data=my_forum", "method=lora_wide"]
    done = commands.run(*words, folder=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "看空 → 利空, 观望 → 中性, 看多 → 利好" in done.stdout
    assert "train 72, validation 9, test 9" in done.stdout


def test_shown_model_has_the_published_number_of_parameters(my_conf: Path) -> None:
    words = ["--config-dir", "my_conf", "stage=check", "model=qwen15b", "method=zero_shot"]
    done = commands.run(*words, folder=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "of 1,543,714,304 total" in done.stdout


def test_shown_stage_runs(tmp_path: Path) -> None:
    """In a copy of the project, with the three pieces in the places that the page names."""
    for name in ("finsa", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    for name in ("sample", "tiny"):
        (tmp_path / "data" / name).symlink_to(ROOT / "data" / name)
    shutil.copy(ROOT / "run.py", tmp_path)
    pieces = [(name, text) for name, text in TITLED.findall(EXTEND) if not name.startswith("my_conf/")]
    assert [name for name, _ in pieces] == [
        "finsa/config/stages.py",
        "conf/stage/count.yaml",
        "finsa/stages/count.py",
    ]
    types = tmp_path / "finsa" / "config" / "stages.py"
    written = types.read_text(encoding="utf-8").replace(
        "Stage = Annotated[\n", pieces[0][1] + "\n\nStage = Annotated[\n"
    )
    types.write_text(
        written.replace("    TrainStage\n    |", "    TrainStage\n    | CountStage\n    |"), encoding="utf-8"
    )
    for name, text in pieces[1:]:
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = [sys.executable, "run.py", "stage=count", "stage.split=validation"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"596 texts, [\d,]+ characters\n", done.stdout)


def _paths(annotation: Any, path: str) -> Iterator[str]:
    """Every key below a section, determined independently of the page."""
    for name, field in annotation.model_fields.items():
        yield f"{path}{name}"
        for part in [field.annotation, *typing.get_args(field.annotation)]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _paths(part, f"{path}{name}.")


def test_reference_has_every_key_with_a_type_and_a_meaning() -> None:
    keys = [key for _, section in _sections() for key in section]
    expected = {"seed", *(name for name in config.RunConfig.model_fields if name not in ("stage",))}
    for group in ("model", "method", "data", "train", "tracking"):
        expected |= set(_paths(config.RunConfig.model_fields[group].annotation, f"{group}."))
    for union, path in ((config.Stage, "stage."), (config.Baseline, "method.baseline.")):
        for branch in typing.get_args(typing.get_args(union)[0]):
            expected |= set(_paths(branch, path))
    groups = {"model", "method", "data", "train", "tracking"}  # separate sections
    assert {key.path for key in keys} == expected - groups
    assert [key.path for key in keys if not key.meaning or not key.kind] == []
    assert len(keys) > 280


def test_reference_has_the_defaults_of_a_command() -> None:
    values = compose.compose_values([])[0]
    defaults = {key.path: key.default for _, section in _sections()[:6] for key in section}
    for path in ("seed", "model.dtype", "method.adapter.rank", "data.max_length", "train.epochs", "tracking.mode"):
        value: Any = values
        for part in path.split("."):
            value = value[part]
        assert yaml.safe_load(defaults[path]) == value, path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "docs", folder / "docs")
    text = (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8")
    (folder / "docs" / "hooks.py").write_text(text.replace("Path(__file__).parent.parent", f"Path({str(ROOT)!r})"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder / "site")]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder / "site"


def test_pages_use_no_outside_resource(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 18
    loaded = re.compile(
        r"<(?:script|img|iframe|source|link rel=\"(?:stylesheet|preconnect|preload|icon)\")[^>]*https?://"
    )
    assert [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []


def test_pages_contain_the_generated_parts(site: Path) -> None:
    reference = (site / "reference.html").read_text(encoding="utf-8")
    choices = (site / "choices.html").read_text(encoding="utf-8")
    assert "<code>train.learning_rate</code>" in reference
    assert "generated: reference" not in reference
    assert all(f"<code>{name}</code>" in choices for name in catalogue.choices_of("method"))
