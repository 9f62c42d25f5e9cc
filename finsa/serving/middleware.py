"""Handling of every request: authentication, timeout, security headers, metrics and the latency log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Collection
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OPEN = (
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/ready",
)  # need no token, because they contain nothing about the model
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),  # pages override this
)


class Metrics:
    """Prometheus metrics of a service, and its latency log, which contains no texts.

    Args:
        log: log file; None: no log.
        log_bytes: size at which it is rotated; one previous file is kept.
    """

    def __init__(self, log: Path | None = None, log_bytes: int = 0) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("finsa_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self.texts = Counter("finsa_texts", "Answered texts", registry=registry)
        self.truncated = Counter("finsa_truncated_texts", "Truncated texts", registry=registry)
        self.predictions = Counter("finsa_predictions", "Answers by label", ["label"], registry=registry)
        self.seconds = Histogram(
            "finsa_request_seconds", "Latency of requests by path", ["path"], buckets=SECONDS, registry=registry
        )
        self.batch = Histogram("finsa_batch_texts", "Texts per call of the model", buckets=TEXTS, registry=registry)
        self.queue = Gauge("finsa_queue_texts", "Texts waiting for the model", registry=registry)
        self.refused = Counter("finsa_refused_connections", "Connections beyond the limit", registry=registry)
        ProcessCollector(registry=registry)
        self._log = log and RotatingFileHandler(log, maxBytes=log_bytes, backupCount=1, encoding="utf-8", delay=True)

    def request(self, path: str, status: int, seconds: float, texts: int | None) -> None:
        """Count a request.

        Args:
            path: a path of the service, or ``other``.
            texts: number of texts; None for a request without texts or refused before it was read.
        """
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)
        if self._log and path.startswith("/predict"):
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "path": path, "status": status, "texts": texts, "ms": round(1000 * seconds, 2)}
            self._log.emit(logging.makeLogRecord({"msg": json.dumps(line)}))

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Close the log."""
        if self._log:
            self._log.close()


class Middleware:
    """ASGI middleware for authentication, timeout, security headers and metrics.

    Args:
        app: the wrapped ASGI application.
        token: required from clients; None: no authentication.
        seconds: timeout of a request, whatever blocks it, such as a client that does not read the response.
        paths: paths with separate counters.
        metrics: counts every request.
    """

    def __init__(self, app: Any, token: str | None, seconds: float, paths: Collection[str], metrics: Metrics) -> None:
        self.app, self._token, self.seconds, self.paths, self._metrics = app, token, seconds, paths, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        scope.setdefault("state", {})

        async def send_with_headers(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in HEADERS if pair[0] not in present)]
            await send(message)

        try:
            async with asyncio.timeout(self.seconds):
                if self._is_authorized(scope):
                    await self.app(scope, receive, send_with_headers)
                else:
                    body = json.dumps({"error": "send the token: Authorization: Bearer <token>"}).encode()
                    headers = [
                        (b"content-type", b"application/json"),
                        (b"content-length", str(len(body)).encode()),
                        (b"www-authenticate", b"Bearer"),
                    ]
                    await send_with_headers({"type": "http.response.start", "status": 401, "headers": headers})
                    await send_with_headers({"type": "http.response.body", "body": body})
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self._metrics.request(path, status, time.perf_counter() - started, scope["state"].get("texts"))

    def _is_authorized(self, scope: Any) -> bool:
        if self._token is None or scope["path"] in OPEN:
            return True
        kind, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # constant-time comparison, so that the response time does not reveal how much of a token is correct
        return hmac.compare_digest(token.strip(), self._token.encode()) and kind.lower() == b"bearer"
