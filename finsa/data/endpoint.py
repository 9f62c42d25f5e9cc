"""Clients for models behind an OpenAI-compatible endpoint, with retries, and for chats a journal of answers.

The protocol is POST {url}/chat/completions as OpenAI's API reference describes it ("Create chat completion"); Ollama,
vLLM, llama.cpp and the hosted services implement it. Completed answers are written to a journal at once, so an
interrupted command resumes without asking again. `finsa.inference.served` sends {url}/completions.

This is not the `openai` client because its retries do not fit: the backoff cannot be configured, a ``Retry-After`` of
more than two minutes is not waited for, and a wait does not end when another question has failed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track

from finsa.config import Endpoint, Server
from finsa.data.prompts import without_thoughts
from finsa.errors import RunError

MALFORMED, CUT, REFUSED = "malformed answer", "answer cut at the model's limit", "refused by the endpoint"
RETRIED = {408, 429, *range(500, 600)}
ABOUT_THE_QUESTION = {400, 413, 422}  # any other error would occur for every question
REFUSALS = 5  # number of refusals without any answer after which the error does not depend on the question
LONGEST_WAIT = 600.0  # seconds
KEPT = "Answers so far are kept: the same command resumes from them"


@dataclass(frozen=True)
class Question:
    """A prompt, and a number that distinguishes equal prompts and is added to the seed."""

    prompt: str
    number: int


@dataclass(frozen=True)
class Answer:
    """The text of a model, or the reason why there is none, with the message of the endpoint."""

    text: str
    fault: str | None = None
    detail: str = ""


class Journal:
    """Answers by key on disk, one JSON object per line; incomplete lines are ignored.

    Args:
        file: created with the first answer.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, Lock()
        self.answers = dict(self._lines()) if file.is_file() else {}
        self.kept = len(self.answers)

    def _lines(self) -> Iterator[tuple[str, str]]:
        content = self.file.read_bytes()
        if content and not content.endswith(b"\n"):  # cut off by a kill: the next line must not be appended to it
            with self.file.open("ab") as stream:
                stream.write(b"\n")
        for line in content.split(b"\n"):
            try:
                record = json.loads(line)
                yield str(record["key"]), str(record["text"])
            except (ValueError, LookupError, TypeError):
                continue

    def add(self, key: str, text: str) -> None:
        """Append an answer; safe to call from several threads."""
        line = json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n"
        with self._lock:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as stream:
                stream.write(line.encode())
            self.answers[key] = text


