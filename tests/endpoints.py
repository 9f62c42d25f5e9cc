"""A real local HTTP server with the chat protocol, for tests of clients."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """A response of the server."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Request:
    """A request to the server."""

    path: str
    headers: dict[str, str]
    payload: dict[str, Any]
    at: float

    @property
    def prompt(self) -> str:
        """The user's message."""
        return str(self.payload["messages"][0]["content"])


def said(text: object, seconds: float = 0.0, **choice: object) -> Reply:
    """A chat completion."""
    content = {"choices": [{"message": {"role": "assistant", "content": text}, **choice}]}
    return Reply(json.dumps(content).encode(), seconds=seconds)


def failed(status: int, message: str = "", **headers: str) -> Reply:
    """An error in OpenAI's format."""
    return Reply(json.dumps({"error": {"message": message}}).encode(), status, headers)


class ChatServer:
    """Answers at ``url`` until it is closed.

    Args:
        reply: returns the response to a request; None closes the connection.
    """

    def __init__(self, reply: Callable[[Request], Reply | None]) -> None:
        self.requests: list[Request] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept, as real servers do

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                request = Request(self.path, dict(self.headers), json.loads(content), time.monotonic())
                requests.append(request)
                answer = reply(request)
                if answer is None:
                    self.connection.shutdown(socket.SHUT_RDWR)  # closing alone leaves the streams' handles open
                    self.close_connection = True
                    return
                time.sleep(answer.seconds)
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that was killed
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
