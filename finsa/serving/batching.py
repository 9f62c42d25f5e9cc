"""Dynamic batching: concurrent requests share model calls, which one thread makes from a bounded queue.

While the model is busy, requests accumulate; the next call takes a share of each, so that a request with a thousand
texts does not delay one with a single text.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from finsa.config import safety
from finsa.inference.predictor import Predictions
from finsa.serving.middleware import Metrics

LOG = logging.getLogger(__name__)
LONGEST_WAIT = 60  # maximum Retry-After in seconds
VERY_LONG = 20_000  # characters: tokenizing a million takes a second, so a call has at most one text of this length

Model = Callable[[Sequence[str]], Predictions]
# For one text: prediction, probs by label, truncated; level of ordered labels, number,
# or labels that apply; route of a mixture: weights by expert; abstain and label_set.
Answer = dict[str, Any]


class QueueFullError(Exception):
    """The queue has no room.

    Args:
        seconds: after which to retry.
    """

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"the queue is full; retry after {seconds} s")


class ModelFailedError(Exception):
    """The model failed on a text."""


class _Request:
    """The texts of one request, and their answers so far."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.taken, self.since = texts, 0, time.monotonic()
        self.answers: list[Answer] = []
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Answer]] = self.loop.create_future()

    @property
    def left(self) -> int:
        return len(self.texts) - self.taken

    def take(self, count: int, long: bool) -> Sequence[str]:
        """The next texts, at most `count`, up to the first very long one, or the second if one is allowed."""
        part = self.texts[self.taken : self.taken + count]
        stops = [number for number, text in enumerate(part) if len(text) > VERY_LONG][long:]
        part = part[: stops[0]] if stops else part
        self.taken += len(part)
        return part

    def add(self, answers: list[Answer]) -> None:
        """Add answers, called from the model's thread; the last ones resolve the request."""
        self.answers += answers
        if len(self.answers) == len(self.texts):
            self.settle()

    def settle(self, error: Exception | None = None) -> None:
        """Resolve the future of the request, called from the model's thread."""

        def resolve() -> None:
            if self.future.done():  # the client has disconnected
                return
            if error is None:
                self.future.set_result(self.answers)
            else:
                self.future.set_exception(error)

        with suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(resolve)


class Batcher:
    """The queue in front of a model, and the thread that runs the model.

    Args:
        model: predicts texts.
        batch: maximum number of texts per call.
        wait_ms: milliseconds that a text waits for others to join its call.
        queue: maximum number of waiting texts.
        metrics: metrics of calls and queue.
    """

    def __init__(self, model: Model, batch: int, wait_ms: float, queue: int, metrics: Metrics) -> None:
        self.model, self.batch, self.wait, self.queue, self.metrics = model, batch, wait_ms / 1000, queue, metrics
        self._requests = deque[_Request]()
        self._waiting, self._closed = 0, False
        self._changed = threading.Condition()
        self._seconds_per_text = 0.01
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        metrics.queue.set_function(lambda: self._waiting)

    def start(self) -> None:
        """Start the model's thread."""
        self._thread.start()

    def close(self) -> None:
        """Accept no more requests, answer those already accepted, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def ready(self) -> bool:
        """Whether a request would be accepted."""
        return self._thread.is_alive() and not self._closed and self._waiting < self.queue

    async def answer(self, texts: Sequence[str]) -> list[Answer]:
        """Answer texts in order.

        Raises:
            QueueFullError: if there is no room for them.
            ModelFailedError: if the model fails on one of them.
        """
        request = _Request(texts)
        with self._changed:
            if self._closed or self._waiting + len(texts) > self.queue:
                raise QueueFullError(min(LONGEST_WAIT, math.ceil(self._waiting * self._seconds_per_text) or 1))
            self._requests.append(request)
            self._waiting += len(texts)
            self._changed.notify()
        return await request.future

    # -------------------------------------------------------------------------------------------- the model's thread

    def _work(self) -> None:
        while batch := self._collect():
            started = time.monotonic()
            texts = [text for _, part in batch for text in part]
            try:
                answers = iter(self._call(texts))
            except Exception:
                LOG.error(
                    "the model failed on %d texts; retrying each request separately\n%s", len(texts), _traceback()
                )
                for request, part in batch:  # a text on which the model fails must not fail other requests
                    try:
                        request.add(self._call(part))
                    except Exception:
                        LOG.error("the model failed\n%s", _traceback())
                        request.settle(ModelFailedError("the model failed on this text; see the server's log"))
            else:
                for request, part in batch:
                    request.add([next(answers) for _ in part])
            self._seconds_per_text += 0.1 * ((time.monotonic() - started) / len(texts) - self._seconds_per_text)

    def _collect(self) -> list[tuple[_Request, Sequence[str]]]:
        """Wait for texts; an empty batch means that there will be no more."""
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
        """Take a share of each waiting request; unfinished requests go to the end of the queue."""
        batch, room, long = list[tuple[_Request, Sequence[str]]](), self.batch, True
        share = max(1, self.batch // len(self._requests))
        for _ in range(len(self._requests)):
            if room == 0:
                break
            request = self._requests.popleft()
            if request.future.done():  # its client has disconnected, or the model failed on it
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

    def _call(self, texts: Sequence[str]) -> list[Answer]:
        self.metrics.batch.observe(len(texts))
        result = self.model(texts)
        answers = [
            {"prediction": label, "probs": _by_name(result.labels, probs), "truncated": bool(truncated)}
            for label, probs, truncated in zip(result.predicted, result.probs.tolist(), result.truncated, strict=True)
        ]
        for name, numbers in result.numbers.items():
            for answer, number in zip(answers, numbers, strict=True):
                answer[name] = number
        for answer, labels in zip(answers, result.sets or [], strict=False):
            answer["labels"] = labels
        for answer, gates in zip(answers, [] if result.gates is None else result.gates.tolist(), strict=False):
            answer["route"] = _by_name(result.experts, gates)
        for name, cells in result.decisions.items():
            for answer, cell in zip(answers, cells, strict=True):
                answer[name] = cell
        for answer, thoughts in zip(answers, result.thoughts or [], strict=False):
            answer["thoughts"] = thoughts
        return answers


def _by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in zip(names, values, strict=True)}


def _traceback() -> str:
    """The traceback of the current exception, without secrets from the environment."""
    return safety.masked(traceback.format_exc()).rstrip()
