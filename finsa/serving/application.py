"""The HTTP application: routes, pages and their documentation."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from markupsafe import Markup
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from finsa.config import ServeStage
from finsa.evaluation import pages
from finsa.serving import schemas
from finsa.serving.batching import Answer, Batcher, ModelFailedError, QueueFullError
from finsa.serving.middleware import Metrics, Middleware
from finsa.serving.schemas import RefusedError

TEMPLATES = Path(__file__).parent / "templates"
ABOUT = (
    "Labels with probabilities for financial texts. Requests and answers are JSON; every error is "
    '`{"error": "<reason>"}`.'
)
ERRORS = {
    400: "Invalid JSON, a missing or empty text, or control characters in a text",
    401: "Missing or invalid token",
    408: "The request body arrived too slowly",
    413: "The request body is too large or has too many texts",
    415: "The Content-Type is not application/json",
    422: "A value has the wrong type",
    500: "The model failed",
    503: "The queue is full; retry after the number of seconds in Retry-After",
    504: "The model took too long",
}


def build(
    batcher: Batcher,
    metrics: Metrics,
    served: dict[str, Any],
    stage: ServeStage,
    token: str | None,
    read: schemas.Read | None = None,
) -> Middleware:
    """Build the application.

    Args:
        batcher: in front of the model; runs as long as the application.
        metrics: of this service.
        served: the response of ``/model``.
        stage: the limits.
        token: required from clients; None: no authentication.
        read: extracts the text of a row in the format of the run's training data; None: only texts are accepted.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)
        metrics.close()

    app = FastAPI(
        title="finsa",
        version=served["finsa"] or "0",
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the host given by the client
    )
    _handle_errors(app)
    needs_token = token is not None
    statuses = [400, *[401] * needs_token, 408, 413, 415, 422, 500, 503, 504]

    async def body(request: Request, kind: str = "application/json", most: int = stage.body_bytes) -> bytes:
        try:
            return await schemas.read_body(request.headers, request.stream(), kind, most, stage.read_seconds)
        except ClientDisconnect:
            raise RefusedError(400, "the connection was closed before the body had arrived") from None

    async def answer(request: Request, texts: Sequence[str]) -> list[Answer]:
        request.state.texts = len(texts)  # for the log
        try:
            async with asyncio.timeout(stage.answer_seconds):
                answers = await batcher.answer(texts)
        except TimeoutError:
            raise RefusedError(504, f"no answer within {stage.answer_seconds:g} s") from None
        except QueueFullError as error:
            raise RefusedError(503, str(error), retry_after=str(error.seconds)) from None
        except ModelFailedError as error:
            raise RefusedError(500, str(error)) from None
        metrics.texts.inc(len(answers))
        metrics.truncated.inc(sum(one["truncated"] for one in answers))
        for one in answers:
            for label in ["number"] if "number" in one else one.get("labels", [one["prediction"]]):
                metrics.predictions.labels(label).inc()
        return answers

    def given(text: str) -> dict[str, str]:
        """The text of a request, and its target, which is the first line of what was read."""
        target, _, rest = text.partition("\n")
        return {"input": rest, "target": target} if served["target"] else {"input": text}

    @app.post(
        "/predict",
        summary="Label one text",
        response_model=schemas.PredictionOut,
        responses=_errors(statuses),
        openapi_extra=_request_body(schemas.TextIn, rows=read is not None, texts=not served["target"]),
    )
    async def predict(request: Request) -> Response:
        started = time.perf_counter()
        text = await asyncio.to_thread(schemas.one_text, await body(request), read, served["target"])
        (prediction,) = await answer(request, [text])
        label = prediction.pop("prediction")
        return JSONResponse({**given(text), "prediction": label, "time_ms": _milliseconds(started), **prediction})

    @app.post(
        "/predict/batch",
        summary="Label several texts",
        response_model=schemas.PredictionsOut,
        responses=_errors(statuses),
        openapi_extra=_request_body(
            schemas.TextsIn, rows=read is not None, texts=not served["target"], maxItems=stage.texts
        ),
    )
    async def predict_batch(request: Request) -> Response:
        started = time.perf_counter()
        texts = await asyncio.to_thread(schemas.many_texts, await body(request), stage.texts, read, served["target"])
        answers = await answer(request, texts)
        predictions = [{**given(text), **one} for text, one in zip(texts, answers, strict=True)]
        return JSONResponse({"predictions": predictions, "time_ms": _milliseconds(started)})

    reading = asyncio.Lock()  # files are read one at a time, to limit memory

    @app.post("/file", include_in_schema=False)
    async def file(request: Request, form: str = "csv") -> Response:
        """Parse an uploaded file for the page."""
        if form not in ("csv", "tsv", "txt"):
            raise RefusedError(422, "the page reads csv, tsv and txt files; stage=predict reads more formats")
        if reading.locked():
            raise RefusedError(503, "another file is being read; retry after 1 s", retry_after="1")
        async with reading:
            content = await body(request, "application/octet-stream", stage.file_bytes)
            rows = await asyncio.to_thread(schemas.file_rows, content, form)
        return Response(rows, media_type="application/json")

    @app.get("/health", summary="Whether the process is alive", response_model=schemas.StateOut)
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get(
        "/ready",
        summary="Whether a request would be accepted",
        response_model=schemas.StateOut,
        responses=_errors([503]),
    )
    async def ready() -> Response:
        if not batcher.ready:
            raise RefusedError(503, "the queue is full, or the service is stopping", retry_after="1")
        return JSONResponse({"status": "ready"})

    @app.get(
        "/model", summary="The served model", response_model=schemas.ModelOut, responses=_errors([401] * needs_token)
    )
    async def model() -> Response:
        return JSONResponse(served)

    @app.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_errors([401] * needs_token)},
    )
    async def exposition() -> Response:
        return Response(metrics.exposition(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    start = start_page(stage, served, needs_token)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(start.body, headers=dict(start.headers))

    @app.get("/docs", include_in_schema=False)
    async def documentation(request: Request) -> Response:
        host, port = request.scope["server"]  # not the host given by the client, which may be anything
        operations = [
            (method.upper(), path, operation)
            for path, methods in app.openapi()["paths"].items()
            for method, operation in methods.items()
        ]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return _page("docs.html.j2", operations=operations, url=url)

    if needs_token:
        _document_token(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    seconds = 2 * stage.read_seconds + stage.answer_seconds
    return Middleware(app, token, seconds, paths, metrics)  # also wraps FastAPI's error handlers


def _milliseconds(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 2)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        headers = {name.replace("_", "-"): value for name, value in error.headers.items()}
        return JSONResponse({"error": error.reason}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": "internal error; see the server's log"}, 500)


# ------------------------------------------------------------------------------------------------ pages


def start_page(stage: ServeStage, served: dict[str, Any], needs_token: bool) -> HTMLResponse:
    """The page at ``/``; if a token is required, it shows nothing about the model."""
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    return _page(
        "page.html.j2",
        script,
        stage=stage,
        served=None if needs_token else served,
        targeted=served["target"],
        needs_token=needs_token,
    )


def _page(name: str, script: str = "", **values: Any) -> HTMLResponse:
    """Render a single-file page, with a Content-Security-Policy that lets it load nothing else."""

    def source(content: str) -> str:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        return f"'sha256-{digest}'" if content else "'none'"

    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    html = pages.environment(TEMPLATES).get_template(name).render(script=Markup(script), style=Markup(style), **values)
    policy = (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers={"content-security-policy": policy})


# ------------------------------------------------------------------------------------------------ documentation


def _errors(statuses: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorOut, "description": ERRORS[status]} for status in statuses}


def _request_body(model: type[BaseModel], rows: bool, texts: bool = True, **last: Any) -> dict[str, Any]:
    """OpenAPI documentation of a request body that the route parses itself.

    Args:
        model: schema of a body with texts.
        rows: whether rows are also accepted, as documented by ``/model``.
        texts: whether texts are accepted without a target.
        last: added to the schema of the model's property.
    """
    schema = model.model_json_schema()
    (key,) = schema["properties"]
    schema["properties"][key] |= last
    if rows:
        row: dict[str, Any] = {"type": "object", "description": "A row in the format of the training data; see /model."}
        if key == "texts":
            items = {"rows": {"type": "array", "items": row} | last}
            row = {"type": "object", "required": ["rows"], "properties": items}
        schema = {"anyOf": [schema, row]} if texts else row
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _document_token(app: FastAPI) -> None:
    """Mark the operations that require a token in the OpenAPI document."""
    document = app.openapi()
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for operations in document["paths"].values():
        for operation in operations.values():
            if "401" in operation["responses"]:
                operation["security"] = [{"token": []}]
