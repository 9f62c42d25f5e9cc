"""Requests as clients write them, whatever they write; answers and their documentation."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from finsa.serving.batching import Answer

MISSING = "Missing input text"
# C0 and DEL without tab, line feed and carriage return: no text has them, and logs and terminals suffer from them.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# Neither white space nor another sign that shows nothing; named where dialects of regular expressions differ.
_SIGN = r"[^\s\x00-\x1f\x7f\x85\ufeff]"
_WRITTEN = re.compile(_SIGN)


class RefusedError(Exception):
    """A request that cannot be answered, as its client is told.

    Args:
        status: of HTTP.
        reason: what is wrong with it.
        headers: to send along.
    """

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        self.status, self.reason, self.headers = status, reason, headers
        super().__init__(reason)


# ------------------------------------------------------------------------------------------------ in


async def read(headers: Any, chunks: AsyncIterator[bytes], most: int, seconds: float) -> bytes:
    """Read a body, no more of it than is allowed and no longer than it may take.

    Args:
        headers: of the request.
        chunks: the body as it comes.
        most: bytes.
        seconds: for all of it.

    Raises:
        RefusedError: for a body that is too large, too slow or no JSON by its own account.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which also keeps other sites' forms out
        raise RefusedError(415, "send JSON, and say so: Content-Type: application/json")
    too_large = RefusedError(413, f"the body may have {most} bytes at most; send fewer texts at a time")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in chunks:
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise RefusedError(408, f"the body did not come within {seconds:g} s", connection="close") from None
    return bytes(body)


Read = Callable[[dict[str, Any]], tuple[str, str | None]]  # the text of a row, and why it cannot be answered


def one_text(body: bytes, read: Read | None = None) -> str:
    """The text of ``{"text": "..."}``, or of a row in the form that the run was trained on.

    Args:
        body: of the request.
        read: reads a row; None: texts alone are taken.
    """
    content = _object(body, "text")
    if read is not None and "text" not in content and content:
        return _row(content, read, "")
    return _text(content.get("text"), "text")


def many_texts(body: bytes, most: int, read: Read | None = None) -> list[str]:
    """The texts of ``{"texts": ["...", "..."]}`` or ``{"rows": [{...}, {...}]}``, at most so many."""
    content = _object(body, "texts")
    key = "rows" if read is not None and "texts" not in content and "rows" in content else "texts"
    texts = content.get(key)
    if texts is None or texts == []:
        raise RefusedError(400, f"{MISSING}s")
    if not isinstance(texts, list):
        raise RefusedError(422, f"{key}: must be a list of {'objects' if key == 'rows' else 'strings'}")
    if len(texts) > most:
        raise RefusedError(413, f"{key}: {len(texts)} are too many, {most} may come at a time")
    if key == "rows" and read is not None:
        return [_row(row, read, f"rows[{number}]") for number, row in enumerate(texts)]
    return [_text(text, f"texts[{number}]") for number, text in enumerate(texts)]


def _row(row: object, read: Read, where: str) -> str:
    """The text of a row, rendered as in training."""
    if not isinstance(row, dict):
        raise RefusedError(422, f"{where}: must be an object")
    text, fault = read(row)
    if fault is not None:
        raise RefusedError(422, f"{where}: {fault}".removeprefix(": "))
    return _text(text, where or "text")


def _object(body: bytes, key: str) -> dict[str, Any]:
    if not body.strip():
        raise RefusedError(400, MISSING if key == "text" else f"{MISSING}s")
    try:
        # Unlike the standard library's: nesting is bounded, half surrogate pairs and invalid UTF-8 are errors.
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise RefusedError(422, f'the body must be an object with the key "{key}"')
    return content


