"""Files appear atomically, and only one process at a time uses a folder: checked with real processes."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from few import FEW

from finsa import cli
from finsa.config import ROOT, RunConfig
from finsa.errors import ModelError, RunError
from finsa.runs import files, locks, nested
from finsa.session import Session

Config = Callable[..., RunConfig]

HOLD = """
import sys, time
from pathlib import Path
from finsa.runs import locks
with locks.held(Path(sys.argv[1]), "here"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("target", ["file", "folder"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_failed_write_to_disk_is_an_error(
    number: int, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    real = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (target == "folder"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    assert cli.guard(lambda: files.write_text(file, "new"), ["run.py"], Session()) == 2
    named = tmp_path if target == "folder" else tmp_path / ".a.part.txt"
    assert capsys.readouterr().err == f"error: {named}: {os.strerror(number)}\n"
    assert file.read_text() == ("new" if target == "folder" else "old")  # the name may be lost, the content is whole
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_used_anyway(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.sync(Path("/dev/null"))  # for which the kernel itself says EINVAL

    def refusing(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refusing)
    files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_checkpoint_that_does_not_reach_the_disk_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"), files.staged(tmp_path / "model") as place:
        (place / "weights").write_text("w")
    assert list((tmp_path / "model").iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(OSError) as told, files.replacing(file) as temporary:
        temporary.symlink_to("/dev/full")  # writes to it fail as those to a full disk do
        temporary.write_text("new")
    assert told.value.errno == 28
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_staged_files_are_moved_into_the_folder_at_the_end(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("what", ["manifest of a checkpoint", "manifest of an export", "head of an expert"])
def test_unreadable_files_are_not_reported_as_damaged_or_missing(what: str, tmp_path: Path) -> None:
    """Reading a process's memory at address 0 fails with EIO, as reading from a broken disk does."""
    from finsa.inference import predictor
    from finsa.models.moe import experts
    from finsa.training import checkpoints

    if what == "manifest of a checkpoint":
        (tmp_path / "manifest.json").symlink_to("/proc/self/mem")
        assert checkpoints.fault(tmp_path) == "manifest.json cannot be read: Input/output error"
    elif what == "manifest of an export":
        assert predictor.read_manifest(tmp_path) == {}
        (tmp_path / "manifest.json").symlink_to("/proc/self/mem")
        with pytest.raises(RunError, match=r"manifest\.json cannot be read: Input/output error$"):
            predictor.read_manifest(tmp_path)
    else:
        (tmp_path / "classifier.safetensors").symlink_to("/proc/self/mem")
        with pytest.raises(ModelError, match=r"^expert a: .*classifier\.safetensors cannot be read: "):
            experts.check_heads([experts.Expert("a", tmp_path, None)], ["x"])


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


def test_a_waiting_process_gets_the_lock_when_the_other_ends(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    code = HOLD.replace("time.sleep(60)", "time.sleep(0.5)")
    first = subprocess.Popen([sys.executable, "-c", code, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    began = time.monotonic()
    with locks.waiting(lock, 0.01):
        assert time.monotonic() - began > 0.2
    assert first.wait() == 0


@pytest.mark.parametrize("stage", ["augment", "synthesize", "export"])
def test_an_output_is_written_by_one_process(
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
            nested.run(config(*words), Session())
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    finally:
        first.kill()
        first.wait()
    if stage == "augment":  # what the killed process left is no hindrance, and goes
        nested.run(config(*words), Session())
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


LOOK = """
import sys
from pathlib import Path
from finsa.runs import locks
print("looking", flush=True)
while True:
    locks.holder(Path(sys.argv[1]))
"""


def test_checking_the_holder_of_a_lock_blocks_nobody(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.touch()
    looking = [
        subprocess.Popen([sys.executable, "-c", LOOK, str(lock)], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for process in looking:
            assert process.stdout is not None
            assert process.stdout.readline() == b"looking\n"
        for _ in range(300):
            with locks.held(lock, "here"):
                assert str(locks.holder(lock)).startswith(f"process {os.getpid()} on ")
    finally:
        for process in looking:
            assert process.poll() is None
            process.kill()
            process.wait()
    assert lock.read_text() == "", "a name that stays behind could be taken for that of the next holder"


MAKE = """
import os, sys
from pathlib import Path
from finsa.runs import locks
from finsa.errors import RunError
output, made = Path(sys.argv[1]), 0
while made < 100:
    try:
        with locks.creating(output):
            os.close(os.open(output, os.O_CREAT | os.O_EXCL))  # fails where another process is here as well
            output.unlink()
            made += 1
    except RunError as error:
        assert str(error).startswith(f"output {output} is in use by "), error
"""


def test_a_lock_removed_with_its_output_still_excludes_others(tmp_path: Path) -> None:
    """Its file is removed and created again repeatedly, and only one process at a time holds it."""
    command = [sys.executable, "-c", MAKE, str(tmp_path / "out")]
    making = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[1] for process in making] == [""] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("name", ["mkdir", "open", "write_text"])
def test_a_run_folder_that_cannot_be_written_is_one_message(
    number: int, name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The folder, its lock or its first file: simulated, because root may write everywhere."""
    place, owner = tmp_path / "runs", os if name == "open" else Path
    real = getattr(owner, name)

    def refusing(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).startswith(str(place)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **named)

    cfg = config("method=majority", FEW, "tracking=none", f"output_dir={place}")
    monkeypatch.setattr(owner, name, refusing)
    session = Session()
    assert cli.guard(lambda: cli.run_job(cfg, session), ["run.py", "method=majority"], session) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {place}")
    assert line.endswith(f": {os.strerror(number)}")


def test_json_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """Texts may contain other line separators, which `str.splitlines` would split at."""
    rows = [{"text": f"一{separator}二"} for separator in ("\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r\n")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_text(tmp_path / "rows.jsonl", text)
    assert files.json_lines(tmp_path / "rows.jsonl") == rows
