from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from finsa.config import RunConfig
from finsa.errors import RunError
from finsa.runs import provenance, run_folder
from finsa.session import Session

Config = Callable[..., RunConfig]
WATCHED = ["train.heartbeat_seconds=1", "train.stall_seconds=null", "train.stall_ends=true"]


def test_a_finished_folder_reads_back(config: Config, tmp_path: Path) -> None:
    cfg = config(f"output_dir={tmp_path}", "train.epochs=3")
    with run_folder.start(cfg, "rows", Session()) as folder:
        assert json.loads((folder.path / "run.json").read_text())["status"] == "running"
        folder.write_lines("lines.jsonl", [{"text": "利好"}, {"text": "a"}])
    path, read, facts = run_folder.read(str(folder.path))
    assert (path, read) == (folder.path, cfg)
    assert (facts["status"], facts["data_fingerprint"]) == ("complete", "rows")
    assert (folder.path / "lines.jsonl").read_text(encoding="utf-8") == '{"text": "利好"}\n{"text": "a"}\n'
    assert not list(folder.path.glob(".*.part"))


def test_a_failed_run_is_marked_and_not_treated_as_finished(config: Config, tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        run_folder.start(config(f"output_dir={tmp_path}"), None, Session()) as folder,
    ):
        raise ZeroDivisionError("on purpose")
    facts = json.loads((folder.path / "run.json").read_text())
    assert (facts["status"], facts["error"]) == ("failed", "ZeroDivisionError: on purpose")
    with pytest.raises(RunError, match="is failed, not complete .*on purpose.*resume=true"):
        run_folder.read(str(folder.path))


def test_a_finished_run_is_found_by_its_configuration_and_rows(config: Config, tmp_path: Path) -> None:
    cfg = config(f"output_dir={tmp_path}", "train.epochs=3")
    assert run_folder.finished(cfg, "rows") is None
    for _ in range(2):
        with run_folder.start(cfg, "rows", Session()) as folder:
            pass
    with pytest.raises(KeyboardInterrupt), run_folder.start(cfg, "rows", Session()):
        raise KeyboardInterrupt
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    assert run_folder.finished(cfg, "rows") == folder.path
    assert run_folder.finished(cfg, "other rows") is None
    assert run_folder.finished(config(f"output_dir={tmp_path}", "train.epochs=4"), "rows") is None
    assert (
        run_folder.finished(config(f"output_dir={tmp_path}", "train.epochs=3", "tracking=none"), "rows") == folder.path
    )


# In this order in time; the first three are out of order as strings: the hour that autumn repeats, and another zone.
MOMENTS = (
    "2026-10-25T02:50:00+02:00",
    "2026-10-25T02:10:00+01:00",
    "2026-10-25T01:30:00.250+00:00",
    "2026-10-25T01:30:00.500+00:00",
    "2026-10-25T10:00:00+08:00",
)


