"""Who may use the board: a token on other hosts, no requests from other sites, no requests to other hosts."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Iterable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from finsa.config.stages import LOOPBACK

COOKIE = "finsa_board"
LOGIN = "/login"
BODY = 4096  # bytes of the login form
WRONG = 1.0  # seconds before a wrong token is answered
# gradio compiles templates of its pages, and puts styles and scripts into them; nothing comes from another host.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Access:
    """ASGI middleware in front of the board.

    Args:
        app: the wrapped application.
        token: asked for on a page, and kept in a cookie; programs send it as a bearer token. None: no token, but only
            requests to this machine by its own name are answered, so that no other site can lead a browser here.
        login: the page that asks for the token; its argument says whether a token was wrong.
    """

    def __init__(self, app: Any, token: str | None, login: Any) -> None:
        self.app, self._token, self._login = app, token, login
        self._cookie = secrets.token_urlsafe(32)  # another one for each start of the board

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the board has no web sockets
            return
        request = Request(scope, receive)
        response = self._refusal(request) or await self._asked(request)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = with_headers(message["headers"])
            await send(message)

        await (response or self.app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._token is None and name.strip("[]").lower() not in LOOPBACK:
            return PlainTextResponse("the board only answers to the name of this machine", 403)
        origin = request.headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != host
        if request.method not in ("GET", "HEAD") and (
            foreign or request.headers.get("sec-fetch-site") not in (None, "same-origin", "none")
        ):
            return PlainTextResponse("a request from another site", 403)
        return None

    async def _asked(self, request: Request) -> Response | None:
        """The response to a request without the token; None if it has it, or needs none."""
        if self._token is None:
            return None
        if request.url.path == LOGIN and request.method == "POST":
            return await self._log_in(request)
        if self._is_authorized(request.headers):
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(self._login(False), 401)
        return PlainTextResponse("send the token: Authorization: Bearer <token>", 401)

    async def _log_in(self, request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY:
                return PlainTextResponse("too long", 413)
        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0].strip()
        assert self._token is not None
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            await asyncio.sleep(WRONG)
            return HTMLResponse(self._login(True), 401)
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, self._cookie, httponly=True, samesite="strict")
        return response

    def _is_authorized(self, headers: Mapping[str, str]) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        assert self._token is not None
        if kind.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._token.encode()):
            return True
        try:
            given = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return given is not None and hmac.compare_digest(given.value.encode(), self._cookie.encode())


def with_headers(given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of a response with those of the board, except for the ones that it has."""
    headers = list(given)
    present = {name.lower() for name, _ in headers}
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in present]
    return headers + added
