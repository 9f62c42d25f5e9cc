"""Fixtures shared by several test modules: paths, tokenizers and configurations, without network and log messages."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import compositions
import pytest

from finsa.config import ROOT, RunConfig, compose
from finsa.runs.processes import QUIET

for _name, _value in {**QUIET, "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(_name, _value)

# The files that take longest, in this order: half a minute and more, down to about fifteen seconds.
LONGEST = (
    *("test_sweeps", "stages/test_real_model", "runs/test_processes", "training/test_memory_plan"),
    *(
        "stages/test_export",
        "stages/test_values",
        "conf/test_conf",
        "board/test_board",
        "trust/test_kills",
        "stages/test_pretrain",
    ),
    *("models/test_factory", "stages/test_predict", "stages/test_chain", "stages/test_moe_joint", "stages/test_serve"),
    *(
        "training/test_preferences",
        "test_gpu_benchmark",
        "stages/test_baselines",
        "config/test_safety",
        "stages/test_train",
        "data/test_hub",
    ),
    *("test_package", "test_cli", "test_benchmarks", "stages/test_few_shot", "stages/test_check", "test_readme"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that at the end no process waits for the other one's (see the Makefile)."""
    files = {ROOT / "tests" / f"{name}.py": number for number, name in enumerate(LONGEST)}
    assert [file for file in files if not file.is_file()] == []
    items.sort(key=lambda item: files.get(item.path, len(files)))


def pytest_collection_finish() -> None:
    """Exempt everything imported so far from garbage collection: every training run collects several times."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None, item: pytest.Item) -> Iterator[None]:
    """After a module, also exempt what it has imported and what stays cached for the session."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def project() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data sets beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no public data sets beside the repository")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, as `make weights` converts it."""
    return _converted("smollm2_135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """The folder of Gemma 3 270M."""
    return _converted("gemma3_270m")


@pytest.fixture(scope="session")
def e5_small() -> Path:
    """The folder of multilingual-e5-small."""
    return _converted("e5_small")


def _converted(name: str) -> Path:
    """The folder of real weights from `make weights`; the test is skipped if it is missing."""
    folder = ROOT / "models" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no real weights in models/{name}; make weights NAMES={name} fetches them")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded base's tokenizer; it is part of the repository, so its absence is a failure, not a skip."""
    return _tokenizer(ROOT / "data" / "tiny")


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Any:
    """The real Qwen2 vocabulary, without a chat template."""
    folder = ROOT.parent / "shared" / "tokenizer" / "qwen2"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the real Qwen2 vocabulary is not beside the repository")
    return _tokenizer(folder)


@cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def config() -> Callable[..., RunConfig]:
    """Compose and check a configuration from overrides, as a command line gives them."""
    return _config


@cache
def _config(*overrides: str, folders: tuple[Path, ...] = ()) -> RunConfig:
    if folders:
        return compose.build(*compose.compose_values(overrides, folders), overrides)
    return compositions.config(*overrides)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that choose the embedded base's first two layers, where it does not matter what the base knows."""
    import base_models

    return base_models.write_shallow(tmp_path_factory.mktemp("shallow") / "base")


@pytest.fixture(scope="session")
def trained(
    config: Callable[..., RunConfig], shallow: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The folder of a short finished run of a method; one per session. That of a classifier has two layers."""
    import trained as runs_of_methods

    base = tmp_path_factory.mktemp("trained")

    def of(method: str, *words: str) -> Path:
        fewer = shallow if method == "classifier" else ()
        return runs_of_methods.run_folder(config, base, method, *fewer, *words)

    return of


@pytest.fixture(scope="session")
def instructed(config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a short finished run on instruction rows and chats, and the folder of their files."""
    import trained as runs_of_methods

    return runs_of_methods.of_instructions(config, tmp_path_factory.mktemp("instructed"))