@pytest.mark.parametrize("newest", [2, 3, 4, 5])
def test_the_newest_run_is_the_latest_in_time(newest: int, config: Config, tmp_path: Path) -> None:
    cfg = config(f"output_dir={tmp_path}", "train.epochs=3")
    folders = []
    for number, moment in enumerate(MOMENTS[:newest]):
        with run_folder.start(cfg, "rows", Session()) as folder:
            pass
        place = folder.path.rename(tmp_path / f"{9 - number}")  # names sort the other way round
        facts = json.loads((place / "run.json").read_text(encoding="utf-8"))
        record = facts | {"stage": "train", "started": moment, "finished": moment}
        (place / "run.json").write_text(json.dumps(record), encoding="utf-8")
        folders.append(place)
    (tmp_path / "x").mkdir()  # without a time
    del record["finished"], record["started"]
    (tmp_path / "x" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert run_folder.latest(str(tmp_path)) == folders[-1]
    assert run_folder.finished(cfg, "rows") == folders[-1]
    for place in (*folders, tmp_path / "x"):
        facts = json.loads((place / "run.json").read_text(encoding="utf-8"))
        (place / "run.json").write_text(json.dumps(facts | {"status": "failed"}), encoding="utf-8")
    assert run_folder.unfinished(cfg, "rows") == folders[-1]


def test_resume_uses_the_unfinished_run_of_this_configuration(config: Config, tmp_path: Path) -> None:
    folders = {}
    for epochs in (3, 4):
        with (
            pytest.raises(KeyboardInterrupt),
            run_folder.start(config(f"output_dir={tmp_path}", f"train.epochs={epochs}"), None, Session()) as f,
        ):
            folders[epochs] = f.path
            raise KeyboardInterrupt
    with run_folder.start(config(f"output_dir={tmp_path}", "train.epochs=3", "resume=true"), None, Session()) as folder:
        assert folder.path == folders[3]
    with (
        pytest.raises(RunError, match="no unfinished run of this configuration"),
        run_folder.start(config(f"output_dir={tmp_path}", "train.epochs=3", "resume=true"), None, Session()),
    ):
        pass


@pytest.mark.parametrize("killed", [False, True])
def test_seconds_of_a_resumed_run_are_those_of_all_sittings(config: Config, tmp_path: Path, killed: bool) -> None:
    """A killed run wrote no end: it lasted until its folder last changed, here 100 seconds."""
    cfg = config(f"output_dir={tmp_path}")
    with pytest.raises(KeyboardInterrupt), run_folder.start(cfg, None, Session()) as folder:
        raise KeyboardInterrupt
    facts = json.loads((folder.path / "run.json").read_text(encoding="utf-8"))
    if killed:
        facts |= {"status": "running", "wall_seconds": 7.0}
        started = datetime.fromisoformat(facts["started"]).timestamp()
        (folder.path / "heartbeat.json").write_text("{}", encoding="utf-8")
    else:
        facts["wall_seconds"] = 107.0
    (folder.path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    if killed:
        os.utime(folder.path / "run.json", (started, started))
        os.utime(folder.path / "heartbeat.json", (started + 100, started + 100))
    with run_folder.start(config(f"output_dir={tmp_path}", "resume=true"), None, Session()) as resumed:
        assert resumed.path == folder.path
    assert 107 <= json.loads((folder.path / "run.json").read_text(encoding="utf-8"))["wall_seconds"] < 137


def test_resume_refuses_other_rows(config: Config, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_folder.start(config(f"output_dir={tmp_path}"), "these rows", Session()):
        raise KeyboardInterrupt
    with (
        pytest.raises(RunError, match="the rows have changed"),
        run_folder.start(config(f"output_dir={tmp_path}", "resume=true"), "other rows", Session()),
    ):
        pass


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's folder, as far as its fingerprint needs it."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        (folder / name).write_text(name)
    return folder


def changed(folder: Path, **facts: Any) -> None:
    """Change facts of a record, as written by another version of finsa or of a library."""
    known = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(known | facts), encoding="utf-8")


VERSIONS = {name: provenance._version(name) for name in provenance.PACKAGES}


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({}, None),
        ({"machine": "another", "versions": {**VERSIONS, "wandb": "0.1"}}, None),  # which change no result
        ({"versions": {**VERSIONS, "torch": "2.0"}}, f"torch: 2.0, now {VERSIONS['torch']}"),
        ({"code": "0" * 16, "git_commit": "a" * 40}, "finsa's code: aaaaaaaaaaaa, now "),
        ({"code": None, "git_commit": "a" * 40}, "finsa's code: aaaaaaaaaaaa, now "),
        ({"resumed_with": ["trl: 0.9, now 1.0"]}, "trl: 0.9, now 1.0"),
    ],
    ids=["same", "beside", "version", "code", "older", "resumed"],
)
def test_a_run_of_other_code_or_versions_is_reused_if_requested(
    facts: dict[str, Any], told: str | None, config: Config, base: Path, tmp_path: Path, capsys: Any
) -> None:
    words = (f"output_dir={tmp_path}", f"model.path={base}")
    for status, use, find in (
        ("complete", "reused", run_folder.finished),
        ("failed", "resumed", run_folder.unfinished),
    ):
        with run_folder.start(config(*words), "rows", Session()) as folder:
            pass
        changed(folder.path, status=status, **facts)
        assert find(config(*words), "rows") == (None if told else folder.path)
        said = capsys.readouterr().out
        if told:
            assert said.startswith(f"{folder.path} is not {use}, because it was run with a different setup: {told}")
            assert said.endswith(f"; with reuse_outdated=true it is {use} anyway\n")
        else:
            assert said == ""
        assert find(config(*words, "reuse_outdated=true"), "rows") == folder.path
        said = capsys.readouterr().out
        assert said.startswith(f"{folder.path} is {use} (reuse_outdated=true)") == bool(told)
        changed(folder.path, status="pruned", config_hash="")


