"""Commands that the board has started: each is a separate process, recorded in ``<output_dir>/.board/<id>``.

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


@dataclass(frozen=True)
class Command:
    """A command that the board has started.

    Args:
        folder: its record.
        words: its command line without the program.
        pid, machine: of its process.
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
        with suppress(psutil.Error):
            if not (self.folder / "exit").is_file() and self.machine == platform.node():
                process = psutil.Process(self.pid)
                return abs(process.create_time() - self.born) < 2 and process.status() != psutil.STATUS_ZOMBIE
        return False

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs, or if the board was stopped before it ended."""
        with suppress(OSError, ValueError):
            return int((self.folder / "exit").read_text(encoding="ascii"))
        return None

    @property
    def printed(self) -> str:
        """The end of what it has printed, without what a carriage return has overwritten."""
        try:
            with (self.folder / "log.txt").open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 20_000))
                lines = stream.read().decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
        except OSError:
            return ""
        return "\n".join(_CONTROL.sub("", line.rstrip("\r").rsplit("\r", 1)[-1]) for line in lines).strip("\n")


def new_folder(output_dir: Path) -> Path:
    """Create the folder of a command."""
    folder = output_dir / FOLDER / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{token_hex(2)}"
    folder.mkdir(parents=True)
    return folder


def start(words: Sequence[str], folder: Path, hidden: Sequence[str] = (), columns: int = 96) -> Command:
    """Start a command in a separate process, which survives the board.

    Args:
        words: its command line without the program.
        folder: of its record.
        hidden: environment variables that it does not get, such as the token of the board.
        columns: width of what it prints.
    """
    checkout = ROOT / "run.py"  # not part of an installed package
    program = [sys.executable, *([str(checkout)] if checkout.is_file() else ["-m", "finsa"])]
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONUNBUFFERED": "1", "COLUMNS": str(columns), "NO_COLOR": "1"}
    with (folder / "log.txt").open("ab") as log:  # a new session: Ctrl-C of the board does not reach it
        process = subprocess.Popen(
            [*program, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    born = psutil.Process(process.pid).create_time()  # not reaped yet, even if it has ended
    command = Command(folder, tuple(words), process.pid, platform.node(), born)
    record = {"words": command.words, "pid": command.pid, "machine": command.machine, "born": born}
    files.write_text(folder / "command.json", json.dumps(record, ensure_ascii=False) + "\n")

    def wait() -> None:
        code = process.wait()
        with suppress(OSError):
            files.write_text(folder / "exit", str(code))

    threading.Thread(target=wait, name="finsa board", daemon=True).start()
    return command


async def ended(command: Command) -> int | None:
    """Wait for a command, and return its exit code."""
    while command.running:
        await asyncio.sleep(0.2)
    for _ in range(50):  # its exit code is written a moment after it has ended
        if command.exit_code is not None:
            break
        await asyncio.sleep(0.1)
    return command.exit_code


def started(output_dir: Path) -> list[Command]:
    """All commands that boards have started below a folder, the newest first."""
    found = []
    for file in sorted((output_dir / FOLDER).glob("*/command.json"), reverse=True):
        with suppress(OSError, ValueError, LookupError, TypeError):  # damaged
            known = json.loads(file.read_text(encoding="utf-8"))
            found.append(Command(file.parent, tuple(known["words"]), known["pid"], known["machine"], known["born"]))
    return found


def of_run(facts: Mapping[str, object], commands: Sequence[Command]) -> Command | None:
    """The command that wrote a run last, the newest first; None if it was started in a shell.

    Args:
        facts: contents of ``run.json``.
    """
    with suppress(ValueError):
        begun = datetime.fromisoformat(str(facts.get("started"))).timestamp()
        return next((one for one in commands if one.pid == facts.get("pid") and one.born <= begun + 1), None)
    return None


def writer(folder: Path) -> int | None:
    """The process on this machine that writes to a run folder, wherever it was started; None if there is none."""
    found = re.match(r"process (\d+) on (.*), started", locks.holder(folder / locks.LOCK) or "")
    return int(found[1]) if found and found[2] == platform.node() else None


def stop(pid: int, number: int = signal.SIGINT) -> None:
    """Send Ctrl-C to a process: during training it saves a checkpoint first."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
