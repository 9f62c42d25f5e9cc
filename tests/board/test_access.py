"""Who may use the board: the token, the name of the host, other sites, and files outside of the output folder."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from finsa.board import application
from finsa.board.commands import Scope
from finsa.config import RunConfig
from finsa.errors import ConfigError, RunError
from finsa.stages import board

Compose = Callable[..., RunConfig]
TOKEN = "Geheim-0123456789"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board") / "out"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "run.html").write_text("<p>a page</p>", encoding="utf-8")
    (folder / "run" / "weights.bin").write_bytes(b"secret")
    (folder.parent / "secret.json").write_text("{}", encoding="utf-8")
    (folder / "run" / "link.json").symlink_to(folder.parent / "secret.json")
    return folder


@pytest.fixture(scope="module")
def build(config: Compose, output: Path) -> Callable[..., TestClient]:
    cfg = config("stage=board", f"output_dir={output}")
    scope = Scope.of(cfg, cfg.stage, [])  # type: ignore[arg-type]
    opened = application.build(scope, cfg.stage, None)  # type: ignore[arg-type]

    def client(token: str | None, host: str = "127.0.0.1:7860") -> TestClient:
        access = application.Access(opened.app, token)
        return TestClient(access, base_url=f"http://{host}", follow_redirects=False)

    return client


def test_without_a_token_only_this_machine_is_answered(build: Callable[..., TestClient]) -> None:
    assert build(None).get("/", headers={"accept-language": "zh-CN,zh"}).headers["location"] == "/zh/"
    assert build(None, "localhost:7860").get("/").headers["location"] == "/en/"
    assert build(None, "[::1]:7860").get("/").status_code == 303
    for name in ("example.com:7860", "127.0.0.1.example.com", "localhost.example.com:7860"):
        assert build(None, name).get("/").status_code == 403


def test_other_sites_cannot_start_anything(build: Callable[..., TestClient]) -> None:
    client, path = build(None), "/en/gradio_api/queue/join"
    for headers in ({"origin": "http://example.com"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert client.post(path, json={}, headers=headers).status_code == 403
    assert client.post(path, json={}, headers={"origin": "http://127.0.0.1:7860"}).status_code == 422


def test_the_token_is_asked_for(build: Callable[..., TestClient]) -> None:
    client = build(TOKEN, "node7:7860")
    for path in ("/", "/en/", "/files/run/run.html", "/en/config"):
        refused = client.get(path)
        assert (refused.status_code, TOKEN in refused.text) == (401, False)
        assert refused.headers["www-authenticate"].startswith("Basic realm=")
    assert client.get("/en/config", auth=("any", TOKEN)).status_code == 200
    assert client.get("/en/config", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    for wrong in (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Basic x", "Basic", f"Digest {TOKEN}", ""):
        assert client.get("/en/config", headers={"authorization": wrong}).status_code == 401
    assert client.get("/en/config", auth=(TOKEN, "")).status_code == 401
    foreign = {"origin": "http://example.com"}  # a browser would send the token with it
    assert client.post("/en/gradio_api/queue/join", json={}, auth=("any", TOKEN), headers=foreign).status_code == 403


def test_files_outside_of_the_output_folder_cannot_be_read(build: Callable[..., TestClient], output: Path) -> None:
    client = build(None)
    page = client.get("/files/run/run.html")
    assert (page.status_code, page.text) == (200, "<p>a page</p>")
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts")
    names = [
        "run/weights.bin",
        "run/link.json",
        "../secret.json",
        "%2e%2e/secret.json",
        "run/%2e%2e/%2e%2e/secret.json",
    ]
    names += [str(output.parent / "secret.json"), "/" + str(output.parent / "secret.json"), "run", "", "run/none.json"]
    for name in names:
        assert client.get(f"/files/{name}").status_code == 404, name
    for name in (
        "/etc/passwd",
        str(output.parent / "secret.json"),
        str(output / "run" / "weights.bin"),
        "conf/config.yaml",
    ):
        assert client.get(f"/en/gradio_api/file={name}").status_code in (403, 404), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gradio's own statistics
def test_a_request_cannot_name_a_file_of_the_server_as_its_upload(
    build: Callable[..., TestClient], output: Path
) -> None:
    with build(None) as client:
        config = client.get("/en/config").json()
        ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        number = next(one["id"] for one in config["dependencies"] if ids["file"] in one["inputs"])
        file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        body: dict[str, Any] = {"data": [None, "", file], "fn_index": number, "session_hash": "abc"}
        assert client.post("/en/gradio_api/queue/join", json=body).status_code == 200
        done: dict[str, Any] = {}
        with client.stream("GET", "/en/gradio_api/queue/data?session_hash=abc") as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ") or "{}")
                done = message if message.get("msg") == "process_completed" else done
                if message.get("msg") == "close_stream":
                    break
    assert done["success"] is False
    assert "/etc/passwd" in done["output"]["error"]
    assert "root:" not in json.dumps(done)
    assert not list((output / ".board").rglob("passwd"))


def test_texts_are_complete_in_both_languages() -> None:
    english, chinese = application.texts()["en"], application.texts()["zh"]
    assert english.keys() == chinese.keys()
    assert all(english.values())
    assert all(chinese.values())


def test_bad_input_is_one_message(config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"host 0\.0\.0\.0 is open to other machines.*stage\.token_env=FINSA_TOKEN"):
        config("stage=board", "stage.host=0.0.0.0")
    monkeypatch.delenv("BOARD_TOKEN", raising=False)
    with pytest.raises(RunError, match="BOARD_TOKEN is not set"):
        board.run(config("stage=board", "stage.host=0.0.0.0", "stage.token_env=BOARD_TOKEN"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"port: cannot listen on 127\.0\.0\.1:{port} .*; choose another"):
            board.run(config("stage=board", f"port={port}"))
    monkeypatch.setattr(board, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r'stage=board needs gradio: pip install "finsa\[board\]"'):
        board.run(config("stage=board"))
