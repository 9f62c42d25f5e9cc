"""Scoring by a server with OpenAI's completions, such as vLLM: the log-probabilities of label tokens after a prompt.

A request contains prompts that are each followed by an answer, and asks for the log-probabilities of their tokens:
with ``echo`` (OpenAI's API reference, "Create completion") or ``prompt_logprobs`` (vLLM). Token ids are sent if the
server accepts them, because a text may be split into other tokens there. What it accepts is found out once.

Letters: n prompts, c scored answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from finsa.config import Scoring
from finsa.data.endpoint import Client
from finsa.data.rows import Encoded, Renderer
from finsa.errors import RunError, suggest
from finsa.inference.label_tree import scored_answers
from finsa.inference.scoring import of_labels
from finsa.runs.progress import Moved, ignored

FloatArray = NDArray[np.float64]
KEPT = "Rows that are written stay: the same command resumes from them"
ECHO = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}  # 0 tokens mean no limit to llama.cpp
# how prompts are sent, the best first: as token ids or as text, and whether a request may contain several
FORMS = ((True, True), (True, False), (False, True), (False, False))
Pair = tuple[list[int], tuple[int, ...]]  # prompt and answer


class ServedScorer:
    """Scores prompts by a server: (n, c) log-probabilities of each whole label.

    Args:
        stage: address, model, requests.
        renderer: of the prompts.
        column, adapters: choose the served model of a row; None: the model of the stage scores all rows.

    Attributes:
        experts: served models among which rows choose.
        gates: which of them scored each of the last prompts, one-hot, (n, E); None without a choice.
        as_ids: whether token ids are sent.
        other_tokens: number of prompts so far that the server has split into another number of tokens.

    Raises:
        RunError: if the server cannot be reached, refuses the key, does not serve the model, or gives no
            log-probabilities.
    """

    def __init__(
        self, stage: Scoring, renderer: Renderer, column: str | None = None, adapters: Mapping[str, str] | None = None
    ) -> None:
        self.stage, self.renderer, self.column, self.adapters = stage, renderer, column, adapters
        self.answers, self.rule = scored_answers(renderer)
        self.client = Client(stage, "stage", "completions", KEPT)
        self.model = self._served_model()
        self.experts = tuple(dict.fromkeys([*(adapters or {}).values(), *([self.model] if self.model else [])]))
        self.experts = self.experts if adapters else ()
        self.gates: FloatArray | None = None
        self.other_tokens = 0
        tokenizer, prefix = renderer.tokenizer, renderer.prefix
        self._bos = prefix[:1] == [tokenizer.bos_token_id] and tokenizer("a")["input_ids"][:1] == prefix[:1]
        self.as_ids, self.several = self._form()

    def choose(self, row: Mapping[str, Any]) -> str | None:
        """The served model of a row; None if its column names none."""
        return self.model if self.adapters is None else self.adapters.get(str(row.get(self.column or "")), self.model)

    def score(self, prompts: Encoded, moved: Moved = ignored, models: Sequence[str] | None = None) -> FloatArray:
        """Score prompts in order: (n, c).

        Args:
            prompts: from the renderer.
            moved: called with the number of newly scored prompts.
            models: the served model of each; None: the model of the stage.
        """
        c, names = len(self.answers), models or [self.model or ""] * len(prompts)
        order = sorted(range(len(prompts) * c), key=lambda number: names[number // c])
        size, requests = self.stage.prompts if self.several else 1, list[list[int]]()
        for number in order:
            if not requests or len(requests[-1]) == size or names[requests[-1][0] // c] != names[number // c]:
                requests.append([])
            requests[-1].append(number)
        scores, left = np.zeros(len(prompts) * c), np.full(len(prompts), c)
        self.client.stop(False)
        pool = ThreadPoolExecutor(self.stage.workers)

        def ask(numbers: list[int]) -> list[float]:
            pairs = [(prompts[number // c], self.answers[number % c]) for number in numbers]
            return self._ask(names[numbers[0] // c], pairs)

        try:
            pending = {pool.submit(ask, numbers): numbers for numbers in requests}
            while pending:
                # in short steps: a long wait would delay Ctrl-C
                for future in wait(pending, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    numbers = pending.pop(future)
                    scores[numbers] = future.result()
                    np.subtract.at(left, np.array(numbers) // c, 1)
                    moved(int((left[np.unique(np.array(numbers) // c)] == 0).sum()))
        finally:
            self.client.stop()
            pool.shutdown(cancel_futures=True)
        if self.experts:
            self.gates = np.eye(len(self.experts))[[self.experts.index(name) for name in names]]
        return of_labels(scores.reshape(len(prompts), c), self.renderer.labels)

    # -------------------------------------------------------------------------------------------- requests

    def _served_model(self) -> str | None:
        """Check the names of the models against those that the server lists; the model that scores by default."""
        url, known = self.stage.url, self.client.models()
        for key, name in [
            ("model", self.stage.model),
            *(("adapters", name) for name in (self.adapters or {}).values()),
        ]:
            if name is not None and known and name not in known:
                raise RunError(f"stage.{key}: {url} has no model '{name}'. {suggest(name, known)}")
        if self.stage.model is not None or self.adapters is not None:
            return self.stage.model
        if len(known) != 1:
            listed = f": {', '.join(known)}" if known else ""
            raise RunError(f"stage.model: name the model at {url}{listed}")
        return known[0]

    def _form(self) -> tuple[bool, bool]:
        """Find out how the server accepts prompts: as token ids, and several per request.

        Raises:
            RunError: if it gives no log-probabilities of a prompt in any of them.
        """
        prompt = self.renderer.encode(["A"])[0]
        pairs, model = [(prompt, answer) for answer in self.answers[:2]], self.model or next(iter(self.experts))
        reason = "the response has none"
        for as_ids, several in FORMS:
            if several and self.stage.prompts == 1:
                continue
            self.as_ids, self.several = as_ids, several
            try:
                response = self.client.send(self._payload(model, pairs if several else pairs[:1]), retries=0)
            except (RunError, httpx.DecodingError) as error:
                reason = str(error)
                continue
            if response.status_code in (401, 403, 404) or response.is_redirect:
                raise self.client.fault(response, model)
            if not response.is_success:
                reason = self.client.detail(response)
                continue
            try:
                self._read(response, pairs if several else pairs[:1])
            except RunError as error:
                reason = str(error)
                continue
            self.other_tokens = 0
            return as_ids, several
        raise RunError(
            f"stage.url: {self.stage.url} gives no log-probabilities of the tokens of a prompt ({reason}). vLLM, "
            "SGLang and llama_cpp.server do; llama-server and Ollama do not"
        )

    def _payload(self, model: str, pairs: Sequence[Pair]) -> dict[str, Any]:
        inputs: list[Any] = [self._input([*prompt, *answer]) for prompt, answer in pairs]
        return {"model": model, "prompt": inputs if self.several else inputs[0], **ECHO}

    def _input(self, ids: list[int]) -> list[int] | str:
        """Token ids, or their text without the leading token, which a server adds to a text."""
        if self.as_ids:
            return ids
        return str(self.renderer.tokenizer.decode(ids[1:] if self._bos else ids, skip_special_tokens=False))

    def _ask(self, model: str, pairs: Sequence[Pair]) -> list[float]:
        """The log-probability of each answer after its prompt."""
        try:
            response = self.client.send(self._payload(model, pairs))
        except httpx.DecodingError:
            raise RunError(f"stage.url: {self.stage.url} sends damaged responses. {KEPT}") from None
        if not response.is_success:
            raise self.client.fault(response, model)
        return self._read(response, pairs)

    def _read(self, response: httpx.Response, pairs: Sequence[Pair]) -> list[float]:
        """Read the log-probabilities of the answers from a response.

        Raises:
            RunError: if there are none, or the answers were split into other tokens.
        """
        try:
            choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
            return [self._sum(choice, *pair) for choice, pair in zip(choices, pairs, strict=True)]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise RunError(
                f"stage.url: {self.stage.url} gives no log-probabilities of the tokens of a prompt"
            ) from None

    def _sum(self, choice: dict[str, Any], prompt: list[int], answer: tuple[int, ...]) -> float:
        """The log-probability of an answer."""
        if (entries := choice.get("prompt_logprobs")) is not None:  # of vLLM, by token id
            last = entries[len(entries) - len(answer) :]
            return float(sum(entry[str(token)]["logprob"] for entry, token in zip(last, answer, strict=True)))
        found = choice["logprobs"]
        values, tokens = found["token_logprobs"], found["tokens"]
        length = len(prompt) + len(answer)
        if self.as_ids:
            if len(values) < length:
                raise LookupError
            end = length
        else:
            end = len(values) - (choice["finish_reason"] == "length")  # without the generated token
            wanted = [self.renderer.tokenizer.decode([token], skip_special_tokens=False) for token in answer]
            if _plain(tokens[end - len(answer) : end]) != _plain(wanted):
                raise RunError(
                    f"stage.url: {self.stage.url} accepts no token ids, and splits the end of a prompt with its answer "
                    f"into {tokens[end - len(answer) - 1 : end]}, not into ... {wanted}; score locally"
                )
            self.other_tokens += end != length - self._bos
        return float(sum(values[end - len(answer) : end]))


def _plain(tokens: Sequence[str]) -> list[str]:
    """Texts of tokens without what is not a whole character, which servers write in different ways."""
    return [token.replace("\ufffd", "") for token in tokens]
