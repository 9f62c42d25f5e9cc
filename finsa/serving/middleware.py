"""What every request passes: token, deadline, security headers, and the count of it."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Collection
from typing import Any

from finsa.serving.metrics import Measures

OPEN = ("/", "/docs", "/openapi.json", "/health", "/ready")  # nothing of the model is in them
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
POLICY = b"default-src 'none'; frame-ancestors 'none'"  # pages bring their own


class Gate:
    """An ASGI application around another one.

    Args:
        app: the other one.
        token: that clients must send; None: anybody may come in.
        seconds: after which a request is given up, whatever holds it up, such as a client that takes no answer.
        paths: that are counted by their names.
        measures: told about every request.
    """

    def __init__(self, app: Any, token: str | None, seconds: float, paths: Collection[str], measures: Measures) -> None:
        self.app, self._token, self.seconds, self.paths, self._measures = app, token, seconds, paths, measures

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        scope.setdefault("state", {})

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                more = [*HEADERS, (b"content-security-policy", POLICY)]
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in present)]
            await send(message)

        try:
            async with asyncio.timeout(self.seconds):
                if self._closed_to(scope):
                    await _refuse(sending)
                else:
                    await self.app(scope, receive, sending)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self._measures.request(path, status, time.perf_counter() - started, scope["state"].get("texts"))

    def _closed_to(self, scope: Any) -> bool:
        if self._token is None or scope["path"] in OPEN:
            return False
        sent = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = sent.partition(b" ")
        # In constant time: how long a wrong token takes must not tell how much of it is right.
        right = hmac.compare_digest(token.strip(), self._token.encode())
        return not (right and kind.lower() == b"bearer")


async def _refuse(send: Any) -> None:
    body = json.dumps({"error": "send the token: Authorization: Bearer <token>"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