def _text(text: object, where: str) -> str:
    if text is not None and not isinstance(text, str):
        raise RefusedError(422, f"{where}: must be a string")
    control = _CONTROL.search(text or "")
    if control:
        raise RefusedError(400, f"{where}: has the control character U+{ord(control[0]):04X} at {control.start()}")
    if text is None or not _WRITTEN.search(text):
        raise RefusedError(400, MISSING if where == "text" else f"{MISSING}: {where}")
    return text


# ------------------------------------------------------------------------------------------------ out


def prediction(text: str, answer: Answer, ms: float) -> dict[str, Any]:
    """One text's answer, the published shape first."""
    return {"input": text, "prediction": answer.prediction, "time_ms": round(ms, 2), **_beside(answer)}


def predictions(texts: Sequence[str], answers: Sequence[Answer], ms: float) -> dict[str, Any]:
    """The answers to several texts."""
    rows = [
        {"input": text, "prediction": answer.prediction, **_beside(answer)}
        for text, answer in zip(texts, answers, strict=True)
    ]
    return {"predictions": rows, "time_ms": round(ms, 2)}


def _beside(answer: Answer) -> dict[str, Any]:
    beside: dict[str, Any] = {"probs": answer.probs, "truncated": answer.truncated}
    return beside if answer.route is None else {**beside, "route": answer.route}


# ------------------------------------------------------------------------------------------------ their documentation

_ALLOWED = r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
Text = Annotated[
    str,
    Field(
        min_length=1,
        pattern=rf"^{_ALLOWED}*{_SIGN}{_ALLOWED}*$",
        description="What to judge. One that is too long loses its end, and the answer says so.",
        examples=["公司上半年净利润同比增长三成，超出市场预期。"],
    ),
]
Shares = dict[str, Annotated[float, Field(ge=0, le=1)]]


class TextIn(BaseModel):
    """One text."""

    text: Text


class TextsIn(BaseModel):
    """Several texts."""

    texts: Annotated[list[Text], Field(min_length=1)]


class _Out(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Judged(_Out):
    """A text, its label and how sure the model is."""

    input: Annotated[str, Field(description="The text.")]
    prediction: Annotated[str, Field(description="The most probable label.")]
    probs: Annotated[Shares, Field(description="Probability by label, calibrated by the temperature of the run.")]
    truncated: Annotated[bool, Field(description="Whether the text was too long and lost its end.")]
    route: Annotated[Shares, Field(description="Share by expert; of a mixture of experts alone.")] = {}


class PredictionOut(Judged):
    """The answer to one text."""

    time_ms: Annotated[float, Field(ge=0, description="Milliseconds at the server.")]


class PredictionsOut(_Out):
    """The answers to several texts, in their order."""

    predictions: list[Judged]
    time_ms: Annotated[float, Field(ge=0, description="Milliseconds at the server.")]


class StateOut(_Out):
    """How the service is."""

    status: str


class ModelOut(_Out):
    """What is served."""

    name: Annotated[str, Field(description="Method, model and data; the format of an export.")]
    run: Annotated[str, Field(description="The folder's name.")]
    labels: list[str]
    experts: Annotated[list[str], Field(description="Of a mixture.")]
    base: Annotated[dict[str, str | None], Field(description="The base model; none for a classical method.")]
    demonstration: Annotated[
        str | None, Field(description="For the embedded model and generated rows: do not rely on the answers.")
    ]
    max_length: Annotated[int, Field(description="Tokens of prompt, text and answer.")]
    rows: Annotated[list[str], Field(description="Fields of rows that are read as in training, besides texts.")]
    rule: Annotated[str, Field(description="How labels are scored.")]
    fingerprints: Annotated[dict[str, str | None], Field(description="Of configuration, rows, template and labels.")]
    git_commit: str | None
    versions: Annotated[dict[str, str | None], Field(description="Of the packages that made the run.")]
    finsa: Annotated[str | None, Field(description="The version that serves.")]
    limits: Annotated[dict[str, float], Field(description="What a request may have.")]


class ErrorOut(_Out):
    """Why there is no answer."""

    error: str
