"""Scoring by a server with OpenAI's completions, such as vLLM: the log-probabilities of label tokens after a prompt.

A server that accepts token ids gets each prompt with each answer, and returns the log-probabilities of their tokens
(``echo``, or ``prompt_logprobs`` of vLLM). A server that accepts text only may split the end of a prompt and an answer
differently, and llama_cpp.server shifts what it echoes by one token, so there the prompt is sent alone, and each token
of an answer is forced by ``logit_bias``: the log-probability of a generated token does not contain the bias.

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
from finsa.inference.graphs import of_labels
from finsa.inference.label_tree import Answer, scored_answers
from finsa.runs.progress import Moved, ignored

FloatArray = NDArray[np.float64]
KEPT = "Rows that are written stay: the same command resumes from them"
# How a server accepts prompts, the best first: as token ids or as text, and several or one per request.
FORMS = ((True, True), (True, False), (False, True), (False, False))
FORCED = 100  # the largest bias of OpenAI's API
Step = tuple[Answer, Answer]  # tokens after the prompt, and the tokens after those that are scored


class ServedScorer:
    """Scores prompts by a server: (n, c) log-probabilities of each whole label.

    Args:
        stage: address, model, requests.
        renderer: of the prompts.
        column, adapters: choose the served model of a row; None: the model of the stage scores all rows.

    Attributes:
        experts, gates: the served models among which rows choose, (E,), and which of them scored each of the last
            prompts, one-hot, (n, E); empty and None without a choice.
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
        known, several = self.client.models(), list((adapters or {}).values())
        for name in filter(None, (stage.model, *several)):
            if known and name not in known:
                key = "adapters" if name in several else "model"
                raise RunError(f"stage.{key}: {stage.url} has no model '{name}'. {suggest(name, known)}")
        if stage.model is None and adapters is None and len(known) != 1:
            raise RunError(f"stage.model: name the model at {stage.url}: {', '.join(known) or 'it lists none'}")
        self.model = stage.model if stage.model is not None or adapters else known[0]
        served = dict.fromkeys([*several, *([self.model] if self.model else [])])
        self.experts: tuple[str, ...] = tuple(served) if adapters else ()
        self.gates: FloatArray | None = None
        self.other_tokens = 0
        tokenizer, prefix = renderer.tokenizer, renderer.prefix
        self._bos = prefix[:1] == [tokenizer.bos_token_id] and tokenizer("a")["input_ids"][:1] == prefix[:1]
        self.as_ids, self.several = self._form(next(iter(served)))
        self.other_tokens = 0  # without the probes

    def choose(self, row: Mapping[str, Any]) -> str | None:
        """The served model of a row; None if its column names none."""
        return self.model if self.adapters is None else self.adapters.get(str(row.get(self.column or "")), self.model)

    def score(self, prompts: Encoded, moved: Moved = ignored, models: Sequence[str] | None = None) -> FloatArray:
        """Score prompts in order: (n, c); `models` are the served models of each, otherwise that of the stage."""
        names, steps = models or [self.model or ""] * len(prompts), self._steps()
        values = np.zeros((len(prompts), len(steps)))
        parts, size = list[list[int]](), self.stage.prompts if self.several else 1
        for row in sorted(range(len(prompts)), key=lambda row: names[row]):
            if not parts or len(parts[-1]) == size or names[parts[-1][0]] != names[row]:
                parts.append([])
            parts[-1].append(row)

        def ask(rows: list[int]) -> None:
            for number, step in enumerate(steps):
                values[rows, number] = self._ask(names[rows[0]], [prompts[row] for row in rows], step)
            moved(len(rows))

        self.client.stop(False)
        pool = ThreadPoolExecutor(self.stage.workers)
        try:
            pending = {pool.submit(ask, rows) for rows in parts}
            while pending:  # in short steps: a long wait would delay Ctrl-C
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        finally:
            self.client.stop()
            pool.shutdown(cancel_futures=True)
        if self.experts:
            self.gates = np.eye(len(self.experts))[[self.experts.index(name) for name in names]]
        parts_of = [
            [
                n
                for n, (before, after) in enumerate(steps)
                if answer[: len(before)] == before and answer[len(before) :][: len(after)] == after
            ]
            for answer in self.answers
        ]
        scores = np.stack([values[:, numbers].sum(axis=1) for numbers in parts_of], axis=1)
        return of_labels(scores, self.renderer.labels)

    def _steps(self) -> list[Step]:
        """What is scored after every prompt: whole answers, or the tokens of answers that are forced, each once."""
        if self.as_ids:
            return [((), answer) for answer in self.answers]
        return sorted({(answer[:n], answer[n : n + 1]) for answer in self.answers for n in range(len(answer))})

    def _form(self, model: str) -> tuple[bool, bool]:
        """Find out how the server accepts prompts.

        Raises:
            RunError: if it gives no log-probabilities in any form.
        """
        reason, prompt = "", self.renderer.encode(["A"])[0]
        for self.as_ids, self.several in FORMS:
            try:
                steps = [step for step in self._steps() if not step[0]]
                total = sum(np.exp(self._ask(model, [prompt] * (1 + self.several), step, 0)[0]) for step in steps)
                if total < 1.01:  # otherwise it includes the bias, or scores something else
                    return self.as_ids, self.several
                reason = f"they sum to {total:.3g}"
            except _UnsuitableError as error:
                reason = str(error)
        raise RunError(
            f"stage.url: {self.stage.url} gives no log-probabilities of the tokens of an answer ({reason}). vLLM and "
            "llama_cpp.server do; Ollama does not"
        )

    def _ask(self, model: str, prompts: Sequence[list[int]], step: Step, retries: int | None = None) -> list[float]:
        """Send one request: the log-probability of a step's tokens after each prompt.

        Raises:
            RunError: if the server refuses it, or answers without log-probabilities.
        """
        before, after = step
        payload: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        if self.as_ids:
            inputs: list[Any] = [[*prompt, *after] for prompt in prompts]
            payload |= {"echo": True, "prompt_logprobs": 0}
        else:
            start = int(self._bos)  # the server adds this token to a text
            inputs = [self._text([*prompt[start:], *before]) for prompt in prompts]
            payload["logit_bias"] = {str(after[0]): FORCED}
        payload["prompt"] = inputs if self.several else inputs[0]
        try:
            try:
                response = self.client.send(payload, retries)
            except RunError as error:  # some servers answer 500 to a form that they do not know
                raise _UnsuitableError(str(error)) if retries == 0 else error from None
            if not response.is_success:
                probing = retries == 0 and response.status_code not in (401, 403, 404) and not response.is_redirect
                raise _UnsuitableError(self.client.detail(response)) if probing else self.client.fault(response, model)
            content = response.json()
            choices = sorted(content["choices"], key=lambda choice: choice["index"])
            values = [self._read(choice, prompt, after) for choice, prompt in zip(choices, prompts, strict=True)]
        except (httpx.DecodingError, ValueError, LookupError, TypeError, AttributeError):
            raise _UnsuitableError(f"stage.url: {self.stage.url} answers without log-probabilities. {KEPT}") from None
        if not self.as_ids and not before and step == self._steps()[0]:
            expected = sum(map(len, prompts))
            self.other_tokens += len(prompts) * (
                (content.get("usage") or {}).get("prompt_tokens", expected) != expected
            )
        return values

    def _read(self, choice: dict[str, Any], prompt: list[int], after: Answer) -> float:
        """The log-probability of tokens after a prompt, or of a forced token, from one choice of a response."""
        if (entries := choice.get("prompt_logprobs")) is not None:  # by token id
            last = entries[len(prompt) : len(prompt) + len(after)]
            return float(sum(entry[str(token)]["logprob"] for entry, token in zip(last, after, strict=True)))
        found = choice["logprobs"]
        if self.as_ids:
            last = found["token_logprobs"][len(prompt) : len(prompt) + len(after)]
            if len(last) < len(after):
                raise LookupError
            return float(sum(last))
        if found["tokens"][0].replace("\ufffd", "") != self._text(after).replace("\ufffd", ""):  # part of a character
            raise LookupError
        return float(found["token_logprobs"][0])

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.renderer.tokenizer.decode(ids, skip_special_tokens=False))


class _UnsuitableError(RunError):
    """The form of a request is not one that the server accepts."""
