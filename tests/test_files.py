"""Files appear whole or not at all, and one process at a time is in a folder: checked with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finsa import files, locks
from finsa.config import ROOT
from finsa.errors import RunError

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
