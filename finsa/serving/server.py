"""The HTTP server: socket, connections and shutdown."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from finsa.config import ServeStage
from finsa.errors import RunError

if TYPE_CHECKING:  # needs prometheus_client, which stage=board does without
    from finsa.serving.middleware import Metrics

BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 33\r\n"
    b'Retry-After: 1\r\nConnection: close\r\n\r\n{"error": "too many connections"}'
)


def bind(host: str, port: int) -> socket.socket:
    """Bind the address before the model is loaded; clients cannot connect until the server listens.

    Raises:
        RunError: for an address that cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"port: cannot listen on {host}:{port} ({reason}); choose another, such as port=8001") from None
    return bound


def url(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def token(variable: str | None) -> str | None:
    """The token that clients must send.

    Args:
        variable: environment variable that contains it; None: no token.

    Raises:
        RunError: if it is not set, or contains characters that a header cannot have.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        what = "contains characters that a token cannot have" if value else "is not set"
        raise RunError(f"stage.token_env: the environment variable {variable} {what}; set it to the token")
    return value


class StageServer(uvicorn.Server):
    """A uvicorn server; a stop signal ends the stage, not the process.

    Args:
        config: of uvicorn.
        on_start: called when clients can connect.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        await super().startup(sockets)
        self._on_start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT or SIGTERM; unlike uvicorn, do not raise the signal again after shutdown."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


class Server(StageServer):
    """A server with limits on connections and on slow clients.

    Args:
        app: an ASGI application.
        stage: the limits.
        metrics: counts refused connections.
        on_start: called when clients can connect.
    """

    def __init__(self, app: Any, stage: ServeStage, metrics: Metrics, on_start: Callable[[], None]) -> None:
        class Connection(H11Protocol):
            """A connection with a timeout for slow and idle clients, which uvicorn lacks."""

            _timer: asyncio.TimerHandle | None = None
            _surplus = False

            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                self._surplus = len(self.connections) > stage.connections
                if self._surplus:
                    metrics.refused.inc()
                self._timer = self.loop.call_later(1 if self._surplus else stage.read_seconds, transport.abort)

            def data_received(self, data: bytes) -> None:
                if self._surplus:  # uvicorn's limit responds without Retry-After, and not in JSON
                    if not self.transport.is_closing():
                        self.transport.write(BUSY)
                        self.transport.close()
                    return
                super().data_received(data)
                if self.cycle is not None and not self.cycle.response_complete:
                    self._cancel_timer()
                elif self._timer is None:  # part of the next request, or the rest of a refused one
                    self._timer = self.loop.call_later(stage.read_seconds, self.transport.abort)

            def on_response_complete(self) -> None:
                self._cancel_timer()
                super().on_response_complete()

            def timeout_keep_alive_handler(self) -> None:
                self.transport.abort()  # unlike close, this does not wait for a client that reads no response

            def connection_lost(self, exc: Exception | None) -> None:
                self._cancel_timer()
                super().connection_lost(exc)

            def _cancel_timer(self) -> None:
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None

        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                loop="asyncio",
                ws="none",
                lifespan="on",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=stage.connections,
                timeout_graceful_shutdown=stage.grace_seconds,
            ),
            on_start,
        )
