"""A real HTTP service on this machine: the product's application and server, in a thread, before any model."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from finsa.config import ServeStage
from finsa.inference.predictor import Predictions
from finsa.serving import application, schemas, server
from finsa.serving.batching import Batcher, Model
from finsa.serving.middleware import Metrics

LABELS = ("利空", "中性", "利好")
SERVED: dict[str, Any] = {
    "name": "lora_response, tiny, sample",
    "run": "2026-01-01_00-00-00_train",
    "labels": list(LABELS),
    "experts": [],
    "base": {"name": "tiny", "hub_id": None, "revision": "main"},
    "demonstration": None,
    "max_length": 160,
    "rows": [],
    "target": False,
    "rule": "whole label",
    "fingerprints": {"config": "0", "data": "1", "template": "2", "label": "3"},
    "git_commit": None,
    "versions": {"torch": "2"},
    "finsa": "0.1",
    "receipt": None,
    "limits": {"texts": 1000, "body_bytes": 1048576, "answer_seconds": 30},
}


@dataclass
class Reader:
    """A stand-in for a model: answers depend only on the text, so that mixed-up answers are noticed.

    Args:
        seconds: duration of a call.
        experts: of a mixture; none: no mixture.
        fails_on: texts on which a call fails.
    """

    seconds: float = 0.0
    experts: tuple[str, ...] = ()
    fails_on: tuple[str, ...] = ()
    calls: list[list[str]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.hold.set()

    def __call__(self, texts: Sequence[str]) -> Predictions:
        self.calls.append(list(texts))
        self.hold.wait(30)
        time.sleep(self.seconds)
        if any(text in self.fails_on for text in texts):
            raise RuntimeError("no such text")
        shares = np.array([self.shares(text) for text in texts])
        gates = np.tile([0.25, 0.75], (len(texts), 1)) if self.experts else None
        truncated = [len(text) > 500 for text in texts]
        return Predictions(LABELS, np.log(shares), shares, truncated, gates, self.experts)

    @staticmethod
    def shares(text: str) -> Any:
        """The probabilities of a text."""
        weights = np.array([1 + text.count("跌"), 1 + len(text) % 7 / 10, 1 + text.count("涨")])
        return weights / weights.sum()


@dataclass
class Service:
    """A running service.

    Args:
        url: its address.
        client: for it.
        batcher: its queue.
        log: file of its latencies.
    """

    url: str
    client: httpx.Client
    batcher: Batcher
    log: Path

    @property
    def port(self) -> int:
        """The port of the address."""
        return int(self.url.rpartition(":")[2])

    def counted(self, name: str) -> float:
        """A value of ``/metrics``: the sum over its labels."""
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? ([\d.e+-]+)$", self.client.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))


@contextmanager
def serving(
    stage: ServeStage, model: Model, folder: Path, token: str | None = None, read: schemas.Read | None = None
) -> Iterator[Service]:
    """Serve a model on a free port within this context; `read` reads the rows of a model that needs a target."""
    metrics = Metrics(folder / "requests.jsonl", stage.log_bytes)
    batcher = Batcher(model, stage.batch, stage.wait_ms, stage.queue, metrics)
    served = {**SERVED, "target": read is not None}
    app = application.build(batcher, metrics, served, stage, token, read)
    started = threading.Event()
    with closing(server.bind("127.0.0.1", 0)) as taken:
        url = server.url(taken)
        running = server.Server(app, stage, metrics, started.set)
        thread = threading.Thread(target=running.run, args=([taken],), daemon=True)
        thread.start()
        assert started.wait(10)
        # By default the pool closes idle connections above 20, even one that another thread was just assigned.
        limits = httpx.Limits(max_keepalive_connections=None)
        with httpx.Client(base_url=url, timeout=30, trust_env=False, limits=limits) as client:
            try:
                yield Service(url, client, batcher, folder / "requests.jsonl")
            finally:
                running.should_exit = True
                thread.join(20)
    assert not thread.is_alive()


def stage_of(config: Callable[..., Any], **changes: Any) -> ServeStage:
    """The stage as ``conf/`` has it, with changes."""
    stage = config("stage=serve", "run=somewhere").stage
    assert isinstance(stage, ServeStage)
    return ServeStage.model_validate(stage.model_dump() | changes)
