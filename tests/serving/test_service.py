"""The service over real connections: every path, batches, the bounded queue, the token, the log."""

from __future__ import annotations

import html
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from services import LABELS, SERVED, Reader, Service, serving, stage_of

from finsa.config import ROOT

Compose = Callable[..., Any]
LONG = "大跌之后是大涨，" * 80
TOKEN = "Geheim-0123456789"
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def service(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(stage_of(config), Reader(), tmp_path_factory.mktemp("service")) as running:
        yield running


def _expected(text: str) -> dict[str, float]:
    return {label: round(float(share), 6) for label, share in zip(LABELS, Reader.shares(text), strict=True)}


# ------------------------------------------------------------------------------------------------ addresses


def test_a_prediction_has_the_published_shape_and_more(service: Service) -> None:
    answer = service.client.post("/predict", json={"text": "股价大涨，涨停"})
    assert answer.status_code == 200
    content = answer.json()
    assert list(content) == ["input", "prediction", "time_ms", "probs", "truncated"]
    assert (content["input"], content["prediction"], content["truncated"]) == ("股价大涨，涨停", "利好", False)
    assert content["probs"] == _expected("股价大涨，涨停")
    assert 0 < content["time_ms"] < 5000


def test_a_batch_equals_single_predictions(service: Service) -> None:
    texts = ["大涨", "大跌", "  平  ", "a\nb\tc", "😀涨", LONG]
    batch = service.client.post("/predict/batch", json={"texts": texts}).json()
    singles = [service.client.post("/predict", json={"text": text}).json() for text in texts]
    for single in singles:
        del single["time_ms"]
    assert batch["predictions"] == singles
    assert [answer["truncated"] for answer in singles] == [False] * 5 + [True]


def test_unknown_keys_are_ignored(service: Service) -> None:
    assert service.client.post("/predict", json={"text": "大涨", "user": 1}).json()["prediction"] == "利好"


def test_state_and_model(service: Service) -> None:
    assert service.client.get("/health").json() == {"status": "alive"}
    assert service.client.get("/ready").json() == {"status": "ready"}
    assert service.client.get("/model").json() == SERVED


def test_metrics_count_requests_texts_and_calls(service: Service) -> None:
    before = {name: service.counted(name) for name in ("finsa_texts_total", "finsa_truncated_texts_total")}
    service.client.post("/predict/batch", json={"texts": ["大涨", LONG]})
    assert service.counted("finsa_texts_total") == before["finsa_texts_total"] + 2
    assert service.counted("finsa_truncated_texts_total") == before["finsa_truncated_texts_total"] + 1
    text = service.client.get("/metrics").text
    assert 'finsa_requests_total{path="/predict/batch",status="200"}' in text
    assert {"finsa_queue_texts 0.0", "finsa_refused_connections_total 0.0"} <= set(text.splitlines())
    assert "process_resident_memory_bytes" in text


def test_unknown_paths_share_one_counter(service: Service) -> None:
    for number in range(3):
        assert service.client.get(f"/nowhere{number}").json() == {"error": "Not Found"}
    assert 'finsa_requests_total{path="other",status="404"} 3.0' in service.client.get("/metrics").text


def test_errors_of_the_protocol_have_the_same_shape(service: Service) -> None:
    answer = service.client.get("/predict")
    assert (answer.status_code, answer.json(), answer.headers["allow"]) == (
        405,
        {"error": "Method Not Allowed"},
        "POST",
    )


def test_every_answer_has_the_security_headers(service: Service) -> None:
    for path in ("/", "/docs", "/health", "/missing", "/openapi.json"):
        headers = service.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none';")
        assert "unsafe" not in headers["content-security-policy"]
        assert "server" not in headers


def test_the_pages_load_nothing_from_other_hosts(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/predict", "/predict/batch", "/health", "/ready", "/model", "/metrics"}
    page = service.client.get("/docs").text
    assert all(path in page for path in document["paths"])
    assert "<script" not in page
    assert "https://" not in page


def test_the_examples_on_the_docs_page_run(service: Service, tmp_path: Path) -> None:
    blocks = re.findall(r'<code[^>]* class="language-(\w+)">(.*?)</code>', service.client.get("/docs").text, re.DOTALL)
    examples = {language: html.unescape(code) for language, code in blocks}
    assert set(examples) == {"bash", "python"}
    surroundings = {**os.environ, "NO_PROXY": "127.0.0.1", "PYTHONIOENCODING": "utf-8"}
    said = {
        language: subprocess.run(
            ["bash", "-c", code] if language == "bash" else [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            env=surroundings,
        ).stdout.decode()
        for language, code in examples.items()
    }
    assert json.loads(said["bash"])["prediction"] in LABELS
    assert [line.split()[0] in LABELS for line in said["python"].splitlines()] == [True, True]


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("form", "content", "expected"),
    [
        ("csv", 'id,新闻\n1,涨\n2,"跌,\n了"\n', (["id", "新闻"], 1, [["1", "涨"], ["2", "跌,\n了"]], 0)),
        ("csv", "id;标题\n1;涨\n", (["id", "标题"], 1, [["1", "涨"]], 0)),
        ("csv", "a,b\n1,涨了\n2,跌,了\n", (["a", "b"], 1, [["1", "涨了"]], 1)),
        ("csv", "涨了\n跌了\n", (None, 0, [["涨了"], ["跌了"]], 0)),
        ("tsv", "text\tid\n涨, 跌\t1\n", (["text", "id"], 0, [["涨, 跌", "1"]], 0)),
        ("txt", "涨, 跌\r\n\r\n平", (None, 0, [["涨, 跌"], [""], ["平"]], 0)),
    ],
)
def test_a_file_is_read_as_training_reads_it(
    service: Service, form: str, content: str, expected: tuple[Any, ...]
) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        answer = service.client.post(f"/file?form={form}", content=content.encode(encoding), headers=BINARY)
        assert answer.status_code == 200, answer.text
        assert tuple(answer.json().values()) == expected


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(config: Compose, tmp_path: Path) -> None:
    with serving(stage_of(config, file_bytes=1 << 20), Reader(), tmp_path) as service:
        for content, form, headers, status, reason in (
            (b"", "csv", BINARY, 422, "file.csv is empty"),
            (b"," * 900_000, "csv", BINARY, 422, "the file has more than 2,000 columns"),
            (b"\n" * 1_010_000, "csv", BINARY, 413, "the file has more than 1,000,000 fields"),
            (b"a,a\n1,2\n", "csv", BINARY, 422, "file.csv has the column 'a' more than once"),
            (b"a" * (1 << 21), "csv", BINARY, 413, "the request body may have at most 1048576 bytes"),
            (b"a", "xlsx", BINARY, 422, "the page reads csv, tsv and txt files"),
            (b"a", "csv", {"Content-Type": "text/plain"}, 415, "send the file with the header Content-Type"),
        ):
            answer = service.client.post(f"/file?form={form}", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"][: len(reason)]) == (status, reason)


def test_one_file_is_read_at_a_time(service: Service) -> None:
    head = b"POST /file HTTP/1.1\r\nHost: a\r\nContent-Type: application/octet-stream\r\nContent-Length: 20\r\n\r\nt"

    def half_sent() -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", service.port), timeout=5)
        connection.sendall(head)
        return connection

    def refused() -> bool:
        nonlocal connection
        if select.select([connection], [], [], 0)[0]:  # refused itself, because it came while another file was read
            connection.close()
            connection = half_sent()
        return service.client.post("/file", content=b"text\n1\n", headers=BINARY).status_code == 503

    connection = half_sent()
    try:
        _until(refused)
        answer = service.client.post("/file", content=b"text\n1\n", headers=BINARY)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    finally:
        connection.close()
    _until(lambda: service.client.post("/file", content=b"text\n1\n", headers=BINARY).status_code == 200)


# ------------------------------------------------------------------------------------------------ batching


def test_concurrent_requests_share_calls_and_get_the_right_answers(config: Compose, tmp_path: Path) -> None:
    texts = [f"第{number}条" + "涨" * (number % 5) + "跌" * (number % 3) for number in range(200)]
    with serving(stage_of(config), Reader(seconds=0.02), tmp_path) as service:
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda text: service.client.post("/predict", json={"text": text}).json(), texts))
        calls, rows = service.counted("finsa_batch_texts_count"), service.counted("finsa_batch_texts_sum")
    assert [answer["input"] for answer in answers] == texts
    assert [answer["probs"] for answer in answers] == [_expected(text) for text in texts]
    assert rows == 200
    assert calls < 60


def test_a_large_request_does_not_hold_up_a_small_one(config: Compose, tmp_path: Path) -> None:
    with serving(stage_of(config, batch=8), Reader(seconds=0.05), tmp_path) as service, ThreadPoolExecutor(1) as pool:
        large = pool.submit(service.client.post, "/predict/batch", json={"texts": ["大跌"] * 200})
        _until(lambda: service.counted("finsa_batch_texts_count") >= 1)
        assert service.client.post("/predict", json={"text": "大涨"}).json()["prediction"] == "利好"
        assert not large.done()
        assert [answer["prediction"] for answer in large.result().json()["predictions"]] == ["利空"] * 200


def test_very_long_texts_are_processed_one_at_a_time(config: Compose, tmp_path: Path) -> None:
    reader = Reader()
    reader.hold.clear()
    with serving(stage_of(config), reader, tmp_path) as service, ThreadPoolExecutor(8) as pool:
        first = pool.submit(service.client.post, "/predict", json={"text": "平"})
        _until(lambda: len(reader.calls) == 1)
        sent = [["涨" * 30_000, "跌", "涨" * 30_000], ["涨" * 30_000], ["跌"] * 3]
        answers = [pool.submit(service.client.post, "/predict/batch", json={"texts": texts}) for texts in sent]
        _until(lambda: service.counted("finsa_queue_texts") == 7)
        reader.hold.set()
        assert first.result().status_code == 200
        for texts, answer in zip(sent, answers, strict=True):
            assert [one["input"] for one in answer.result().json()["predictions"]] == texts
    long = [sum(len(text) > 20_000 for text in call) for call in reader.calls[1:]]
    assert long == [1, 1, 1]
    assert sum(map(len, reader.calls[1:])) == 7
    assert "跌" in reader.calls[1]


def test_a_full_queue_answers_with_retry_after(config: Compose, tmp_path: Path) -> None:
    reader = Reader()
    reader.hold.clear()
    with (
        serving(stage_of(config, batch=1, queue=4, texts=4), reader, tmp_path) as service,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(text: str) -> httpx.Response:
            return service.client.post("/predict", json={"text": text})

        first = pool.submit(ask, "大涨")
        _until(lambda: len(reader.calls) == 1)
        waiting = [pool.submit(ask, "大跌") for _ in range(4)]
        _until(lambda: service.counted("finsa_queue_texts") == 4)
        assert service.client.get("/ready").status_code == 503
        assert service.client.get("/health").status_code == 200
        refused = ask("平")
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "the queue is full; retry after" in refused.json()["error"]
        reader.hold.set()
        assert [answer.result().status_code for answer in [first, *waiting]] == [200] * 5
        assert service.client.get("/ready").status_code == 200


def test_an_answer_that_takes_too_long_is_a_timeout(config: Compose, tmp_path: Path) -> None:
    reader = Reader()
    reader.hold.clear()
    with serving(stage_of(config, answer_seconds=0.2), reader, tmp_path) as service:
        late = service.client.post("/predict", json={"text": "大涨"})
        assert (late.status_code, late.json()) == (504, {"error": "no answer within 0.2 s"})
        reader.hold.set()
        assert service.client.post("/predict", json={"text": "大涨"}).status_code == 200


def test_a_text_on_which_the_model_fails_fails_no_other_request(config: Compose, tmp_path: Path) -> None:
    reader = Reader(seconds=0.05, fails_on=("毒",))
    with serving(stage_of(config), reader, tmp_path) as service, ThreadPoolExecutor(8) as pool:
        texts = ["大涨", "毒", "大跌", "平", "涨", "跌"]
        answers = list(pool.map(lambda text: service.client.post("/predict", json={"text": text}), texts))
        assert [answer.status_code for answer in answers] == [200, 500, 200, 200, 200, 200]
        assert "the model failed" in answers[1].json()["error"]
        assert service.client.get("/ready").status_code == 200


def test_a_mixture_reports_its_expert_weights(config: Compose, tmp_path: Path) -> None:
    with serving(stage_of(config), Reader(experts=("news", "forum")), tmp_path) as service:
        assert service.client.post("/predict", json={"text": "大涨"}).json()["route"] == {"news": 0.25, "forum": 0.75}


# ------------------------------------------------------------------------------------------------ authentication


def test_a_token_is_required_for_predictions_and_model_facts(config: Compose, tmp_path: Path) -> None:
    with serving(stage_of(config), Reader(), tmp_path, TOKEN) as service:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        for headers in (
            {},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
            bearer | {"Authorization": f"Bearer {TOKEN}x"},
        ):
            refused = service.client.post("/predict", json={"text": "大涨"}, headers=headers)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert "send the token" in refused.json()["error"]
        assert service.client.post("/predict", json={"text": "大涨"}, headers=bearer).status_code == 200
        statuses = {path: service.client.get(path).status_code for path in ("/model", "/metrics", "/nowhere", "/file")}
        assert statuses == dict.fromkeys(statuses, 401)
        for path in ("/", "/docs", "/openapi.json", "/health", "/ready"):
            content = service.client.get(path)
            assert content.status_code == 200
            assert SERVED["name"] not in content.text
        document = service.client.get("/openapi.json").json()
        assert document["paths"]["/predict"]["post"]["security"] == [{"token": []}]


def test_the_log_has_times_and_no_texts(service: Service) -> None:
    service.client.post("/predict/batch", json={"texts": ["一条秘密消息", "另一条秘密消息"]})
    service.client.post("/predict", json={"text": ""})
    # A line is written once its answer has been sent.
    _until(lambda: service.log.read_text(encoding="utf-8").endswith("}\n") and '"texts": null' in _last(service.log))
    content = service.log.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in content.splitlines()]
    assert {"path": "/predict/batch", "status": 200, "texts": 2}.items() <= lines[-2].items()
    assert {"path": "/predict", "status": 400, "texts": None}.items() <= lines[-1].items()
    assert all(line.keys() == {"time", "path", "status", "texts", "ms"} for line in lines)
    assert "秘密" not in content


def test_the_log_is_rotated(config: Compose, tmp_path: Path) -> None:
    with serving(stage_of(config, log_bytes=1000), Reader(), tmp_path) as service:
        for _ in range(40):
            service.client.post("/predict", json={"text": "大涨"})
        _until(lambda: service.counted("finsa_requests_total") >= 40)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["requests.jsonl", "requests.jsonl.1"]
    assert all(file.stat().st_size <= 1000 for file in tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ connections


def test_connections_beyond_the_limit_get_status_503(config: Compose, tmp_path: Path) -> None:
    with serving(stage_of(config, connections=4), Reader(), tmp_path) as service:
        idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(4)]
        time.sleep(0.2)
        refused = httpx.post(f"{service.url}/predict", json={"text": "大涨"}, trust_env=False)
        assert (refused.status_code, refused.json()) == (503, {"error": "too many connections"})
        assert refused.headers["retry-after"] == "1"
        for connection in idle:
            connection.close()
        _until(lambda: httpx.get(f"{service.url}/health", trust_env=False).status_code == 200)


@pytest.mark.parametrize(
    "said", [b"", b"POST /predict HTT", b"POST /predict HTTP/1.1\r\nHost: a\r\n"], ids=["nothing", "a word", "a head"]
)
def test_an_idle_client_is_disconnected(config: Compose, tmp_path: Path, said: bytes) -> None:
    with serving(stage_of(config, read_seconds=0.3), Reader(), tmp_path) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
            connection.sendall(said)
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        assert service.client.get("/health").status_code == 200


def test_a_body_that_arrives_too_slowly_is_refused(config: Compose, tmp_path: Path) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
    with serving(stage_of(config, read_seconds=0.3), Reader(), tmp_path) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
            connection.sendall(head)
            answer = b"".join(iter(lambda: connection.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"the request body did not arrive within 0.3 s" in answer


def test_accepted_requests_are_answered_before_the_service_stops(config: Compose, tmp_path: Path) -> None:
    reader, answers = Reader(), list[int]()
    reader.hold.clear()
    with serving(stage_of(config, batch=1), reader, tmp_path) as service, ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            sent = pool.submit(httpx.post, f"{service.url}/predict", json={"text": "大涨"}, trust_env=False)
            sent.add_done_callback(lambda done: answers.append(done.result().status_code))
        _until(lambda: service.counted("finsa_queue_texts") == 5)
        threading.Timer(0.5, reader.hold.set).start()
    assert answers == [200] * 6


def _last(file: Path) -> str:
    return file.read_text(encoding="utf-8").splitlines()[-1]


def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize("page", ["docs/commands.md", "docs/commands_zh.md"])
def test_the_examples_of_the_documentation_run(service: Service, page: str) -> None:
    fences = re.findall(r"^```(bash|python)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    examples = {language: code for language, code in fences if "127.0.0.1:8000/predict" in code}
    assert set(examples) == {"bash", "python"}
    for language, code in examples.items():
        code = code.replace("http://127.0.0.1:8000", service.url)
        words = ["bash", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(words, capture_output=True, check=True, env={**os.environ, "NO_PROXY": "127.0.0.1"})
        assert any(label in done.stdout.decode() for label in LABELS)
