"""The stage in a separate process, on a trained run: same predictions, clean stop, clear errors."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import commands
import httpx
import pytest
from few import FEW

from finsa.config import RunConfig, ServeStage, command_line, compose
from finsa.errors import ConfigError, RunError
from finsa.inference import predictor
from finsa.runs import run_folder
from finsa.serving import server
from finsa.session import Session
from finsa.stages import serve, train

Compose = Callable[..., RunConfig]
SHORT = (FEW, "train=smoke", "tracking=none", "stage.compare_base=false", "train.max_steps=12")


@pytest.fixture(scope="module")
def trained(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train.run(config(*SHORT, f"output_dir={tmp_path_factory.mktemp('runs')}")).run_dir
    assert folder is not None
    return folder


def test_answers_are_those_of_the_run(trained: Path, tmp_path: Path) -> None:
    kept = [json.loads(line) for line in (trained / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["text"] for row in kept]
    long = "大跌之后是大涨，" * 80
    said = predictor.restore(str(trained), 8192)([*texts, long])
    with commands.serving(tmp_path, f"run={trained}") as (process, client):
        batch = client.post("/predict/batch", json={"texts": [*texts, long]}).json()["predictions"]
        with ThreadPoolExecutor(16) as pool:
            singles = list(pool.map(lambda text: client.post("/predict", json={"text": text}).json(), texts))
        model = client.get("/model").json()
        process.signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert [answer["prediction"] for answer in batch[:-1]] == [row["label"] for row in kept]
    for number, (answer, row) in enumerate(zip(batch, said.probs, strict=True)):
        assert list(answer["probs"]) == list(said.labels)
        assert list(answer["probs"].values()) == pytest.approx(row.tolist(), abs=1e-4)
        assert answer["truncated"] is said.truncated[number]
    assert said.truncated[-1]
    for single, together in zip(singles, batch[:-1], strict=True):
        assert (single["input"], single["prediction"]) == (together["input"], together["prediction"])
        assert single["probs"] == pytest.approx(together["probs"], abs=1e-4)
    facts = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    assert model["labels"] == ["利空", "中性", "利好"]
    assert model["run"] == trained.name
    assert model["rule"] == facts["scoring"]
    assert model["fingerprints"]["label"] == facts["label_fingerprint"]
    assert str(tmp_path) not in json.dumps(model)
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["stage"], record["run"]) == ("complete", "serve", str(trained))
    assert len((folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()) == 61


def test_rows_are_read_as_training_read_them(instructed: tuple[Path, Path], tmp_path: Path) -> None:
    """Instruction rows, chats and plain texts; the input is rendered as in training."""
    run, files = instructed
    row = {"instruction": "判断情绪", "input": " 涨了 ", "history": [["在吗", "在"]]}
    chat = json.loads((files / "chats.json").read_text(encoding="utf-8"))[1]
    text = "user: 在吗\nassistant: 在\nuser: 判断情绪\n涨了"
    said = "system: 空\nuser: 乙第1条：跌跌跌1"
    with commands.serving(tmp_path, f"run={run}") as (_, client):
        one = client.post("/predict", json=row).json()
        several = client.post("/predict/batch", json={"rows": [row, chat]}).json()["predictions"]
        plain = client.post("/predict/batch", json={"texts": [text, said]}).json()["predictions"]
        refused = [
            client.post("/predict", json=content)
            for content in (
                {"instruction": "判断" * 400, "input": "涨"},
                {"messages": [{"role": "user"}]},
                {"x": 1},
                {},
            )
        ]
        rows = [client.post("/predict/batch", json={"rows": content}) for content in ([row, 3], [row, {"x": 1}], 3, [])]
        model = client.get("/model").json()
        bodies = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert [answer["input"] for answer in (one, *several)] == [text, text, said]
    assert several == plain
    assert one["probs"] == pytest.approx(several[0]["probs"], abs=1e-4)
    assert [(answer.status_code, answer.json()["error"]) for answer in (*refused, *rows)] == [
        (422, "no room for the input: the fixed part needs 401 tokens, but only 253 are available"),
        (422, "unreadable: a turn has no text"),
        (422, "has none of the fields text; instruction, input; messages or conversations"),
        (400, "Missing input text"),
        (422, "rows[1]: must be an object"),
        (422, "rows[1]: has none of the fields text; instruction, input; messages or conversations"),
        (422, "rows: must be a list of objects"),
        (400, "Missing input texts"),
    ]
    assert model["rows"] == ["instruction, input", "messages or conversations"]
    assert len(bodies["application/json"]["schema"]["anyOf"]) == 2


def test_a_stop_signal_lets_accepted_requests_finish(trained: Path, tmp_path: Path) -> None:
    texts = ["大跌之后是大涨，" * 30] * 100
    answers: list[Any] = []
    with commands.serving(tmp_path, f"run={trained}", "stage.batch=4") as (process, client):
        asking = threading.Thread(
            target=lambda: answers.append(client.post("/predict/batch", json={"texts": texts}, timeout=60))
        )
        asking.start()
        with httpx.Client(base_url=client.base_url, trust_env=False) as other:
            while "finsa_batch_texts_count 0" in other.get("/metrics").text:
                time.sleep(0.02)
        process.signal(signal.SIGTERM)
        asking.join(60)
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{client.base_url}/health", trust_env=False)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["predictions"]) == 100


# ------------------------------------------------------------------------------------------------ run selection


def test_without_a_run_the_message_shows_the_command() -> None:
    values, choices = compose.compose_values(["stage=serve"])
    with pytest.raises(Exception, match=r"stage=serve needs run=<a run folder or an export>, run=latest"):
        compose.build(values, choices, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=somewhere", "port=70000"], "port: "),
        (
            ["run=somewhere", "stage.token_env=geheim"],
            "must name an environment variable in capitals, such as FINSA_TOKEN",
        ),
        (["run=somewhere", "stage.queue=10"], "queue 10 has no room for a request of 1000 texts"),
        (["run=somewhere", "model=tiny"], "comes from the run folder"),
        (["port=8001", "stage=train"], "port is not used by stage=train"),
        (["stage=evaluate", "run=latest"], "run=latest only works with stage=serve"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        command_line.check(["stage=serve", *words] if not any("stage=" in word[:6] for word in words) else words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=nowhere"], "is not a run folder"),
        (["run=latest"], "run=latest: no finished training run below"),
        (["run=latest", "stage.token_env=FINSA_NO_SUCH_TOKEN"], "FINSA_NO_SUCH_TOKEN is not set; set it to the token"),
        (["run=latest", "stage.host=no.such.host.invalid"], "port: cannot listen on no.such.host.invalid:8000"),
    ],
)
def test_a_refused_command_leaves_no_files(config: Compose, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(RunError, match=re.escape(message)):
        serve.run(config("stage=serve", f"output_dir={tmp_path}", *words))
    assert list(tmp_path.iterdir()) == []


def test_an_unset_token_is_one_message(tmp_path: Path) -> None:
    words = ["stage=serve", "run=latest", "stage.token_env=FINSA_NO_SUCH_TOKEN", f"output_dir={tmp_path}"]
    done = commands.run(*words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: stage.token_env: the environment variable FINSA_NO_SUCH_TOKEN is not set")


def test_an_address_in_use_is_reported(config: Compose, trained: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cfg = config("stage=serve", f"run={trained}", f"port={taken.getsockname()[1]}", f"output_dir={tmp_path}")
        with pytest.raises(RunError, match=r"cannot listen on 127\.0\.0\.1:\d+ \(Address already in use\); choose ano"):
            serve.run(cfg)


def test_a_token_that_is_invalid_in_a_header_is_refused(config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = config("stage=serve", "run=latest", "stage.token_env=FINSA_TEST_TOKEN").stage
    assert isinstance(stage, ServeStage)
    monkeypatch.setenv("FINSA_TEST_TOKEN", " Geheim-1\n")
    assert server.token(stage.token_env) == "Geheim-1"
    for wrong in ("gehe im", "密码", "a\tb", " "):
        monkeypatch.setenv("FINSA_TEST_TOKEN", wrong)
        with pytest.raises(RunError, match="FINSA_TEST_TOKEN") as caught:
            server.token(stage.token_env)
        assert wrong.strip() == "" or wrong not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PACKAGES", ("fastapi", "no_such_package"))
    with pytest.raises(RunError, match=r'stage=serve needs no_such_package: pip install "finsa\[serve\]"'):
        serve.run(config("stage=serve", "run=latest"))


def test_latest_is_the_newest_finished_training_run(trained: Path, tmp_path: Path) -> None:
    facts = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    for name, changes in {
        "older": {"finished": "2026-01-01T00:00:00+00:00"},
        "newer": {"finished": "2026-01-02T00:00:00+00:00"},
        "failed": {"finished": "2026-01-03T00:00:00+00:00", "status": "failed"},
        "served": {"finished": "2026-01-03T00:00:00+00:00", "stage": "serve"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({**facts, **changes}), encoding="utf-8")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{", encoding="utf-8")
    assert run_folder.latest(str(tmp_path)) == tmp_path / "newer"


def test_the_default_is_trained_if_there_is_no_run_of_this_configuration(config: Compose, tmp_path: Path) -> None:
    given = (FEW, "train=smoke", "train.max_steps=1")
    with commands.serving(tmp_path, "run=default", *given) as (_, client):
        served = client.get("/model").json()["run"]
    (folder,) = tmp_path.glob("*_train_*")
    assert folder.name == served
    # From now on it is there.
    cfg = config("stage=serve", "run=default", *given, f"output_dir={tmp_path}")
    assert serve._source(cfg, Session()) == folder