class Client:
    """Sends requests to a server, with retries.

    Args:
        endpoint: address, key, retries.
        section: of the configuration, named in errors, such as ``stage.paraphrase``.
        path: of the requests, after the address.
        kept: ends an error: what an interrupted command keeps.

    Raises:
        RunError: if the environment variable with the key is empty, or no client can be made for the address.
    """

    def __init__(self, endpoint: Server, section: str, path: str, kept: str) -> None:
        self.server, self.section, self.path, self.kept = endpoint, section, path, kept
        self._stopped = Event()
        self._key = None
        if endpoint.api_key_env is not None:
            key = self._key = os.environ.get(endpoint.api_key_env, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                problem = "contains characters that no key has" if key else "is not set"
                raise RunError(
                    f"{section}.api_key_env: the environment variable {endpoint.api_key_env} {problem}; set it to the "
                    f"key, or {section}.api_key_env=null where the endpoint needs none"
                )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            self._address = httpx.URL(f"{endpoint.url.rstrip('/')}/{path}")
            limits = httpx.Limits(max_connections=endpoint.workers)
            self._http = httpx.Client(headers=headers, timeout=endpoint.timeout, limits=limits)
        except (httpx.InvalidURL, ValueError, ImportError) as error:  # the last two: a proxy in the environment
            raise RunError(f"{section}.url: no connection can be made to {endpoint.url}: {error}") from None

    def send(self, payload: dict[str, Any], retries: int | None = None) -> httpx.Response:
        """Post a request until it is answered.

        Args:
            payload: the JSON body.
            retries: after failures; None: those of the endpoint.

        Returns:
            The response, with any status that is not retried.

        Raises:
            RunError: if no attempt was answered.
            httpx.DecodingError: if the body of the response is damaged.
        """
        section, url, retries = self.section, self.server.url, self.server.retries if retries is None else retries
        for attempt in range(1, retries + 2):
            wait = min(self.server.backoff * 2 ** (attempt - 1), LONGEST_WAIT)
            try:
                response = self._http.post(self._address, json=payload)
            except httpx.TimeoutException:
                seconds = self.server.timeout
                trouble = f"gave no answer within {seconds:g} s; is it running? Otherwise raise {section}.timeout"
            except httpx.TransportError as error:
                reason = self._plain(str(error)) or type(error).__name__
                trouble = f"cannot be reached ({reason}); start the server, or fix {section}.url"
            else:
                if response.status_code not in RETRIED:
                    return response
                trouble = f"keeps failing ({self.detail(response)}); try later, or lower {section}.workers"
                stated = retry_after(response.headers.get("Retry-After"))
                wait = wait if stated is None else stated
                if wait > LONGEST_WAIT:
                    trouble += f"; it asks to wait {wait:,.0f} s"
                    break
            if attempt > retries or self._stopped.wait(wait):
                break
        raise RunError(f"{section}.url: {url} {trouble} (attempts: {attempt}). {self.kept}")

    def models(self) -> list[str]:
        """Names of the models that the server lists; none if it lists none. There is no retry.

        Raises:
            RunError: if it cannot be reached, or refuses the key.
        """
        section, url = self.section, self.server.url
        try:
            response = self._http.get(httpx.URL(f"{url.rstrip('/')}/models"))
        except httpx.TransportError as error:
            reason = self._plain(str(error)) or type(error).__name__
            raise RunError(
                f"{section}.url: {url} cannot be reached ({reason}); start the server, or fix {section}.url"
            ) from None
        if response.status_code in (401, 403):
            raise self.fault(response, None)
        try:
            return [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, LookupError, TypeError):
            return []

    def stop(self, stopped: bool = True) -> None:
        """Let no request wait for a further attempt, or let them wait again."""
        if stopped:
            self._stopped.set()
        else:
            self._stopped.clear()

    def fault(self, response: httpx.Response, model: str | None) -> RunError:
        """The error for a response that every request would get."""
        detail, section, url = self.detail(response), self.section, self.server.url
        if response.status_code in (401, 403):
            name = self.server.api_key_env
            fix = f"fix the key in {name}" if name else "name the environment variable that contains it"
            problem = f"{section}.api_key_env: {url} refuses {'the' if name else 'to answer without a'} key; {fix}"
        elif response.status_code == 404:
            problem = f"{section}: {url} has no {self.path}, or no model '{model}'; fix url or model"
        elif response.is_redirect:
            target = self._plain(response.headers.get("Location", "another address"))
            problem = f"{section}.url: {url} redirects to {target}; set {section}.url to that address"
        else:
            problem = f"{section}: {url} does not serve this request"
        return RunError(f"{problem} ({detail}). {self.kept}")

    def detail(self, response: httpx.Response) -> str:
        """Status and message of an error; the key is masked, in case the endpoint repeats it."""
        try:
            content = response.json()
            message = content["error"]["message"] if isinstance(content["error"], dict) else content["error"]
        except (ValueError, LookupError, TypeError, RecursionError):
            message = response.text
        return f"HTTP {response.status_code}: {self._plain(str(message))}".removesuffix(": ")

    def _plain(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return "".join(sign if sign.isprintable() else " " for sign in text).strip()[:200]


class Chat(Client):
    """Asks one model at one endpoint.

    Args:
        endpoint: address, model, sampling, retries.
        section: of the configuration, named in errors, such as ``stage.paraphrase``.
        journal: holds the answers of an interrupted command, and takes new ones.

    Raises:
        RunError: if the environment variable with the key is empty, or no client can be made for the address.
    """

    def __init__(self, endpoint: Endpoint, section: str, journal: Journal) -> None:
        super().__init__(endpoint, section, "chat/completions", KEPT)
        self.endpoint, self.journal = endpoint, journal

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask all questions that the journal has no answer to, several at a time.

        Returns:
            The answers, in the order of the questions. Those with a fault are not kept in the journal.

        Raises:
            RunError: if the endpoint cannot be reached, refuses the key, or keeps failing.
        """
        keys = [self._key_of(question) for question in questions]
        unanswered = {key: one for key, one in zip(keys, questions, strict=True) if key not in self.journal.answers}
        faults = self._ask_all(unanswered) if unanswered else {}
        return [Answer("", faults[key]) if key in faults else Answer(self.journal.answers[key]) for key in keys]

    def _key_of(self, question: Question) -> str:
        # Without the address: the same model may be served elsewhere when the command is repeated.
        parts = [self.endpoint.model, self.endpoint.temperature, self.endpoint.seed, question.number, question.prompt]
        return sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _ask_all(self, questions: dict[str, Question]) -> dict[str, str]:
        """Ask questions concurrently, with a progress bar on a terminal; returns the faults by key."""
        faults, refused, done, console = dict[str, str](), 0, SimpleQueue[Future[Answer]](), Console(stderr=True)
        self._stopped.clear()
        pool = ThreadPoolExecutor(self.endpoint.workers)
        futures = {pool.submit(self._answer, key, question): key for key, question in questions.items()}
        try:
            for future in futures:
                future.add_done_callback(done.put)
            title, hidden = f"asking {self.endpoint.model}", not console.is_terminal
            for _ in track(range(len(futures)), title, console=console, transient=True, disable=hidden):
                future = _next(done)
                answer = future.result()
                if answer.fault is not None:
                    faults[futures[future]] = answer.fault
                refused += answer.fault == REFUSED
                if refused == min(REFUSALS, len(questions)) and not self.journal.answers:
                    raise RunError(f"{self.section}: {self.endpoint.url} refuses every question ({answer.detail})")
        finally:
            # Pending requests may still be answered, because they are paid for; no other one starts.
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
        return faults

    def _answer(self, key: str, question: Question) -> Answer:
        """Ask one question until it is answered; a failure of another question ends the attempts.

        Raises:
            RunError: if no attempt was answered, or the error would meet every question.
        """
        if self._stopped.is_set():
            return Answer("", "not asked")
        payload = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "temperature": self.endpoint.temperature,
            "seed": None if self.endpoint.seed is None else self.endpoint.seed + question.number,
        }
        try:
            try:
                response = self.send({name: value for name, value in payload.items() if value is not None})
            except httpx.DecodingError:
                return Answer("", MALFORMED)
            if response.status_code in ABOUT_THE_QUESTION:
                return Answer("", REFUSED, self.detail(response))
            if not response.is_success:
                raise self.fault(response, self.endpoint.model)
            answer = read(response)
            if answer.fault is None:
                self.journal.add(key, answer.text)
            return answer
        except BaseException:
            self._stopped.set()  # immediately, so that no other question starts
            raise


def _next(done: SimpleQueue[Future[Answer]]) -> Future[Answer]:
    """Wait in short steps: polars' SIGINT handler lets a long wait continue, so Ctrl-C would come late."""
    while True:
        try:
            return done.get(timeout=0.2)
        except Empty:
            continue


def read(response: httpx.Response) -> Answer:
    """Extract the text of a chat completion."""
    try:
        choice = response.json()["choices"][0]
        text: str = choice["message"]["content"]
        text.encode()  # half of a surrogate pair could not be written to any file
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Answer("", MALFORMED)
    return Answer("", CUT) if choice.get("finish_reason") == "length" else Answer(without_thoughts(text))


def retry_after(header: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks to wait, as a number or as a date (RFC 9110, 10.2.3)."""
    if header is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
