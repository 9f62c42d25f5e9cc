"""What a service counts: for Prometheus, and as a log of latencies without a word of the texts."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Measures:
    """The counters of one service.

    Args:
        log: file of the latency log; None: none is written.
        log_bytes: size at which it starts anew; the one before is kept beside it.
    """

    def __init__(self, log: Path | None = None, log_bytes: int = 0) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("finsa_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self.texts = Counter("finsa_texts", "Texts that were answered", registry=registry)
        self.truncated = Counter("finsa_truncated_texts", "Texts that lost their end", registry=registry)
        self.predictions = Counter("finsa_predictions", "Answers by label", ["label"], registry=registry)
        self.seconds = Histogram(
            "finsa_request_seconds", "From request to answer, by path", ["path"], buckets=SECONDS, registry=registry
        )
        self.batch = Histogram("finsa_batch_texts", "Texts per call of the model", buckets=TEXTS, registry=registry)
        self.queue = Gauge("finsa_queue_texts", "Texts waiting for the model", registry=registry)
        self.refused = Counter("finsa_refused_connections", "Connections beyond the limit", registry=registry)
        ProcessCollector(registry=registry)
        self._log = _rotating(log, log_bytes) if log is not None else None

    def forward(self, texts: int) -> None:
        """Note a call of the model; the number of calls is ``finsa_batch_texts_count``."""
        self.batch.observe(texts)

    def request(self, path: str, status: int, seconds: float, texts: int | None) -> None:
        """Note a request.

        Args:
            path: as the service names it; any other is one and the same.
            texts: how many it brought; None for one that is not about texts, or that was refused unread.
        """
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)
        if self._log is not None and path.startswith("/predict"):
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "path": path, "status": status, "texts": texts, "ms": round(1000 * seconds, 2)}
            self._log.emit(logging.makeLogRecord({"msg": json.dumps(line)}))

    def exposition(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()


def _rotating(file: Path, most: int) -> RotatingFileHandler:
    return RotatingFileHandler(file, maxBytes=most, backupCount=1, encoding="utf-8", delay=True)
