"""Run scripts, above all ``run.py``, in separate processes, forked from one that has imported the libraries.

A command spends most of a short life on imports. Here a server imports them once per test process; every command is a
fork of it with a separate command line, folder, environment and output. Tests of the startup itself (its speed, what is
imported, how processes find each other) start a new Python.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import httpx
import pytest

from finsa.config import ROOT


class Command:
    """A script that was started.

    Args:
        words: command-line arguments.
        folder: in which it is started.
        environment: instead of this process's.
        stdin: a file that it reads.
        script: below the repository.
    """

    def __init__(
        self,
        *words: str,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        stdin: Path = Path(os.devnull),
        script: str = "run.py",
    ) -> None:
        self._place = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._place.name) / name for name in ("out", "err")]
        files = [str(file) for file in (stdin, *self._outputs)]
        command = [str(ROOT / script), *words]
        given = dict(os.environ if environment is None else environment)
        self.process = _server().Process(target=_be, args=(command, str(folder), given, files))
        self.process.start()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self.process.pid is not None and self.poll() is None:
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 600) -> int:
        """Wait for its end.

        Returns:
            The exit code; for a signal, its negative number.
        """
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired("run.py", seconds, self.out, self.err)
        return self.process.exitcode

    @property
    def out(self) -> str:
        """Standard output so far."""
        return self._outputs[0].read_text(encoding="utf-8") if self._outputs[0].is_file() else ""

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self._outputs[1].read_text(encoding="utf-8") if self._outputs[1].is_file() else ""


def run(
    *words: str, folder: Path = ROOT, environment: Mapping[str, str] | None = None, script: str = "run.py"
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; the arguments are those of `Command`."""
    command = Command(*words, folder=folder, environment=environment, script=script)
    code = command.wait()
    return subprocess.CompletedProcess([script, *words], code, command.out, command.err)


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[Command, httpx.Client]]:
    """A running `stage=serve` and a client for it, from when it listens until it gets a stop signal.

    Args:
        folder: of its run folder.
        words: further command-line arguments.
    """
    process = Command("stage=serve", "port=0", "tracking=none", f"output_dir={folder}", *words)
    while not (url := re.search(r"serving .* at (http://127\.0\.0\.1:\d+)", process.out)):
        if process.poll() is not None:
            pytest.fail(f"it never listened: {process.out}{process.err}")
        time.sleep(0.02)
    with httpx.Client(base_url=url[1], timeout=30, trust_env=False) as client:
        try:
            yield process, client
        finally:
            process.signal(signal.SIGTERM)
            process.wait(30)


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported"])
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # by which it finds what to import
    forkserver.ensure_running()
    if given is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = given
    return context


def _be(command: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    """Run the script in this process, as its last action."""
    code = 70
    try:
        for number, name in enumerate(files):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY), number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - multiprocessing has closed it
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[0] = str(Path(command[0]).parent)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
