"""llama.cpp, from the extra `gguf`: the library, and its server with OpenAI's completions in a separate process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

INSTALLED = find_spec("llama_cpp") is not None
REQUIRED = os.environ.get("FINSA_REQUIRE_LLAMA") == "1"
needed = pytest.mark.skipif(not INSTALLED and not REQUIRED, reason="llama-cpp-python is not installed: finsa[gguf]")


@contextmanager
def server(file: Path, name: str, folder: Path, *words: str) -> Iterator[str]:
    """Serve a GGUF file with ``llama_cpp.server``; yields the base URL.

    Args:
        file: the model.
        name: at the server.
        folder: of its log.
        words: further options.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["--model", str(file), "--model_alias", name, "--port", str(port), "--n_ctx", "512", "--n_threads", "1"]
    command += ["--n_threads_batch", "1"]  # more threads than free cores wait for each other
    with (folder / "llama_server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llama_cpp.server", *command, *words], stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/models", trust_env=False)
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    break
                time.sleep(0.1)
        assert process.poll() is None, (folder / "llama_server.log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(20)
