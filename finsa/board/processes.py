"""Commands that the board has started: each is a process of its own, recorded in ``<output_dir>/.board/<id>``.

The folder contains ``command.json``, ``log.txt`` and, once the process has ended, ``exit``. A board that is started
later finds the same processes; nothing is kept in memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from secrets import token_hex

import psutil

from finsa.config import ROOT
from finsa.runs import files, locks

FOLDER = ".board"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colors, cursor movements and the like
_NAME = re.compile(r"[0-9A-Za-z_-]+")


@dataclass(frozen=True)
class Command:
    """A command that the board has started.

    Args:
        folder: its record.
        words: its command line without the program.
        pid: of its process.
        machine: where it runs.
        born: start of the process in seconds since 1970, as the system reports it.
    """

    folder: Path
    words: tuple[str, ...]
    pid: int
    machine: str
    born: float

    @property
    def running(self) -> bool:
        """Whether its process has not ended."""
        return not (self.folder / "exit").is_file() and self.machine == platform.node() and _lives(self.pid, self.born)

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs, or if the board was stopped before it ended."""
        with suppress(OSError, ValueError):
            return int((self.folder / "exit").read_text(encoding="ascii"))
        return None

    @property
    def log(self) -> Path:
        """What it has printed."""
        return self.folder / "log.txt"


def start(words: Sequence[str], output_dir: Path, hidden: Sequence[str] = (), folder: Path | None = None) -> Command:
    """Start a command in a separate process, which survives the board.

    Args:
        words: its command line without the program.
        output_dir: the record is written below it.
        hidden: environment variables that it does not get, such as the token of the board.
        folder: of the record; None: a new one.
    """
    folder = folder or new_folder(output_dir)
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [*_program(), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(hidden, "96"),
            start_new_session=True,  # Ctrl-C in the terminal of the board does not reach it
        )
    born = time.time()
    with suppress(psutil.Error):
        born = psutil.Process(process.pid).create_time()
    record = {"words": list(words), "pid": process.pid, "machine": platform.node(), "born": born}
    files.write_text(folder / "command.json", json.dumps(record, ensure_ascii=False) + "\n")

    def wait() -> None:
        code = process.wait()
        with suppress(OSError):
            files.write_text(folder / "exit", str(code))

    threading.Thread(target=wait, name="finsa board", daemon=True).start()
    return Command(folder, tuple(words), process.pid, platform.node(), born)


async def printed(words: Sequence[str], hidden: Sequence[str] = ()) -> tuple[int, str]:
    """Run a command to its end and return its exit code and what it has printed; it ends with whoever waits for it."""
    process = await asyncio.create_subprocess_exec(
        *_program(),
        *words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(hidden, "66"),
        start_new_session=True,
    )
    try:
        text = (await process.communicate())[0].decode("utf-8", errors="replace")
        return process.returncode or 0, text
    finally:
        with suppress(ProcessLookupError):
            process.kill()


def _program() -> list[str]:
    checkout = ROOT / "run.py"  # not part of an installed package
    return [sys.executable, *([str(checkout)] if checkout.is_file() else ["-m", "finsa"])]


def _environment(hidden: Sequence[str], columns: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"PYTHONUNBUFFERED": "1", "COLUMNS": columns, "NO_COLOR": "1"}


def new_folder(output_dir: Path) -> Path:
    """Create the folder of a command."""
    folder = output_dir / FOLDER / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{token_hex(2)}"
    folder.mkdir(parents=True)
    return folder


def read(output_dir: Path, name: str) -> Command | None:
    """Find a command by the name of its folder; None if there is none."""
    folder = output_dir / FOLDER / name
    if not _NAME.fullmatch(name):
        return None
    try:
        known = json.loads((folder / "command.json").read_text(encoding="utf-8"))
        return Command(folder, tuple(known["words"]), known["pid"], known["machine"], known["born"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def started(output_dir: Path) -> list[Command]:
    """All commands that boards have started below a folder, the newest first."""
    names = sorted((file.parent.name for file in (output_dir / FOLDER).glob("*/command.json")), reverse=True)
    return [command for name in names if (command := read(output_dir, name))]


def writer(folder: Path) -> int | None:
    """The process on this machine that writes to a run folder, wherever it was started; None if there is none."""
    found = re.match(r"process (\d+) on (.*), started", locks.holder(folder / locks.LOCK) or "")
    return int(found[1]) if found and found[2] == platform.node() else None


def stop(pid: int) -> None:
    """Send Ctrl-C to a process: during training it saves a checkpoint first."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)


def match(facts: Mapping[str, object], commands: Sequence[Command]) -> Command | None:
    """The command that wrote a run last, the newest first; None if it was started in a shell.

    Args:
        facts: contents of ``run.json``.
    """
    with suppress(ValueError):
        begun = datetime.fromisoformat(str(facts.get("started"))).timestamp()
        return next((one for one in commands if one.pid == facts.get("pid") and one.born <= begun + 1), None)
    return None


def tail(file: Path, size: int = 20_000) -> str:
    """The end of a log, without the lines that a carriage return has overwritten."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - size))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(_CONTROL.sub("", line.rstrip("\r").rsplit("\r", 1)[-1]) for line in lines)


def _lives(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
