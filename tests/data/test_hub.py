"""The hub of models and data sets: queried once, over real connections, and not again if it does not answer."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finsa.config import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(code: str, folder: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """Run a new Python: huggingface_hub reads the address on import."""
    env = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def hub_with(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A hub with one repository; yields its address and the requests that it gets."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            name = self.path.rpartition("/")[2]
            self.send_response(200 if name in files or self.path == "/" else 404)
            if name not in files:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{name}"')
            self.send_header("Content-Length", str(len(files.get(name, b""))))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path.rpartition("/")[2], b""))

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model=qwen05b"],
            r"error: model=qwen05b: no tokenizer at Qwen/Qwen2\.5-0\.5B \({refused}\)\. With network: hf download "
            r"Qwen/Qwen2\.5-0\.5B --revision [0-9a-f]{{40}}\. Without: model\.path=<folder>, or .*\n",
        ),
        (
            ["data=hub", "data.hub.id=some/set"],
            r"error: data\.hub: some/set \(split train\) cannot be loaded: {refused}\. .*\n",
        ),
    ],
)
def test_without_network_the_first_error_is_the_message(tmp_path: Path, words: list[str], message: str) -> None:
    """One line and no retry: six attempts with waiting would take 23 seconds per request."""
    endpoint = f"http://127.0.0.1:{closed_port()}"
    code = (
        "import sys, time\nfrom finsa.cli import run\nslept = []\n"
        "time.sleep = lambda seconds: slept.append(seconds)\n"
        f"sys.argv = ['run.py', 'tracking=none', *{words}]\nprint(run(), slept)"
    )
    done = run(code, tmp_path, endpoint)
    assert done.stdout == "2 []\n"
    refused = re.escape(f"{endpoint} does not answer: [Errno 111] Connection refused")
    assert re.fullmatch(message.format(refused=refused), done.stderr), done.stderr


def test_a_missing_base_is_not_waited_for(tmp_path: Path) -> None:
    """This happens if the tokenizer is cached but the weights are not, and with an encoder."""
    code = """
import logging, time
from finsa.config import compose
from finsa.baselines.encoder import Encoder
from finsa.errors import ModelError
from finsa.models import base
def cfg(*words):
    values, files = compose.compose_values(words)
    return compose.build(values, files, words)
time.sleep = lambda seconds: print("slept", seconds)
one, two = cfg("model=qwen05b"), cfg("method=encoder")
for load in (lambda: base.load_base(one.model, 0), lambda: Encoder(two.method.baseline, two, 3).start(["a"])):
    try:
        load()
    except ModelError as error:
        print(error)
"""
    endpoint = f"http://127.0.0.1:{closed_port()}"
    done = run(code, tmp_path, endpoint)
    lines = done.stdout.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "model=qwen05b: no weights at Qwen/Qwen2.5-0.5B",
        "method.baseline.hub_id: google-bert/bert-base-chinese is not available",
    ]
    assert all(f"({endpoint} does not answer: [Errno 111] Connection refused)" in line for line in lines)
    assert "Retrying" not in done.stderr


def test_a_small_file_is_fetched_once_and_a_missing_file_is_none(tmp_path: Path) -> None:
    code = (
        "from finsa.data import hub\n"
        "print(hub.unreachable(), hub.cached('some/model', 'config.json'))\n"
        "file = hub.fetch('some/model', 'config.json')\n"
        "print(file.read_text(), hub.cached('some/model', 'config.json') == file)\n"
        "print(hub.fetch('some/model', 'adapter_config.json'))"
    )
    with hub_with({"config.json": b"{}"}) as (endpoint, asked):
        done = run(code, tmp_path, endpoint)
    assert done.stdout.splitlines() == ["None None", "{} True", "None"], done.stderr
    assert asked[0] == "HEAD /"
    assert all("/some/model/resolve/main/" in line or line == "HEAD /" for line in asked)


def test_an_adapter_on_the_hub_is_refused_before_anything_else_is_fetched(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom finsa.cli import run\n"
        "sys.argv = ['run.py', 'tracking=none', 'model=local', 'model.hub_id=some/adapter']\nprint(run())"
    )
    config = b'{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}'
    with hub_with({"adapter_config.json": config}) as (endpoint, asked):
        done = run(code, tmp_path, endpoint)
    assert done.stdout == "2\n"
    assert done.stderr.startswith(
        "error: model.hub_id: some/adapter is an adapter (LoRA, trained on Qwen/Qwen2.5-0.5B), not a model. To train "
        "it further: model=qwen05b method.adapter.init=some/adapter"
    )
    assert {line.rpartition("/")[2] for line in asked} == {"", "adapter_config.json"}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_download_shows_its_progress_on_a_terminal_alone(tmp_path: Path, terminal: bool) -> None:
    code = (
        "import os\nos.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1'  # as finsa.cli does\n"
        "from finsa.data import hub\n"
        "with hub.cache_alone(None):\n    hub.fetch('some/model', 'config.json')"
    )
    with hub_with({"config.json": b" " * 4096}) as (endpoint, _):
        env = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        main, side = os.openpty() if terminal else os.pipe()
        if terminal:
            termios.tcsetwinsize(side, (24, 80))
        words = [sys.executable, "-c", code]
        subprocess.run(words, env=env, stderr=side, timeout=120, check=True)
        os.write(side, b"end")
        shown = ""
        while "end" not in shown:
            shown += os.read(main, 65536).decode()
        os.close(side)
        os.close(main)
    assert ("config.json" in shown) == terminal
