"""``python run.py`` in processes of their own, forked from one that has imported the libraries.

A command spends most of a short life on imports. Here a server imports them once per test process; every command is a
fork of it with command line, folder, environment and output of its own. What tests the start itself (its speed, what is
imported, what a signal does) starts Python anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from finsa.config import ROOT

SCRIPT = str(ROOT / "run.py")


def run(
    *words: str, folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end.

    Args:
        words: what stands behind ``run.py``.
        folder: in which it is started.
        environment: instead of this process's.
    """
    with tempfile.TemporaryDirectory() as place:
        texts = [Path(place) / name for name in ("out", "err")]
        process = started(*words, folder=folder, environment=environment, outputs=texts)
        process.join()
        out, err = (text.read_text(encoding="utf-8") for text in texts)
    assert process.exitcode is not None
    return subprocess.CompletedProcess([sys.executable, SCRIPT, *words], process.exitcode, out, err)


def started(
    *words: str, folder: Path = ROOT, environment: Mapping[str, str] | None = None, outputs: list[Path] | None = None
) -> ForkServerProcess:
    """Start a command line; its two outputs go into files, or nowhere."""
    to = [str(file) for file in outputs or [Path(os.devnull)] * 2]
    process = _server().Process(target=_be, args=(list(words), str(folder), dict(environment or os.environ), to))
    process.start()
    return process


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


def _be(words: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    """Be the command: the last thing that this process does."""
    code = 70
    try:
        for number, name in enumerate(outputs, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[0] = str(ROOT)
        sys.argv = [SCRIPT, *words]
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
