"""Files appear whole or not at all, and one process at a time is in a folder: checked with real processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from few import FEW

from finsa import files, jobs, launch, locks
from finsa.config import ROOT, RunConfig
from finsa.errors import RunError

Config = Callable[..., RunConfig]

HOLD = """
import sys, time
from pathlib import Path
from finsa import locks
with locks.held(Path(sys.argv[1]), "here"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with files.replacing(file) as temporary:
        temporary.write_text("one")
        assert not file.exists()
        assert temporary.suffix == ".json"
    assert file.read_text() == "one"
    with pytest.raises(OSError, match="full"), files.replacing(file) as temporary:
        temporary.write_text("tw")
        raise OSError("full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "one")]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(OSError) as told, files.replacing(file) as temporary:
        temporary.symlink_to("/dev/full")  # writes to it fail as those to a full disk do
        temporary.write_text("new")
    assert told.value.errno == 28
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_entries_of_a_folder_move_in_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    (tmp_path / f"{files.STAGING}left").mkdir()
    with files.staged(tmp_path) as place:
        (place / "model").mkdir()
        (place / "model" / "new").write_text("new")
        assert (tmp_path / "model" / "old").is_file()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/new"]
    with pytest.raises(ZeroDivisionError), files.staged(tmp_path) as place:
        (place / "model").mkdir()
        raise ZeroDivisionError
    assert (tmp_path / "model" / "new").read_text() == "new"
    assert files.digests(tmp_path) == {"model/new": files.digest(tmp_path / "model" / "new")}


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        known = json.loads(lock.read_text())
        assert known["pid"] == first.pid
        told = f"run folder x is in use by process {first.pid} on .*, started {known['started'][:10]}"
        with pytest.raises(RunError, match=told), locks.held(lock, "run folder x"):
            pass
        assert f"process {first.pid}" in str(locks.holder(lock))
    finally:
        first.kill()
        first.wait()
    assert locks.holder(lock) is None
    with locks.held(lock, "run folder x"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_who_waits_gets_the_lock_when_the_other_ends(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    code = HOLD.replace("time.sleep(60)", "time.sleep(0.5)")
    first = subprocess.Popen([sys.executable, "-c", code, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    began = time.monotonic()
    with locks.waited(lock, 0.01):
        assert time.monotonic() - began > 0.2
    assert first.wait() == 0


@pytest.mark.parametrize("stage", ["augment", "synthesize", "export"])
def test_an_output_is_made_by_one_process(
    stage: str, config: Config, trained: Callable[..., Path], tmp_path: Path
) -> None:
    words = [f"stage={stage}", f"output={tmp_path / 'out'}"]
    if stage == "augment":
        words += [FEW, "data.cache=null"]
    elif stage == "synthesize":
        words += ["data=openfindata_intent", "stage.model=m"]
    else:
        words += ["format=adapter", f"run={trained('lora_response')}"]
    lock = tmp_path / ".out.lock"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        started = json.loads(lock.read_text())["started"][:16]
        told = f"output {tmp_path}/out is in use by process {first.pid} on .*, started {started}"
        with pytest.raises(RunError, match=told):
            jobs.run(config(*words))
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    finally:
        first.kill()
        first.wait()
    if stage == "augment":  # what the killed process left is no hindrance, and goes
        jobs.run(config(*words))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_is_removed_while_it_is_taken_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, take, taken = tmp_path / ".lock", locks._take, list[bool]()

    def late(stream: IO[str]) -> bool:
        if not taken:
            lock.unlink()  # by who held it until now
        taken.append(take(stream))
        return taken[-1]

    monkeypatch.setattr(locks, "_take", late)
    with locks.held(lock, "here"):
        assert f"process {os.getpid()}" in str(locks.holder(lock))
    assert taken == [True, True]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("name", ["mkdir", "open", "write_text"])
def test_a_run_folder_that_cannot_be_written_is_one_message(
    number: int, name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The folder, its lock or its first file: refused here, because root may write everywhere."""
    place, owner = tmp_path / "runs", os if name == "open" else Path
    real = getattr(owner, name)

    def refusing(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).startswith(str(place)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **named)

    cfg = config("method=majority", FEW, "tracking=none", f"output_dir={place}")
    monkeypatch.setattr(owner, name, refusing)
    assert launch.guard(lambda: launch.run_job(cfg), ["run.py", "method=majority"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {place}")
    assert line.endswith(f": {os.strerror(number)}")