def test_a_run_of_other_weights_is_never_used(config: Config, base: Path, tmp_path: Path, capsys: Any) -> None:
    words = (f"output_dir={tmp_path}", f"model.path={base}", "reuse_outdated=true")
    with run_folder.start(config(*words), "rows", Session()) as done:
        pass
    with pytest.raises(KeyboardInterrupt), run_folder.start(config(*words), "rows", Session()) as begun:
        raise KeyboardInterrupt
    (base / "README.md").write_text("another")  # which no model is made of
    assert run_folder.finished(config(*words), "rows") == done.path
    noted = json.loads((done.path / "run.json").read_text(encoding="utf-8"))["base_weights"]
    assert sorted(noted["model"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    (base / "model.safetensors").write_text("odel.safetensorsm")
    assert run_folder.finished(config(*words), "rows") is None
    assert run_folder.unfinished(config(*words), "rows") is None
    told = rf"model.safetensors of the model: {noted['model']['model.safetensors']}, now [0-9a-f]{{16}}"
    for line, path, use in zip(
        capsys.readouterr().out.splitlines(), (done.path, begun.path), ("reused", "resumed"), strict=True
    ):
        assert re.fullmatch(f"{path} is not {use}, because it was run with a different setup: {told}", line)
    with (
        pytest.raises(RunError, match=rf"resume: weights have changed since {begun.path} was started \({told}\)"),
        run_folder.start(config(*words, "resume=true"), "rows", Session()),
    ):
        pass
    (base / "model.safetensors").write_text("model.safetensors")
    assert run_folder.finished(config(*words), "rows") == done.path


def test_weights_downloaded_by_a_run_itself_are_not_different_weights(config: Config, tmp_path: Path) -> None:
    """When it started, the commit of the branch was not yet known on this machine."""
    words = (f"output_dir={tmp_path}", "model=qwen05b")
    with pytest.raises(KeyboardInterrupt), run_folder.start(config(*words), "rows", Session()) as begun:
        raise KeyboardInterrupt
    changed(begun.path, base_weights={"model": {"commit": "unknown"}})
    with run_folder.start(config(*words, "resume=true"), "rows", Session()) as folder:
        assert folder.path == begun.path
    commit = config(*words).model.revision
    assert run_folder.read(str(folder.path))[2]["base_weights"] == {"model": {"commit": commit}}
    changed(folder.path, base_weights={"model": {"commit": "unknown"}})
    assert run_folder.finished(config(*words), "rows") is None


def test_a_run_resumed_by_other_code_is_reported(config: Config, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(KeyboardInterrupt), run_folder.start(config(f"output_dir={tmp_path}"), None, Session()) as begun:
        raise KeyboardInterrupt
    changed(begun.path, versions={**VERSIONS, "peft": "0.1"})
    with run_folder.start(config(f"output_dir={tmp_path}", "resume=true"), None, Session()) as folder:
        assert folder.path == begun.path
    told = f"peft: 0.1, now {VERSIONS['peft']}"
    assert (
        capsys.readouterr().out == f"{folder.path} is resumed, although it was started with a different setup: {told}\n"
    )
    assert run_folder.read(str(folder.path))[2]["resumed_with"] == [told]


def test_an_evaluation_starts_from_its_run(config: Config, base: Path, tmp_path: Path) -> None:
    with run_folder.start(config(f"output_dir={tmp_path}", f"model.path={base}"), None, Session()) as trained:
        (trained.path / "adapters").mkdir()
        (trained.path / "adapters" / "weights").write_text("one")
    cfg = config("stage=evaluate", f"run={trained.path}", f"output_dir={tmp_path}/evaluated")
    with run_folder.start(cfg, "rows", Session()) as folder:
        pass
    assert sorted(folder.facts["base_weights"]) == ["model", "run"]
    assert run_folder.finished(cfg, "rows") == folder.path
    changed(trained.path, weights={"adapters/weights": "another"})
    assert run_folder.finished(cfg, "rows") is None


def test_two_runs_in_one_second_get_two_folders(config: Config, tmp_path: Path) -> None:
    with (
        run_folder.start(config(f"output_dir={tmp_path}"), None, Session()) as first,
        run_folder.start(config(f"output_dir={tmp_path}"), None, Session()) as second,
    ):
        assert first.path != second.path


def test_the_hash_ignores_where_a_run_is_written_and_tracked(config: Config) -> None:
    same = {
        run_folder.config_hash(config(*words))
        for words in ([], ["output_dir=x"], ["tracking=none"], ["resume=true"], ["reuse_outdated=true"], WATCHED)
    }
    assert len(same) == 1
    assert run_folder.config_hash(config("seed=1")) not in same


def test_a_folder_that_is_not_a_run_is_reported_with_the_closest_name(config: Config, tmp_path: Path) -> None:
    with run_folder.start(config(f"output_dir={tmp_path}"), None, Session()) as folder:
        pass
    with pytest.raises(RunError, match=f"is not a run folder. Did you mean '{folder.path.name}'"):
        run_folder.read(str(folder.path)[:-1])


def test_only_folders_of_runs_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "opt").mkdir()
    with pytest.raises(RunError, match="nope is not a run folder.$"):
        run_folder.read(str(tmp_path / "nope"))


def test_a_damaged_record_is_named(config: Config, tmp_path: Path) -> None:
    with run_folder.start(config(f"output_dir={tmp_path}"), None, Session()) as folder:
        pass
    (folder.path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        run_folder.read(str(folder.path))
