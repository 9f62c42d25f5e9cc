"""Who may use the board: a token on other hosts, no requests from other sites, no requests to other hosts."""

from __future__ import annotations

import base64
import hmac
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from finsa.config.stages import LOOPBACK

# gradio compiles templates of its pages, and puts styles and scripts into them; nothing comes from another host.
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Access:
    """ASGI middleware in front of the board.

    Args:
        app: the wrapped application.
        token: browsers ask for it (HTTP Basic, with any name), programs send it (Bearer). None: no token, but only
            requests to this machine by its own name are answered, so that no other site can lead a browser here.
    """

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self._token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in present)]
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # the board has no web sockets
            await (self._refusal(Request(scope)) or self.app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """The response to a request that is not passed on; None for others."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._token is None and name.strip("[]").lower() not in LOOPBACK:
            return PlainTextResponse("the board only answers to the name of this machine", 403)
        foreign = request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        foreign = foreign or (origin is not None and origin.partition("://")[2] != host)  # a proxy may add TLS
        if foreign and request.method not in ("GET", "HEAD"):
            return PlainTextResponse("a request from another site", 403)
        if self._token is not None and not self._has_token(request.headers.get("authorization", ""), self._token):
            asking = {"www-authenticate": 'Basic realm="finsa board: any name, and the token", charset="UTF-8"'}
            return PlainTextResponse("send the token: Authorization: Bearer <token>", 401, asking)
        return None

    @staticmethod
    def _has_token(header: str, token: str) -> bool:
        kind, _, given = header.partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
            except ValueError:
                return False
        # constant-time comparison, so that the response time does not reveal how much of a token is correct
        return kind.lower() in ("basic", "bearer") and hmac.compare_digest(given.strip().encode(), token.encode())
