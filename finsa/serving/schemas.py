"""Parsing and validation of requests, and the documented schemas of requests and responses."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from finsa.data import readers
from finsa.data.encodings import open_text
from finsa.errors import DataError

MISSING = "Missing input text"
TEXT_COLUMNS = ("text", "content", "sentence", "input", "文本", "内容", "正文", "新闻", "标题", "title")
# Limits of an uploaded file; each field takes about a hundred bytes of memory, however short it is.
MOST_COLUMNS, MOST_FIELDS = 2000, 1_000_000
# C0 and DEL without tab, line feed and carriage return: not part of real texts, and harmful to logs and terminals.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# A visible character: neither whitespace nor an invisible character, in every regular expression dialect.
_SIGN = r"[^\s\x00-\x1f\x7f\x85\ufeff]"

Read = Callable[[dict[str, Any]], tuple[str, str | None]]  # row -> its text, and the reason why it cannot be used


class RefusedError(Exception):
    """A refused request.

    Args:
        status: HTTP status.
        reason: error message for the client.
        headers: response headers.
    """

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        self.status, self.reason, self.headers = status, reason, headers
        super().__init__(reason)


# ------------------------------------------------------------------------------------------------ requests


async def read_body(headers: Any, chunks: AsyncIterator[bytes], kind: str, most: int, seconds: float) -> bytes:
    """Read a request body, within limits of size and time.

    Args:
        headers: request headers.
        chunks: the body as it arrives.
        kind: required content type; browsers cannot send it from a form, so forms of other sites are refused.
        most: maximum number of bytes.
        seconds: maximum duration.

    Raises:
        RefusedError: for a body that is too large, too slow or has a different content type.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        what = "JSON" if kind == "application/json" else "the file"
        raise RefusedError(415, f"send {what} with the header Content-Type: {kind}")
    too_large = RefusedError(413, f"the request body may have at most {most} bytes; send fewer texts per request")
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
        raise RefusedError(408, f"the request body did not arrive within {seconds:g} s", connection="close") from None
    return bytes(body)


def one_text(body: bytes, read: Read | None = None, targeted: bool = False) -> str:
    """The text of ``{"text": "..."}``, or of a row in the format of the training data.

    Args:
        body: request body.
        read: extracts the text of a row; None: only texts are accepted.
        targeted: whether the model needs a target besides the text, so that only rows are accepted.
    """
    content = _object(body, "text")
    if not targeted and "text" in content and "target" in content:
        raise RefusedError(422, "target: the prompt of this model asks for no target; leave it out")
    if read is not None and (targeted or "text" not in content) and content:
        return _row(content, read, "")
    return _text(content.get("text"), "text")


def many_texts(body: bytes, most: int, read: Read | None = None, targeted: bool = False) -> list[str]:
    """The texts of ``{"texts": ["...", "..."]}`` or ``{"rows": [{...}, {...}]}``, at most `most`.

    The other arguments are those of `one_text`.
    """
    content = _object(body, "texts")
    if targeted and "texts" in content:
        raise RefusedError(422, 'texts: this model needs a target for each text; send {"rows": [{"text", "target"}]}')
    key = "rows" if read is not None and "texts" not in content and "rows" in content else "texts"
    values = content.get(key)
    if values is None and "rows" in content:
        raise RefusedError(422, 'rows: this model reads texts; send {"texts": ["...", "..."]}')
    if values is None or values == []:
        raise RefusedError(400, f"{MISSING}s")
    if not isinstance(values, list):
        raise RefusedError(422, f"{key}: must be a list of {'objects' if key == 'rows' else 'strings'}")
    if len(values) > most:
        raise RefusedError(413, f"{key}: {len(values)} are too many; at most {most} are allowed per request")
    if key == "rows" and read is not None:
        return [_row(row, read, f"rows[{number}]") for number, row in enumerate(values)]
    return [_text(text, f"texts[{number}]") for number, text in enumerate(values)]


def _object(body: bytes, key: str) -> dict[str, Any]:
    if not body.strip():
        raise RefusedError(400, MISSING if key == "text" else f"{MISSING}s")
    try:
        # Unlike the json module, it limits nesting and rejects lone surrogates and invalid UTF-8.
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, f"the request body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RefusedError(422, f'the request body must be an object with the key "{key}"')
    return content


def _row(row: object, read: Read, where: str) -> str:
    """The text of a row, rendered as in training."""
    if not isinstance(row, dict):
        raise RefusedError(422, f"{where}: must be an object")
    text, fault = read(row)
    if fault is not None:
        raise RefusedError(422, f"{where}: {fault}".removeprefix(": "))
    return _text(text, where or "text")


def _text(text: object, where: str) -> str:
    if text is not None and not isinstance(text, str):
        raise RefusedError(422, f"{where}: must be a string")
    control = _CONTROL.search(text or "")
    if control:
        raise RefusedError(
            400, f"{where}: contains the control character U+{ord(control[0]):04X} at position {control.start()}"
        )
    if text is None or not re.search(_SIGN, text):
        raise RefusedError(400, MISSING if where == "text" else f"{MISSING}: {where}")
    return text


