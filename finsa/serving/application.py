"""The HTTP application: its addresses, what they answer, and how they are documented."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from finsa.config import ServeStage
from finsa.serving import page, schemas
from finsa.serving.batching import Answer, AnswerError, Batcher, FullError
from finsa.serving.metrics import CONTENT_TYPE, Measures
from finsa.serving.middleware import Gate
from finsa.serving.schemas import RefusedError

ABOUT = (
    "Labels with probabilities for financial texts. Requests and answers are JSON; every error is "
    '`{"error": "<reason>"}`.'
)


def build(
    batcher: Batcher,
    measures: Measures,
    served: dict[str, Any],
    stage: ServeStage,
    token: str | None,
    read: schemas.Read | None = None,
) -> Gate:
    """Make the application, behind its gate.

    Args:
        batcher: before the model; it runs while the application does.
        measures: of this service.
        served: what ``/model`` says.
        stage: the bounds.
        token: that clients must send; None: none.
        read: makes a text of a row in the form that the run was trained on; None: texts alone are taken.
    """

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)
        measures.close()

    app = FastAPI(
        title="finsa",
        version=served["finsa"] or "0",
        description=ABOUT,
        lifespan=running,
        docs_url=None,  # FastAPI's page loads its scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # it would repeat whatever host the client named
    )
    _answer_errors(app)
    _predict(app, batcher, measures, stage, token is not None, read)
    _watch(app, batcher, measures, served, token is not None)
    _pages(app, stage, served, token is not None)
    _describe(app, token is not None)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    seconds = 2 * stage.read_seconds + stage.answer_seconds
    return Gate(app, token, seconds, paths, measures)  # around FastAPI's own answers to errors as well


def _predict(
    app: FastAPI, batcher: Batcher, measures: Measures, stage: ServeStage, guarded: bool, read: schemas.Read | None
) -> None:
    statuses = [400, 408, 413, 415, 422, 500, 503, 504] + [401] * guarded

    async def body(request: Request) -> bytes:
        try:
            return await schemas.read(request.headers, request.stream(), stage.body_bytes, stage.read_seconds)
        except ClientDisconnect:
            raise RefusedError(400, "the connection was closed before the body had come") from None

    async def answers(request: Request, texts: Sequence[str]) -> list[Answer]:
        request.state.texts = len(texts)
        found = await _in_time(batcher, texts, stage.answer_seconds)
        measures.texts.inc(len(found))
        measures.truncated.inc(sum(answer.truncated for answer in found))
        for answer in found:
            measures.predictions.labels(answer.prediction).inc()
        return found

    @app.post(
        "/predict",
        summary="Label one text",
        response_model=schemas.PredictionOut,
        responses=_errors(*statuses),
        openapi_extra=_takes(schemas.TextIn, rows=read is not None),
    )
    async def predict(request: Request) -> Response:
        started = time.perf_counter()
        text = await asyncio.to_thread(schemas.one_text, await body(request), read)
        (answer,) = await answers(request, [text])
        return _json(schemas.prediction(text, answer, _ms(started)))

    @app.post(
        "/predict/batch",
        summary="Label several texts",
        response_model=schemas.PredictionsOut,
        responses=_errors(*statuses),
        openapi_extra=_takes(schemas.TextsIn, rows=read is not None, maxItems=stage.texts),
    )
    async def predict_batch(request: Request) -> Response:
        started = time.perf_counter()
        texts = await asyncio.to_thread(schemas.many_texts, await body(request), stage.texts, read)
        found = await answers(request, texts)
        return _json(schemas.predictions(texts, found, _ms(started)))


def _watch(app: FastAPI, batcher: Batcher, measures: Measures, served: dict[str, Any], guarded: bool) -> None:
    closed = _errors(*[401] * guarded)

    @app.get("/health", summary="Whether the process is alive", response_model=schemas.StateOut)
    async def health() -> Response:
        return _json({"status": "alive"})

    @app.get(
        "/ready", summary="Whether a request would be taken", response_model=schemas.StateOut, responses=_errors(503)
    )
    async def ready() -> Response:
        if not batcher.ready:
            raise RefusedError(503, "the queue is full, or the service is stopping", retry_after="1")
        return _json({"status": "ready"})

    @app.get("/model", summary="What is served", response_model=schemas.ModelOut, responses=closed)
    async def model() -> Response:
        return _json(served)

    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **closed},
    )
    async def metrics() -> Response:
        return Response(measures.exposition(), headers={"content-type": CONTENT_TYPE})


def _pages(app: FastAPI, stage: ServeStage, served: dict[str, Any], guarded: bool) -> None:
    start = page.start(stage, served, guarded)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(start.html, headers={"content-security-policy": start.policy})

    @app.get("/docs", include_in_schema=False)
    async def documentation(request: Request) -> Response:
        host, port = request.scope["server"]  # and not what the client calls it: that may be anything
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        docs = page.docs(app.openapi(), url)
        return HTMLResponse(docs.html, headers={"content-security-policy": docs.policy})


# ------------------------------------------------------------------------------------------------ what they share


async def _in_time(batcher: Batcher, texts: Sequence[str], seconds: float) -> list[Answer]:
    try:
        async with asyncio.timeout(seconds):
            return await batcher.answer(texts)
    except TimeoutError:
        raise RefusedError(504, f"no answer within {seconds:g} s") from None
    except FullError as full:
        reason = f"too many texts are waiting; come back in {full.seconds} s"
        raise RefusedError(503, reason, retry_after=str(full.seconds)) from None
    except AnswerError as failed:
        raise RefusedError(500, str(failed)) from None


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refusal(_: Request, error: RefusedError) -> Response:
        headers = {name.replace("_", "-"): value for name, value in error.headers.items()}
        return _json({"error": error.reason}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return _json({"error": str(error.detail)}, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return _json({"error": "an error of the service; its log says which"}, 500)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(content, status, headers)


def _ms(started: float) -> float:
    return 1000 * (time.perf_counter() - started)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorOut, "description": _REASONS[status]} for status in statuses}


_REASONS = {
    400: "No JSON, no text, an empty one, or one with control characters",
    401: "No token, or a wrong one",
    408: "The body came too slowly",
    413: "The body is too large, or has too many texts",
    415: "The body is not declared as JSON",
    422: "A value has the wrong type",
    500: "The model failed",
    503: "Too many texts are waiting; Retry-After says when to come back",
    504: "The model took too long",
}


def _takes(model: type[BaseModel], rows: bool, **last: Any) -> dict[str, Any]:
    """Document a body that the route reads itself.

    Args:
        model: of a body with texts; `last` goes to its one property.
        rows: whether rows are taken as well, as ``/model`` names them.
    """
    schema = model.model_json_schema()
    (key,) = schema["properties"]
    schema["properties"][key] |= last
    if rows:
        row: dict[str, Any] = {"type": "object", "description": "A row as the run was trained on, see /model."}
        if key == "texts":
            row = {
                "type": "object",
                "required": ["rows"],
                "properties": {"rows": {"type": "array", "items": row} | last},
            }
        schema = {"anyOf": [schema, row]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe(app: FastAPI, guarded: bool) -> None:
    """Say in the OpenAPI document where a token is asked for."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        if guarded:
            document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for operations in document["paths"].values():
                for operation in operations.values():
                    if "401" in operation["responses"]:
                        operation["security"] = [{"token": []}]
        return document

    app.openapi = described  # type: ignore[method-assign]
