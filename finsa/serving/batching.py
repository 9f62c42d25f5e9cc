"""Concurrent requests are scored together: one thread runs the model, everything else waits in a bounded queue.

While the model works, requests gather; the next call takes a share of each of them, so that a request of a thousand
texts does not hold up one of a single text.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from finsa.config import safety
from finsa.serving.metrics import Measures

LOG = logging.getLogger(__name__)
LONGEST_WAIT = 60  # seconds that a client is told to wait at most
VERY_LONG = 20_000  # characters: a text of a million costs a second of tokenizing, so a call has one of these at most


class Answers(Protocol):
    """What a model says about n texts; e experts, c labels. `finsa.inference.predictor` makes them."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels."""

    @property
    def log_probs(self) -> Any:
        """Log-probabilities of the labels, uncalibrated, (n, c)."""

    @property
    def probs(self) -> Any:
        """Calibrated, (n, c)."""

    @property
    def truncated(self) -> Sequence[bool]:
        """Which texts were too long and lost their end, (n,)."""

    @property
    def gates(self) -> Any:
        """Shares of the experts, (n, e); None without a mixture."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Their names."""


class Answerer(Protocol):
    """A model that answers texts, in their order."""

    def __call__(self, texts: Sequence[str]) -> Answers:
        """Answer texts."""


@dataclass(frozen=True)
class Answer:
    """The answer to one text.

    Args:
        prediction: the most probable label.
        probs: calibrated probability by label.
        truncated: whether the text was too long and lost its end.
        route: share by expert; None without a mixture.
    """

    prediction: str
    probs: dict[str, float]
    truncated: bool
    route: dict[str, float] | None


class FullError(Exception):
    """The queue has no room.

    Args:
        seconds: after which it may have.
    """

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"no room; come back in {seconds} s")


class AnswerError(Exception):
    """The model could not answer a text."""


class _Request:
    """Texts of one client, and what is known about them so far."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.taken, self.since = texts, 0, time.monotonic()
        self.answers: list[Answer] = []
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Answer]] = self.loop.create_future()

    @property
    def left(self) -> int:
        return len(self.texts) - self.taken

    def take(self, count: int, long: bool) -> Sequence[str]:
        """The next texts, at most so many, up to the first that is very long, or to the second where one may be."""
        part = self.texts[self.taken : self.taken + count]
        stops = [number for number, text in enumerate(part) if len(text) > VERY_LONG][long:]
        part = part[: stops[0]] if stops else part
        self.taken += len(part)
        return part

    def settle(self, error: Exception | None = None) -> None:
        """Tell the client's coroutine, from the model's thread; it may have gone."""
        with suppress(RuntimeError):  # its loop is closed
            self.loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(self.answers)
        else:
            self.future.set_exception(error)


class Batcher:
    """The queue before a model, and the thread that runs it.

    Args:
        answerer: the model.
        batch: texts per call, at most.
        wait_ms: milliseconds that a text waits for others to share its call.
        queue: texts waiting, at most.
        measures: told about calls and queue.
    """

    def __init__(self, answerer: Answerer, batch: int, wait_ms: float, queue: int, measures: Measures) -> None:
        self.answerer, self.batch, self.wait, self.queue = answerer, batch, wait_ms / 1000, queue
        self._measures = measures
        self._requests = deque[_Request]()
        self._waiting, self._closed = 0, False
        self._changed = threading.Condition()
        self._seconds_per_text = 0.01
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        measures.queue.set_function(lambda: self._waiting)

    def start(self) -> None:
        """Start the model's thread."""
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, answer those that were taken, stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self._thread.is_alive() and not self._closed and self._waiting < self.queue

    async def answer(self, texts: Sequence[str]) -> list[Answer]:
        """Answer texts, in their order.

        Raises:
            FullError: where there is no room for them.
            AnswerError: where the model fails on one of them.
        """
        request = _Request(texts)
        with self._changed:
            if self._closed or self._waiting + len(texts) > self.queue:
                raise FullError(min(LONGEST_WAIT, math.ceil(self._waiting * self._seconds_per_text) or 1))
            self._requests.append(request)
            self._waiting += len(texts)
            self._changed.notify()
        return await request.future

    # -------------------------------------------------------------------------------------------- the model's thread

    def _work(self) -> None:
        while batch := self._collect():
            started = time.monotonic()
            self._answer(batch)
            texts = sum(len(texts) for _, texts in batch)
            self._seconds_per_text += 0.1 * ((time.monotonic() - started) / texts - self._seconds_per_text)

    def _collect(self) -> list[tuple[_Request, Sequence[str]]]:
        """Wait for texts; an empty batch says that there will be none."""
        with self._changed:
            while True:
                while not self._requests and not self._closed:
                    self._changed.wait()
                if not self._requests:
                    return []
                until = self._requests[0].since + self.wait
                while self._waiting < self.batch and not self._closed and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
                batch = self._take()
                if batch:
                    return batch

    def _take(self) -> list[tuple[_Request, Sequence[str]]]:
        """Take a share of each waiting request; what is left of one goes behind the others."""
        batch, room, long = list[tuple[_Request, Sequence[str]]](), self.batch, True
        share = max(1, self.batch // len(self._requests))
        for _ in range(len(self._requests)):
            if room == 0:
                break
            request = self._requests.popleft()
            if request.future.done():  # its client has gone, or it has failed
                self._waiting -= request.left
                continue
            part = request.take(min(share, room), long)
            if part:
                batch.append((request, part))
            long = long and all(len(text) <= VERY_LONG for text in part)
            room -= len(part)
            self._waiting -= len(part)
            if request.left:
                self._requests.append(request)
        return batch

    def _answer(self, batch: list[tuple[_Request, Sequence[str]]]) -> None:
        texts = [text for _, part in batch for text in part]
        try:
            answers = iter(self._call(texts))
        except Exception:
            LOG.error("the model failed on %d texts; each request is tried alone\n%s", len(texts), _traceback())
            for request, part in batch:
                self._alone(request, part)
            return
        for request, part in batch:
            self._give(request, [next(answers) for _ in part])

    def _alone(self, request: _Request, texts: Sequence[str]) -> None:
        """One text that the model fails on must not take others' answers with it."""
        try:
            self._give(request, self._call(texts))
        except Exception:
            LOG.error("the model failed\n%s", _traceback())
            request.settle(AnswerError("the model failed on this text; the server's log says why"))

    def _give(self, request: _Request, answers: list[Answer]) -> None:
        request.answers += answers
        if len(request.answers) == len(request.texts):
            request.settle()

    def _call(self, texts: Sequence[str]) -> list[Answer]:
        """Run the model once."""
        self._measures.forward(len(texts))
        said = self.answerer(texts)
        best = said.log_probs.argmax(axis=1).tolist()
        if said.gates is None:
            routes: list[dict[str, float] | None] = [None] * len(texts)
        else:
            routes = [_by_name(said.experts, gate) for gate in said.gates.tolist()]
        return [
            Answer(said.labels[top], _by_name(said.labels, shares), bool(cut), route)
            for top, shares, cut, route in zip(best, said.probs.tolist(), said.truncated, routes, strict=True)
        ]


def _traceback() -> str:
    """Where the error at hand comes from, without secrets of the environment."""
    return safety.masked(traceback.format_exc()).rstrip()


def _by_name(names: Sequence[str], shares: Sequence[float]) -> dict[str, float]:
    return {name: round(share, 6) for name, share in zip(names, shares, strict=True)}