def file_rows(content: bytes, form: str) -> bytes:
    """Parse the rows of a file as training and stage=predict do.

    Args:
        content: file content.
        form: ``csv``, ``tsv``, or ``txt`` (one text per line).

    Returns:
        JSON: ``columns``, null for a list of texts; ``column``, the index of the column that most likely contains the
        texts; ``rows``; ``unreadable``, the number of skipped rows.

    Raises:
        RefusedError: for a file that cannot be read.
    """

    def has_text(names: list[str]) -> bool:
        if len(names) > MOST_COLUMNS:
            raise DataError(f"the file has more than {MOST_COLUMNS:,} columns")
        return any(name.strip().lower() in TEXT_COLUMNS for name in names)

    if sum(map(content.count, (b"\n", b"\r", b",", b";", b"\t", b"|"))) > MOST_FIELDS:
        raise RefusedError(413, f"the file has more than {MOST_FIELDS:,} fields; use stage=predict for it")
    columns: list[str] | None = None
    unreadable = 0
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"file.{form}"
        file.write_bytes(content)
        try:
            if form == "txt":
                with open_text(file)[0] as lines:
                    rows = [[line.rstrip("\r\n")] for line in lines]
            else:
                raw = readers.read(file, readers.PLAIN, has_text)
                columns = raw.columns()
                if len(columns) == 1 and not has_text(columns):  # a list of texts without a header
                    raw = readers.read(file, readers.PLAIN.model_copy(update={"header": False}), has_text)
                    columns = None
                readable = raw.frame.filter(raw.frame[readers.FATE].is_null())
                unreadable = raw.frame.height - readable.height
                rows = [list(row) for row in readable.select(raw.columns()).iter_rows()]
        except DataError as error:
            raise RefusedError(422, str(error).replace(f"{folder}/", "").removeprefix("data.files: ")) from None
    known = [number for number, name in enumerate(columns or []) if has_text([name])]
    sizes = [sum(len(cell or "") for cell in cells) for cells in zip(*rows[:50], strict=True)]
    column = known[0] if known else sizes.index(max(sizes)) if sizes else 0
    values = {"columns": columns, "column": column, "rows": rows, "unreadable": unreadable}
    return json.dumps(values, ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------ documentation

_ALLOWED = r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
Text = Annotated[
    str,
    Field(
        min_length=1,
        pattern=rf"^{_ALLOWED}*{_SIGN}{_ALLOWED}*$",
        description="The text to label. A text that is too long is truncated, which the response reports.",
        examples=["公司上半年净利润同比增长三成，超出市场预期。"],
    ),
]
Shares = dict[str, Annotated[float, Field(ge=0, le=1)]]
Milliseconds = Annotated[float, Field(ge=0, description="Milliseconds on the server.")]


class TextIn(BaseModel):
    """One text."""

    text: Text


class TextsIn(BaseModel):
    """Several texts."""

    texts: Annotated[list[Text], Field(min_length=1)]


class _Out(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LabeledText(_Out):
    """A text and its label with probabilities."""

    input: Annotated[str, Field(description="The text.")]
    prediction: Annotated[str, Field(description="The most probable label; or the labels that apply, or the number.")]
    probs: Annotated[Shares, Field(description="Probability by label, calibrated by the temperature of the run.")]
    truncated: Annotated[bool, Field(description="Whether the text was truncated.")]
    target: Annotated[str | None, Field(description="The target, if the model needs one.")] = None
    level: Annotated[float | None, Field(description="The expected level; only for ordered labels.")] = None
    number: Annotated[float | None, Field(description="The predicted number; only for regression.")] = None
    labels: Annotated[list[str] | None, Field(description="The labels that apply; only for several labels.")] = None
    abstain: Annotated[bool | None, Field(description="Whether the run is not sure enough; only with stage.risk.")] = (
        None
    )
    label_set: Annotated[list[str] | None, Field(description="The possible labels; only with stage.coverage.")] = None
    route: Annotated[Shares, Field(description="Weight by expert; only for a mixture of experts.")] = {}
    thoughts: Annotated[list[str] | None, Field(description="Written before the answer; only if the model thinks.")] = (
        None
    )


class PredictionOut(LabeledText):
    """The response to one text."""

    time_ms: Milliseconds


class PredictionsOut(_Out):
    """The responses to several texts, in order."""

    predictions: list[LabeledText]
    time_ms: Milliseconds


class StateOut(_Out):
    """The state of the service."""

    status: str


class ModelOut(_Out):
    """The served model."""

    name: Annotated[str, Field(description="Method, model and data; the format of an export.")]
    run: Annotated[str, Field(description="Name of the folder.")]
    labels: list[str]
    experts: Annotated[list[str], Field(description="Names of the experts of a mixture.")]
    base: Annotated[dict[str, str | None], Field(description="The base model; none for a classical method.")]
    demonstration: Annotated[
        str | None, Field(description="For the embedded model and generated rows: do not rely on the answers.")
    ]
    max_length: Annotated[int, Field(description="Tokens of prompt, text and answer.")]
    rows: Annotated[
        list[str], Field(description="Fields of rows that are accepted besides texts and read as in training.")
    ]
    target: Annotated[bool, Field(description="Whether a row needs a target besides its text.")]
    rule: Annotated[str, Field(description="How labels are scored.")]
    fingerprints: Annotated[
        dict[str, str | None], Field(description="Of the configuration, rows, template and labels.")
    ]
    git_commit: str | None
    versions: Annotated[dict[str, str | None], Field(description="Package versions of the run.")]
    finsa: Annotated[str | None, Field(description="Version of finsa that serves the model.")]
    limits: Annotated[dict[str, float], Field(description="Limits of a request.")]
    receipt: Annotated[
        dict[str, Any] | None, Field(description="How far answers in int8 differ from float32; none for other types.")
    ]


class ErrorOut(_Out):
    """An error response."""

    error: str
