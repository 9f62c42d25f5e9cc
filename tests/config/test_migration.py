"""Run folders of an older version are read, with a note on keys that are filled in, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finsa.config import RunConfig
from finsa.errors import RunError
from finsa.runs import run_folder
from finsa.session import Session

Config = Callable[..., RunConfig]
WORDS = ("method=qlora", "train=smoke", "train.max_steps=7")


@pytest.fixture
def folder(config: Config, tmp_path: Path) -> Path:
    with run_folder.start(config(*WORDS, f"output_dir={tmp_path}"), "rows", Session()) as made:
        pass
    return made.path


def change(folder: Path, act: Callable[[Any], None]) -> str:
    file = folder / "config.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    act(values)
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return str(folder)


def test_a_configuration_names_the_version_that_wrote_it(folder: Path) -> None:
    assert (folder / "config.yaml").read_text(encoding="utf-8").startswith("# finsa 0.")


def test_missing_keys_are_filled_in_from_the_same_choices_and_reported_once(
    folder: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(values: Any) -> None:
        del values["train"]["heartbeat_seconds"], values["train"]["log_every"], values["method"]["quantization"]
        del values["fresh"]

    place = change(folder, act)
    for _ in range(2):
        cfg = run_folder.read(place)[1]
        assert cfg == config(*WORDS, f"output_dir={folder.parent}")  # train=smoke logs every step, qlora is nf4
    told = capsys.readouterr().out
    assert told.count("an older version, which did not have these keys") == 1
    for key in ("train.heartbeat_seconds=30", "train.log_every=1", 'method.quantization="nf4"', "fresh=false"):
        assert key in told
    assert "max_steps" not in told


def test_runs_from_before_thoughts_are_read(folder: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    def act(values: Any) -> None:
        del values["model"]["thought"], values["data"]["columns"]["rationale"], values["method"]["grpo"]

    assert run_folder.read(change(folder, act))[1] == config(*WORDS, f"output_dir={folder.parent}")
    assert "data.columns.rationale=null" in capsys.readouterr().out


def test_removed_keys_are_ignored(folder: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    place = change(folder, lambda values: values["train"].update(batch_tokens=4096, compile=True))
    assert run_folder.read(place)[1] == config(*WORDS, f"output_dir={folder.parent}")
    assert capsys.readouterr().out == ""


def test_a_run_from_before_whole_conversations_reads_the_last_turn(folder: Path) -> None:
    def act(values: Any) -> None:
        del values["data"]["turns"]

    assert run_folder.read(change(folder, act))[1].data.turns == "last"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda values: values["train"].update(color="red"), "train.color: Extra inputs are not permitted"),
        (lambda values: values["train"].update(schedule="spiral"), "train.schedule: Input should be 'cosine'"),
        (lambda values: values.pop("model") and values.update(model="tiny"), "model: "),
    ],
)
def test_an_incompatible_value_is_named(folder: Path, act: Callable[[Any], None], message: str) -> None:
    with pytest.raises(RunError, match=message) as told:
        run_folder.read(change(folder, act))
    assert "Train it again, or use the version that wrote it" in str(told.value)


def test_an_incomplete_configuration_is_reported_as_damaged(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {", encoding="utf-8")
    with pytest.raises(RunError, match="is damaged"):
        run_folder.read(str(folder))


def test_a_run_that_is_being_written_is_not_resumed_by_another(config: Config, tmp_path: Path) -> None:
    words = (*WORDS, f"output_dir={tmp_path}")
    with run_folder.start(config(*words), "rows", Session()) as made:
        with (
            pytest.raises(RunError, match=f"{made.path} is in use by process "),
            run_folder.start(config(*words, "resume=true"), "rows", Session()),
        ):
            pass
        with pytest.raises(RunError, match="is being written by process "):
            run_folder.read(str(made.path))
        assert run_folder.unfinished(config(*words), "rows") is None
    assert run_folder.read(str(made.path))[2]["status"] == "complete"
