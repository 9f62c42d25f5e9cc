"""Requests of hostile clients: a 4xx with a reason, bounded memory, never a 500."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from services import Reader, Service, serving, stage_of

Compose = Callable[..., Any]
JSON = {"Content-Type": "application/json"}
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def service(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    reader = Reader()
    with serving(stage_of(config, texts=50), reader, tmp_path_factory.mktemp("hostile")) as running:
        yield running
        assert running.client.get("/ready").status_code == 200
    assert running.log.read_text(encoding="utf-8").count('"status": 500') == 0


def _post(service: Service, body: bytes, path: str = "/predict", **headers: str) -> tuple[int, str]:
    answer = service.client.post(path, content=body, headers=JSON | headers)
    content = answer.json()
    assert list(content) == ["error"]
    return answer.status_code, content["error"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "Missing input text"),
        (b"{}", 400, "Missing input text"),
        (b'{"text": null}', 400, "Missing input text"),
        (b'{"text": ""}', 400, "Missing input text"),
        ('{"text": " \\n\u3000"}'.encode(), 400, "Missing input text"),
        ('{"text": "\x85\ufeff\u2003"}'.encode(), 400, "Missing input text"),
        (b'{"text": 5}', 422, "text: must be a string"),
        (b'{"text": ["a"]}', 422, "text: must be a string"),
        (b'{"text": {"text": "a"}}', 422, "text: must be a string"),
        (b"null", 422, 'the request body must be an object with the key "text"'),
        (b'["text"]', 422, 'the request body must be an object with the key "text"'),
        (b"text=a", 400, "the request body is not valid JSON: "),
        (b'{"text": "a"', 400, "the request body is not valid JSON: "),
        (b'{"text": "a"} x', 400, "the request body is not valid JSON: "),
        (b'{"text": "\xff\xfe"}', 400, "the request body is not valid JSON: "),
        ("涨".encode("gb18030").join([b'{"text": "', b'"}']), 400, "the request body is not valid JSON: "),
        (b'{"text": "\xed\xa0\x80"}', 400, "the request body is not valid JSON: "),
        (b'{"text": "\\ud800"}', 400, "the request body is not valid JSON: "),
        (b'{"text": "\\udc00\\ud800"}', 400, "the request body is not valid JSON: "),
        (b'{"text": "a\x00"}', 400, "the request body is not valid JSON: "),
        (b'{"text": "a\\u0000b"}', 400, "text: contains the control character U+0000 at position 1"),
        (b'{"text": "\\u001b[31mred"}', 400, "text: contains the control character U+001B at position 0"),
        (b'{"text": ' + b"9" * 100_000 + b"}", 400, "the request body is not valid JSON: "),
        (b'{"text": 1e999}', 422, "text: must be a string"),
        (b'{"text": NaN}', 400, "the request body is not valid JSON: "),
        (b"[" * 500_000, 400, "the request body is not valid JSON: recursion limit exceeded"),
        (b'{"text":' * 100_000, 400, "the request body is not valid JSON: recursion limit exceeded"),
        (b'{"text": [' + b"[]," * 300_000 + b"[]]}", 422, "text: must be a string"),
        (b'{"text": "' + b"a" * MEBIBYTE + b'"}', 413, "the request body may have at most 1048576 bytes"),
    ],
)
def test_a_bad_body_is_refused_with_the_reason(service: Service, body: bytes, status: int, reason: str) -> None:
    told, said = _post(service, body)
    assert told == status
    assert said.startswith(reason)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "Missing input texts"),
        (b'{"texts": []}', 400, "Missing input texts"),
        (b'{"texts": "a"}', 422, "texts: must be a list of strings"),
        (b'{"texts": ["a", ""]}', 400, "Missing input text: texts[1]"),
        (b'{"texts": ["a", null]}', 400, "Missing input text: texts[1]"),
        (b'{"texts": ["a", 1]}', 422, "texts[1]: must be a string"),
        (json.dumps({"texts": ["a"] * 51}).encode(), 413, "texts: 51 are too many; at most 50 are allowed per request"),
        (b'{"texts": [' + b"1," * 500_000 + b"1]}", 413, "texts: 500001 are too many"),
    ],
)
def test_a_bad_batch_is_refused_with_the_reason(service: Service, body: bytes, status: int, reason: str) -> None:
    told, said = _post(service, body, "/predict/batch")
    assert told == status
    assert said.startswith(reason)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_with_another_content_type_is_refused(service: Service, kind: str) -> None:
    answer = service.client.post("/predict", content=b'{"text": "a"}', headers={"Content-Type": kind})
    assert (answer.status_code, list(answer.json())) == (415, ["error"])


def test_a_declared_length_is_refused_before_a_byte_is_read(service: Service) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {10**11}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_of_100_megabytes_takes_no_memory(service: Service, chunked: bool) -> None:
    before = service.counted("process_resident_memory_bytes")
    block = b"a" * MEBIBYTE

    def blocks() -> Iterator[bytes]:
        for _ in range(100):
            yield block

    headers = JSON if chunked else {**JSON, "Content-Length": str(100 * MEBIBYTE)}
    answer = service.client.post("/predict", content=blocks(), headers=headers)
    assert answer.status_code == 413
    assert service.counted("process_resident_memory_bytes") - before < 30 * MEBIBYTE


@pytest.mark.parametrize(
    "head",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 400_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: a\r\n" * 100_000 + b"\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["no HTTP", "TLS", "a long header", "many headers", "two lengths", "a negative length"],
)
def test_invalid_http_is_answered_with_400(service: Service, head: bytes) -> None:
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=5)
    # It may hang up while a long head is still coming.
    with connection, suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert service.client.get("/health").status_code == 200


def test_a_client_that_disconnects_early_is_not_a_server_error(service: Service) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head)
    for _ in range(100):
        if 'finsa_requests_total{path="/predict",status="400"}' in service.client.get("/metrics").text:
            break
        time.sleep(0.02)
    assert 'status="500"' not in service.client.get("/metrics").text


@pytest.mark.parametrize("path", ["/predict/", "/%ff", "/..%2f..%2fetc/passwd", "/%00", "//", "/docs/../model/"])
def test_other_paths_are_not_found(service: Service, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: evil.invalid\r\nConnection: close\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"evil" not in answer


def test_thousands_of_connections_are_survived(service: Service) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 20_000), most))  # both ends are in this process
    crowd = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(3000)]
    assert service.client.get("/health").status_code == 200
    assert service.counted("finsa_refused_connections_total") >= 2000
    for connection in crowd:
        connection.close()
    assert httpx.post(f"{service.url}/predict", json={"text": "涨"}, trust_env=False).status_code in (200, 503)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "texts", "\x00"]), inner),
    max_leaves=12,
)
BODIES = (
    st.builds(lambda value: json.dumps(value).encode(), VALUES | st.fixed_dictionaries({"text": VALUES}))
    | st.builds(lambda texts: json.dumps({"texts": texts}).encode(), st.lists(VALUES, max_size=5) | VALUES)
    | st.binary(max_size=300)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, path=st.sampled_from(["/predict", "/predict/batch"]))
def test_no_body_is_a_server_error(service: Service, body: bytes, path: str) -> None:
    answer = service.client.post(path, content=body, headers=JSON)
    assert answer.status_code in (200, 400, 413, 422)
    if answer.status_code != 200:
        assert answer.json()["error"]
    else:
        sent = json.loads(body)
        given = sent["text"] if path == "/predict" else sent["texts"]
        content = answer.json()
        assert given == (content["input"] if path == "/predict" else [one["input"] for one in content["predictions"]])


def test_the_service_matches_its_openapi_document(service: Service) -> None:
    settings_ = SchemathesisConfig.from_dict({"generation": {"max-examples": 12, "no-shrink": True}})
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json", config=settings_)
    checked = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
        )
        @given(case=operation.as_strategy())
        def holds(case: Any) -> None:
            case.call_and_validate(base_url=service.url)

        holds()
        checked += 1
    assert checked == 6
