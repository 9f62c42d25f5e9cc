"""The chat client against a real HTTP server: what is sent, what is retried, what is fatal, what is only counted."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from endpoints import ChatServer, Reply, Request, failed, said

from finsa.config import Endpoint
from finsa.data.endpoint import CUT, KEPT, MALFORMED, REFUSED, Answer, Chat, Journal, Question, retry_after
from finsa.errors import RunError

KEY = "sk-Geheim-0123456789"


def _chat(url: str, folder: Path, **changes: Any) -> Chat:
    values = {
        "model": "qwen2.5:7b",
        "api_key_env": None,
        "temperature": 0.5,
        "seed": 40,
        "timeout": 60,
        "retries": 2,
        "backoff": 0.01,
        "workers": 3,
    }
    return Chat(Endpoint(url=url, **values | changes), "stage.paraphrase", Journal(folder / "answers.jsonl"))


def _questions(count: int) -> list[Question]:
    return [Question(f"问题{number}", number) for number in range(count)]


def _echo(request: Request) -> Reply:
    return said(f"答：{request.prompt}")


def _in_turn(*replies: Reply | None) -> Callable[[Request], Reply | None]:
    """Send replies one after the other, then repeat the last one."""
    left = list(replies)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


# ------------------------------------------------------------------------------------------------ requests


def test_a_request_follows_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with ChatServer(_echo) as server:
        answers = _chat(server.url + "/", tmp_path, api_key_env="MY_KEY").ask([Question("涨了吗？", 2)])
    (request,) = server.requests
    assert answers == [Answer("答：涨了吗？")]
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.payload == {
        "model": "qwen2.5:7b",
        "messages": [{"role": "user", "content": "涨了吗？"}],
        "temperature": 0.5,
        "seed": 42,
    }
    assert KEY not in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")


def test_null_values_are_not_sent(tmp_path: Path) -> None:
    with ChatServer(_echo) as server:
        _chat(server.url, tmp_path, temperature=None, seed=None).ask(_questions(1))
    assert set(server.requests[0].payload) == {"model", "messages"}
    assert "Authorization" not in server.requests[0].headers


def test_answers_keep_the_order_of_the_questions(tmp_path: Path) -> None:
    def reply(request: Request) -> Reply:
        return said(request.prompt, seconds=0.2 if request.prompt == "问题0" else 0)

    with ChatServer(reply) as server:
        answers = _chat(server.url, tmp_path).ask(_questions(20))
    assert [answer.text for answer in answers] == [f"问题{number}" for number in range(20)]
    journal = [json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    assert sorted(journal) == sorted(answer.text for answer in answers)
    assert journal[0] != "问题0", "the others did not wait for the slow one"


def test_equal_requests_are_sent_once_unless_their_numbers_differ(tmp_path: Path) -> None:
    with ChatServer(lambda request: said(str(request.payload["seed"]))) as server:
        answers = _chat(server.url, tmp_path).ask([Question("同", 0), Question("同", 1), Question("同", 0)])
    assert [answer.text for answer in answers] == ["40", "41", "40"]
    assert len(server.requests) == 2


# ------------------------------------------------------------------------------------------------ retries


@pytest.mark.parametrize("first", [failed(429), failed(408), failed(500), failed(503), None])
def test_a_temporary_failure_is_retried(tmp_path: Path, first: Reply | None) -> None:
    with ChatServer(_in_turn(first, said("好"))) as server:
        assert _chat(server.url, tmp_path).ask(_questions(1)) == [Answer("好")]
    assert len(server.requests) == 2


def test_wait_times_double(tmp_path: Path) -> None:
    with ChatServer(_in_turn(failed(500), failed(500), failed(500), said("好"))) as server:
        assert _chat(server.url, tmp_path, retries=3, backoff=0.1).ask(_questions(1)) == [Answer("好")]
    times = [request.at for request in server.requests]
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert [wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True)] == [True] * 3


def test_retry_after_takes_precedence(tmp_path: Path) -> None:
    with ChatServer(_in_turn(failed(429, Retry_After="0"), failed(503, Retry_After="0.3"), said("好"))) as server:
        assert _chat(server.url, tmp_path, backoff=60).ask(_questions(1)) == [Answer("好")]
    first, second, third = (request.at for request in server.requests)
    assert second - first < 50
    assert 0.3 <= third - second < 50


def test_repeated_status_500_ends_in_one_message(tmp_path: Path) -> None:
    with ChatServer(lambda request: failed(500, "model\nfell over")) as server, pytest.raises(RunError) as caught:
        _chat(server.url, tmp_path, workers=1).ask(_questions(9))
    assert str(caught.value) == (
        f"stage.paraphrase.url: {server.url} keeps failing (HTTP 500: model fell over); try later, or lower "
        f"stage.paraphrase.workers (attempts: 3). {KEPT}"
    )
    assert len(server.requests) == 3, "the other questions are not asked any more"
    assert not (tmp_path / "answers.jsonl").exists()


def test_an_unreachable_server_is_reported(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RunError) as caught:
        _chat(url, tmp_path).ask(_questions(2))
    assert str(caught.value).startswith(f"stage.paraphrase.url: {url} cannot be reached (")
    assert "Connection refused); start the server, or fix stage.paraphrase.url (attempts: 3)" in str(caught.value)


def test_a_server_timeout_is_reported(tmp_path: Path) -> None:
    with ChatServer(lambda request: said("好", seconds=0.5)) as server, pytest.raises(RunError) as caught:
        _chat(server.url, tmp_path, timeout=0.1, retries=0).ask(_questions(1))
    assert f"{server.url} gave no answer within 0.1 s; is it running? Otherwise raise stage.paraphrase.timeout" in str(
        caught.value
    )


def test_a_limit_that_lasts_for_hours_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    reply = failed(429, "quota", Retry_After="7200")
    with ChatServer(lambda request: reply) as server, pytest.raises(RunError, match="it asks to wait 7,200 s"):
        _chat(server.url, tmp_path).ask(_questions(1))
    assert time.monotonic() - began < 600
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("0", 0.0), ("3", 3.0), ("1.5", 1.5), ("-3", None), ("soon", None), ("nan", None), ("", None)],
)
def test_retry_after_in_seconds(header: str | None, seconds: float | None) -> None:
    assert retry_after(header) == seconds


def test_retry_after_as_a_date() -> None:
    now = datetime.now(UTC)
    assert retry_after(format_datetime(now - timedelta(hours=1), usegmt=True)) == 0.0
    assert 55 < (retry_after(format_datetime(now + timedelta(minutes=1), usegmt=True)) or 0) <= 60


# ------------------------------------------------------------------------------------------------ fatal errors


def test_a_wrong_key_is_reported_without_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def reply(request: Request) -> Reply:
        return failed(401, f"Incorrect API key provided: {request.headers['Authorization']}")

    with ChatServer(reply) as server, pytest.raises(RunError) as caught:
        _chat(server.url, tmp_path, api_key_env="MY_KEY").ask(_questions(1))
    assert str(caught.value) == (
        f"stage.paraphrase.api_key_env: {server.url} refuses the key; fix the key in MY_KEY "
        f"(HTTP 401: Incorrect API key provided: Bearer ***). {KEPT}"
    )
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (failed(401), "refuses to answer without a key; name the environment variable that contains it (HTTP 401)"),
        (failed(404, "no such model"), "or no model 'qwen2.5:7b'; fix url or model (HTTP 404: no such model)"),
        (failed(302, Location="http://x.cn/v1/chat/completions"), "redirects to http://x.cn/v1/chat/completions; set "),
        (failed(402, "Insufficient Balance"), "does not serve this request (HTTP 402: Insufficient Balance)"),
        (Reply(b"<html>\x1b[31mno</html>", 405), "does not serve this request (HTTP 405: <html> [31mno</html>)"),
    ],
)
def test_an_error_that_affects_every_request_stops_at_once(tmp_path: Path, reply: Reply, message: str) -> None:
    with ChatServer(lambda request: reply) as server, pytest.raises(RunError) as caught:
        _chat(server.url, tmp_path, workers=1).ask(_questions(5))
    assert message in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("value", "message"), [(None, "is not set"), (" ", "is not set"), ("ключ", "no key has"), ("a\nb", "no key has")]
)
def test_an_invalid_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(RunError, match="stage.paraphrase.api_key_env: the environment variable MY_KEY") as caught:
        _chat("http://localhost/v1", tmp_path, api_key_env="MY_KEY")
    assert message in str(caught.value)
    assert value is None or value == " " or value not in str(caught.value)


# ------------------------------------------------------------------------------------------------ counted errors


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>login</html>",
        b"{}",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"content": ["a"]}}]}',
        b'{"choices": [{"message": {"content": "\\ud83d"}}]}',
        b'{"choices": [{"message": {"content": "cut of',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_an_invalid_response_is_counted_and_requested_again_next_time(tmp_path: Path, body: bytes) -> None:
    with ChatServer(_in_turn(Reply(body), said("好"), said("涨"))) as server:
        chat = _chat(server.url, tmp_path, workers=1)
        assert chat.ask(_questions(2)) == [Answer("", MALFORMED), Answer("好")]
        assert chat.ask(_questions(2)) == [Answer("涨"), Answer("好")]
    assert len(server.requests) == 3


def test_a_body_that_is_not_what_its_header_says(tmp_path: Path) -> None:
    with ChatServer(lambda request: Reply(b"not gzip", headers={"Content-Encoding": "gzip"})) as server:
        assert _chat(server.url, tmp_path).ask(_questions(1)) == [Answer("", MALFORMED)]


def test_an_answer_truncated_by_the_limit_does_not_count(tmp_path: Path) -> None:
    with ChatServer(lambda request: said("涨停的", finish_reason="length")) as server:
        assert _chat(server.url, tmp_path).ask(_questions(1)) == [Answer("", CUT)]


def test_single_refused_questions_are_counted(tmp_path: Path) -> None:
    def reply(request: Request) -> Reply:
        return failed(400, "inappropriate content") if request.prompt in ("问题1", "问题3") else said("好")

    with ChatServer(reply) as server:
        answers = _chat(server.url, tmp_path).ask(_questions(6))
    assert Counter(answer.fault for answer in answers) == {None: 4, REFUSED: 2}
    assert [answers[1], answers[3]] == [Answer("", REFUSED)] * 2


def test_only_refusals_end_the_command(tmp_path: Path) -> None:
    with ChatServer(lambda request: failed(422, "temperature: unknown")) as server, pytest.raises(RunError) as caught:
        _chat(server.url, tmp_path, workers=1).ask(_questions(50))
    assert "refuses every question (HTTP 422: temperature: unknown)" in str(caught.value)
    assert len(server.requests) <= 6


# ------------------------------------------------------------------------------------------------ the journal


def test_a_failed_command_resumes_without_repeating_requests(tmp_path: Path) -> None:
    def fails_at_last(request: Request) -> Reply:
        return failed(500) if request.prompt == "问题5" else _echo(request)

    with ChatServer(fails_at_last) as server, pytest.raises(RunError):
        _chat(server.url, tmp_path, workers=1, retries=0).ask(_questions(8))
    with ChatServer(_echo) as again:
        chat = _chat(again.url, tmp_path)
        assert chat.journal.kept == 5
        assert [answer.text for answer in chat.ask(_questions(8))] == [f"答：问题{number}" for number in range(8)]
    assert sorted(request.prompt for request in again.requests) == ["问题5", "问题6", "问题7"]


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.6}, {"seed": 41}])
def test_an_answer_belongs_to_model_temperature_and_seed(tmp_path: Path, change: dict[str, Any]) -> None:
    with ChatServer(_echo) as server:
        _chat(server.url, tmp_path).ask(_questions(2))
        _chat(server.url, tmp_path, **change).ask(_questions(2))
    assert len(server.requests) == 4


@pytest.mark.parametrize("torn", [2, 9, 30])
def test_a_line_truncated_by_a_kill_loses_only_that_line(tmp_path: Path, torn: int) -> None:
    file = tmp_path / "answers.jsonl"
    journal = Journal(file)
    for number in range(3):
        journal.add(f"k{number}", f"涨\u2028{number}")
    file.write_bytes(file.read_bytes()[:-torn])
    repaired = Journal(file)
    assert repaired.answers == {"k0": "涨\u20280", "k1": "涨\u20281"}
    repaired.add("k3", "跌")
    assert Journal(file).answers == {**repaired.answers, "k3": "跌"}


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    with ChatServer(lambda request: said(request.prompt * 2_000)) as server:
        _chat(server.url, tmp_path, workers=16).ask(_questions(64))
    assert Counter(len(text) for text in Journal(tmp_path / "answers.jsonl").answers.values()) == {6_000: 10, 8_000: 54}
