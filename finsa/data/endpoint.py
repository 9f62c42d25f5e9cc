"""Ask a model behind an OpenAI-compatible endpoint: questions in, answers in the same order out.

The protocol is POST {url}/chat/completions as OpenAI's API reference describes it ("Create chat completion"); Ollama,
vLLM, llama.cpp and the hosted services speak it. Completed answers go to a journal at once, so a command that was
stopped goes on without asking again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track

from finsa.config import Endpoint
from finsa.data.journal import Journal
from finsa.data.prompts import without_thoughts
from finsa.errors import RunError

MALFORMED, CUT, REFUSED = "malformed answer", "answer cut at the model's limit", "refused by the endpoint"
RETRIED = {408, 429, *range(500, 600)}
ABOUT_THE_QUESTION = {400, 413, 422}  # other errors would meet every question
REFUSALS = 5  # so many, and nothing answered: it is not about single questions
LONGEST_WAIT = 600.0  # seconds; a limit that lasts longer is the user's to wait for
KEPT = "Answers so far are kept: the same command goes on from them"


@dataclass(frozen=True)
class Question:
    """A prompt, and a number that tells equal prompts apart and is added to the seed."""

    prompt: str
    number: int


@dataclass(frozen=True)
class Answer:
    """A model's text; or why there is none, and what the endpoint said about it."""

    text: str
    fault: str | None = None
    said: str = ""


class Chat:
    """A conversation partner.

    Args:
        endpoint: where and how.
        section: of the configuration, named in errors, such as ``stage.paraphrase``.
        journal: answers that are there already, and where new ones go.

    Raises:
        RunError: where the environment variable with the key is empty, or no client can be made for the address.
    """

    def __init__(self, endpoint: Endpoint, section: str, journal: Journal) -> None:
        self.endpoint, self.section, self.journal = endpoint, section, journal
        self._key = self._read_key()
        self._stopped = Event()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            self._address = httpx.URL(f"{endpoint.url.rstrip('/')}/chat/completions")
            limits = httpx.Limits(max_connections=endpoint.workers)
            self._http = httpx.Client(headers=headers, timeout=endpoint.timeout, limits=limits)
        except (httpx.InvalidURL, ValueError, ImportError) as error:  # the last two: a proxy in the environment
            raise RunError(f"{section}.url: no connection can be made to {endpoint.url}: {error}") from None

    def _read_key(self) -> str | None:
        name = self.endpoint.api_key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            what = "holds characters that no key has" if key else "is not set"
            raise RunError(
                f"{self.section}.api_key_env: the environment variable {name} {what}; set it to the key, or "
                f"{self.section}.api_key_env=null where the endpoint needs none"
            )
        return key

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask all questions that the journal has no answer to.

        Returns:
            The answers, in the order of the questions. Malformed ones are not kept in the journal.

        Raises:
            RunError: where the endpoint cannot be reached, refuses the key, or goes on failing.
        """
        keys = [self._key_of(question) for question in questions]
        open_ones = {
            key: question for key, question in zip(keys, questions, strict=True) if key not in self.journal.answers
        }
        faults = self._ask_all(open_ones) if open_ones else {}
        return [Answer("", faults[key]) if key in faults else Answer(self.journal.answers[key]) for key in keys]

    def _ask_all(self, questions: dict[str, Question]) -> dict[str, str]:
        """Ask questions side by side; returns why some have no answer."""
        faults, refused = dict[str, str](), 0
        self._stopped.clear()
        pool = ThreadPoolExecutor(self.endpoint.workers)
        futures = {pool.submit(self._unless_stopped, key, question): key for key, question in questions.items()}
        try:
            for future in self._shown(futures, len(futures)):
                answer = future.result()
                if answer.fault is not None:
                    faults[futures[future]] = answer.fault
                refused += answer.fault == REFUSED
                if refused == min(REFUSALS, len(questions)) and not self.journal.answers:
                    raise RunError(
                        f"{self.section}: {self.endpoint.url} refuses every question ({answer.said}); mend it"
                    )
        finally:
            # Whatever happened: questions under way may still answer, which was paid for; no other one starts.
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
        return faults

    def _shown(self, futures: Iterable[Future[Answer]], total: int) -> Iterator[Future[Answer]]:
        """Futures as they are done, behind a bar on a terminal."""
        done, console = SimpleQueue[Future[Answer]](), Console(stderr=True)
        for future in futures:
            future.add_done_callback(done.put)
        what, hidden = f"asking {self.endpoint.model}", not console.is_terminal
        for _ in track(range(total), what, console=console, transient=True, disable=hidden):
            yield _next(done)

    def _key_of(self, question: Question) -> str:
        # Not the address: the same model may answer elsewhere when the command is repeated.
        parts = [self.endpoint.model, self.endpoint.temperature, self.endpoint.seed, question.number, question.prompt]
        return sha256(json.dumps(parts).encode()).hexdigest()[:32]

    # -------------------------------------------------------------------------------------------- one question

    def _unless_stopped(self, key: str, question: Question) -> Answer:
        """Ask one question, unless another one has failed: its error ends the command."""
        if self._stopped.is_set():
            return Answer("", "not asked")
        try:
            return self._answer(key, question)
        except BaseException:
            self._stopped.set()
            raise

    def _answer(self, key: str, question: Question) -> Answer:
        """Ask one question until it is answered.

        Raises:
            RunError: where no attempt was answered, or no question would be.
        """
        attempt = 0
        while True:
            try:
                response = self._http.post(self._address, json=self._payload(question))
            except httpx.DecodingError:
                return Answer("", MALFORMED)
            except httpx.TransportError as error:
                trouble, wait = self._unreached(error), None
            else:
                if response.status_code not in RETRIED:
                    return self._kept(key, self._read(response))
                trouble, wait = self._failing(response), retry_after(response.headers.get("Retry-After"))
            if wait is None:
                wait = min(self.endpoint.backoff * 2**attempt, LONGEST_WAIT)
            if wait > LONGEST_WAIT:
                trouble += f"; it asks to wait {wait:,.0f} s"
            attempt += 1
            if attempt > self.endpoint.retries or wait > LONGEST_WAIT or self._stopped.wait(wait):
                raise RunError(f"{self.section}.url: {self.endpoint.url} {trouble} (attempts: {attempt}). {KEPT}")

    def _payload(self, question: Question) -> dict[str, Any]:
        seed = None if self.endpoint.seed is None else self.endpoint.seed + question.number
        payload = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "temperature": self.endpoint.temperature,
            "seed": seed,
        }
        return {name: value for name, value in payload.items() if value is not None}

    def _kept(self, key: str, answer: Answer) -> Answer:
        if answer.fault is None:
            self.journal.add(key, answer.text)
        return answer

    def _read(self, response: httpx.Response) -> Answer:
        if response.is_success:
            return read(response)
        status, said = response.status_code, self._said(response)
        if status in ABOUT_THE_QUESTION:
            return Answer("", REFUSED, said)
        raise RunError(f"{self._complaint(status, response)} ({said}). {KEPT}")

    # -------------------------------------------------------------------------------------------- what went wrong

    def _complaint(self, status: int, response: httpx.Response) -> str:
        section, url, name = self.section, self.endpoint.url, self.endpoint.api_key_env
        if status in (401, 403):
            remedy = f"mend the key in {name}" if name else "name the environment variable that holds one"
            return f"{section}.api_key_env: {url} refuses {'the' if name else 'to answer without a'} key; {remedy}"
        if status == 404:
            return f"{section}: {url} knows no chat/completions, or no model '{self.endpoint.model}'; mend url or model"
        if response.is_redirect:
            where = self._plain(response.headers.get("Location", "another address"))
            return f"{section}.url: {url} redirects to {where}; set {section}.url to what it redirects to"
        return f"{section}: {url} does not serve this request"

    def _unreached(self, error: httpx.TransportError) -> str:
        if isinstance(error, httpx.TimeoutException):
            return (
                f"gave no answer within {self.endpoint.timeout:g} s; is it running? Else raise {self.section}.timeout"
            )
        reason = self._plain(str(error)) or type(error).__name__
        return f"cannot be reached ({reason}); start the server, or mend {self.section}.url"

    def _failing(self, response: httpx.Response) -> str:
        return f"goes on failing ({self._said(response)}); try later, or lower {self.section}.workers"

    def _said(self, response: httpx.Response) -> str:
        """Status and message of an error, without the key, should the endpoint repeat it."""
        try:
            content = response.json()
            message = content["error"]["message"] if isinstance(content["error"], dict) else content["error"]
        except (ValueError, LookupError, TypeError, RecursionError):
            message = response.text
        return f"HTTP {response.status_code}: {self._plain(str(message))}".removesuffix(": ")

    def _plain(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return "".join(sign if sign.isprintable() else " " for sign in text).strip()[:200]


def _next(done: SimpleQueue[Future[Answer]]) -> Future[Answer]:
    """Wait in short steps: polars' handler of SIGINT lets a long wait go on, so Ctrl-C would be heard late."""
    while True:
        try:
            return done.get(timeout=0.2)
        except Empty:
            continue


def read(response: httpx.Response) -> Answer:
    """Take the text out of a chat completion."""
    try:
        choice = response.json()["choices"][0]
        text: str = choice["message"]["content"]
        text.encode()  # half a surrogate pair could not be written to any file
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Answer("", MALFORMED)
    return Answer("", CUT) if choice.get("finish_reason") == "length" else Answer(without_thoughts(text))


def retry_after(header: str | None) -> float | None:
    """Seconds to wait that a ``Retry-After`` header states, as a number or as a date (RFC 9110, 10.2.3)."""
    if header is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
