"""Scores of a server are those of the run: llama_cpp.server, a real process, and the protocol of vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import commands
import llama
import polars as pl
import pytest
import torch
from endpoints import ChatServer, Reply, Request, failed

from finsa.config import RunConfig
from finsa.errors import ConfigError, DataError, RunError
from finsa.inference import predictor
from finsa.stages import export, predict, train

Compose = Callable[..., RunConfig]
Trained = Callable[..., Path]
ROWS = 60
BACKEND = ("stage=predict", "stage.backend=openai", "stage.retries=0", "stage.chunk=16", "train.threads=1")


@pytest.fixture(scope="module")
def run(trained: Trained) -> Path:
    return trained("lora_response")


@pytest.fixture(scope="module")
def table(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.csv"
    rows = pl.read_csv(project / "data" / "sample" / "test.csv").head(ROWS).select("id", "text")
    rows.with_columns(source=pl.Series(["forum", "news", "blog"] * (ROWS // 3))).write_csv(file)
    return file


@pytest.fixture(scope="module")
def local(config: Compose, run: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What the run itself predicts."""
    output = tmp_path_factory.mktemp("local") / "out.csv"
    predict.run(config("stage=predict", f"run={run}", f"input={table}", f"output={output}"))
    return pl.read_csv(output)


@pytest.fixture(scope="module")
def served(config: Compose, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of llama_cpp.server with the run as a GGUF file, for clients with the key `sesame`."""
    folder = tmp_path_factory.mktemp("served")
    words = ("stage.rows=8", "stage.timed=1", f"output={folder / 'gguf'}")
    export.run(config("stage=export", f"run={run}", "format=gguf", *words))
    with llama.server(folder / "gguf" / "model.gguf", "tiny", folder, "--api_key", "sesame") as url:
        yield url


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    monkeypatch.setenv("OTHER_KEY", "mustard")


class Vllm:
    """The completions of vLLM with the weights of a run: token ids in, log-probabilities of the prompt out.

    Args:
        run: the folder.
        echoes: in the form of ``echo`` instead of ``prompt_logprobs``.
    """

    def __init__(self, run: Path, echoes: bool = False) -> None:
        self.model = predictor.restore(str(run), 4096).model
        self.echoes = echoes
        self.models: list[str] = []

    @torch.inference_mode()
    def __call__(self, request: Request) -> Reply:
        self.models.append(request.payload["model"])
        assert self.model is not None
        choices = []
        for index, ids in enumerate(request.payload["prompt"]):
            logits = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            values = [None, *(logits[at, token].item() for at, token in enumerate(ids[1:]))]
            choice: dict[str, Any] = {"index": index, "text": "", "finish_reason": "length"}
            if self.echoes:
                choice["logprobs"] = {"token_logprobs": [*values, -1.0], "tokens": [*map(str, ids), "x"]}
            else:
                pairs = zip(ids, values, strict=True)
                entries = [None if value is None else {str(token): {"logprob": value}} for token, value in pairs]
                choice["prompt_logprobs"] = entries
            choices.append(choice)
        return Reply(json.dumps({"choices": choices}).encode())


@contextmanager
def endpoint(reply: Any, *names: str) -> Iterator[ChatServer]:
    """A server that also lists models."""
    with ChatServer(reply) as server:
        handler = server._server.RequestHandlerClass

        def listed(self: Any) -> None:
            body = json.dumps({"data": [{"id": name} for name in names]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        handler.do_GET = listed  # type: ignore[attr-defined]
        yield server


def _columns(found: pl.DataFrame) -> list[str]:
    return [name for name in found.columns if name.startswith("p_")]


@llama.needed
def test_a_llama_cpp_server_scores_as_the_run_does(
    config: Compose, run: Path, table: Path, local: pl.DataFrame, served: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.csv"
    words = (f"run={run}", f"input={table}", f"output={output}", f"stage.url={served}", "stage.api_key_env=MY_KEY")
    predict.run(config(*BACKEND, *words, "stage.receipt=20"))
    found = pl.read_csv(output)
    assert found.drop(_columns(found)).equals(local.drop(_columns(local)))
    for name in _columns(local):
        assert found[name].to_list() == pytest.approx(local[name].to_list(), abs=1e-3)
    assert len(set(found["label"])) > 1
    receipt = json.loads((tmp_path / "out.csv.receipt.json").read_text())
    assert (receipt["rows"], receipt["agreement"], receipt["model"], receipt["sent"]) == (20, 1.0, "tiny", "text")
    assert receipt["largest_difference"] < 1e-3
    assert receipt["prompts_with_other_tokens"] == 0


@llama.needed
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stage.api_key_env=OTHER_KEY", "stage.api_key_env: .* refuses the key; fix the key in OTHER_KEY"),
        ("stage.api_key_env=null", "refuses to answer without a key; name the environment variable that contains it"),
        ("stage.model=tine stage.api_key_env=MY_KEY", "has no model 'tine'. Did you mean 'tiny'"),
        ("stage.url=http://127.0.0.1:9/v1", "cannot be reached .*; start the server, or fix stage.url"),
    ],
)
def test_a_wrong_server_is_one_message_and_nothing_is_written(
    config: Compose, run: Path, table: Path, served: str, tmp_path: Path, words: str, message: str
) -> None:
    files = (f"run={run}", f"input={table}", f"output={tmp_path / 'out.csv'}", f"stage.url={served}")
    with pytest.raises(RunError, match=message):
        predict.run(config(*BACKEND, *files, *words.split()))
    assert not list(tmp_path.iterdir())


@llama.needed
def test_the_service_answers_with_the_scores_of_a_server(run: Path, served: str, tmp_path: Path) -> None:
    words = (f"run={run}", "stage.backend=openai", f"stage.url={served}", "stage.api_key_env=MY_KEY")
    text = "公司净利润同比增长三成"
    with commands.serving(tmp_path, *words) as (_, client):
        answer = client.post("/predict", json={"text": text}).json()
    wanted = predictor.restore(str(run), 4096)([text])
    assert answer["prediction"] == wanted.predicted[0]
    assert list(answer["probs"].values()) == pytest.approx(wanted.probs[0].tolist(), abs=1e-3)


@pytest.mark.parametrize("echoes", [False, True])
def test_token_ids_are_sent_in_batches_to_a_server_that_accepts_them(
    config: Compose, run: Path, table: Path, local: pl.DataFrame, tmp_path: Path, echoes: bool
) -> None:
    output = tmp_path / "out.csv"
    with endpoint(Vllm(run, echoes), "base") as server:
        words = (f"run={run}", f"input={table}", f"output={output}", f"stage.url={server.url}", "stage.prompts=4")
        predict.run(config(*BACKEND, *words))
        sent = [request.payload["prompt"] for request in server.requests]
    assert {len(prompts) for prompts in sent[2:]} <= {2, 4}
    assert sum(map(len, sent)) >= 3 * ROWS
    found = pl.read_csv(output)
    for name in _columns(local):
        assert found[name].to_list() == pytest.approx(local[name].to_list(), abs=1e-5)
    assert json.loads((tmp_path / "out.csv.receipt.json").read_text())["sent"] == "token ids"


def test_a_column_chooses_the_adapter_of_a_row(
    config: Compose, run: Path, table: Path, local: pl.DataFrame, tmp_path: Path
) -> None:
    output, vllm = tmp_path / "out.csv", Vllm(run)
    with endpoint(vllm, "lora_forum", "lora_news") as server:
        words = (f"run={run}", f"input={table}", f"output={output}", f"stage.url={server.url}")
        chosen = ("stage.adapter_column=source", "stage.adapters={forum:lora_forum,news:lora_news}")
        predict.run(config(*BACKEND, *words, *chosen))
    found = pl.read_csv(output)
    assert set(zip(found["source"], found["route"], strict=True)) == {("forum", "lora_forum"), ("news", "lora_news")}
    kept = local.filter(pl.col("source") != "blog")
    for name in _columns(local):
        assert found[name].to_list() == pytest.approx(kept[name].to_list(), abs=1e-5)
    rejected = [json.loads(line) for line in (tmp_path / "out.csv.rejected.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rejected} == {"stage.adapters has no model for source=blog"}
    assert len(rejected) == ROWS // 3
    assert set(vllm.models) == {"lora_forum", "lora_news"}


def test_a_server_that_fails_keeps_written_rows_and_the_command_resumes(
    config: Compose, run: Path, table: Path, local: pl.DataFrame, tmp_path: Path
) -> None:
    output, vllm, asked = tmp_path / "out.csv", Vllm(run), list[int]()

    def fails_later(request: Request) -> Reply:
        asked.append(1)
        return failed(503, "overloaded") if len(asked) > 14 else vllm(request)

    words = (
        f"run={run}",
        f"input={table}",
        f"output={output}",
        "stage.receipt=0",
        "stage.workers=1",
        "stage.prompts=8",
    )
    with (
        endpoint(fails_later, "base") as server,
        pytest.raises(RunError, match=r"keeps failing \(HTTP 503: overloaded\).* Rows that are written stay"),
    ):
        predict.run(config(*BACKEND, *words, f"stage.url={server.url}"))
    assert len(list((tmp_path / "out.csv.partial").glob("chunk-*"))) == 1
    with endpoint(vllm, "base") as server:
        predict.run(config(*BACKEND, *words, f"stage.url={server.url}"))
        assert len(server.requests) < 3 + 3 * ROWS / 8
    assert pl.read_csv(output)["label"].to_list() == local["label"].to_list()


def test_another_model_fails_the_receipt_and_nothing_is_predicted(
    config: Compose, run: Path, trained: Trained, table: Path, tmp_path: Path
) -> None:
    base = Vllm(run)
    base.model = base.model.unload() if hasattr(base.model, "unload") else base.model  # without its adapter
    with endpoint(base, "base") as server:
        words = (f"run={run}", f"input={table}", f"output={tmp_path / 'out.csv'}", f"stage.url={server.url}")
        with pytest.raises(RunError, match=r"below stage.agreement=0.995: base there is another model than"):
            predict.run(config(*BACKEND, *words))
        assert not list(tmp_path.iterdir())  # so that a corrected command can start
        (tmp_path / "out.csv.receipt.json").write_text("{}")  # of an output that has been removed
        with pytest.raises(RunError, match="below stage.agreement"):
            predict.run(config(*BACKEND, *words))


def test_numbers_of_a_server_agree_if_they_are_close(config: Compose, tmp_path: Path) -> None:
    rows = [f"{'涨跌平'[number % 3]}{number},{number % 3 - 1}" for number in range(60)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    data = ("data=table", "data.task=regression", "data.labels={-1: '空', 0: '平', 1: '多'}", "method=lora_label")
    short = (*data, f"data.files={tmp_path / 'rows.csv'}", "train=smoke", "train.max_steps=2", "tracking=none")
    run = train.run(config(*short, "stage.compare_base=false", "model.dtype=float32", f"output_dir={tmp_path}")).run_dir
    assert run is not None
    exact = Vllm(run)

    def rounded(request: Request) -> Reply:
        content = json.loads(exact(request).body)
        for choice in content["choices"]:
            for entry in filter(None, choice["prompt_logprobs"]):
                for value in entry.values():
                    value["logprob"] = round(value["logprob"], 3)
        return Reply(json.dumps(content).encode())

    with endpoint(rounded, "numbers") as server:
        words = (f"run={run}", f"input={tmp_path / 'rows.csv'}", f"output={tmp_path / 'out.csv'}")
        predict.run(config(*BACKEND, *words, f"stage.url={server.url}"))
    receipt = json.loads((tmp_path / "out.csv.receipt.json").read_text())
    assert receipt["agreement"] == 1
    assert 0 < receipt["largest_difference"] < 0.01


def test_a_server_without_log_probabilities_is_named(config: Compose, run: Path, table: Path, tmp_path: Path) -> None:
    plain = Reply(json.dumps({"choices": [{"index": 0, "text": "利好", "logprobs": None}]}).encode())
    biased = {"tokens": [""], "token_logprobs": [0.0]}  # includes the bias, so all labels have probability 1
    forced = Reply(json.dumps({"choices": [{"index": 0, "logprobs": biased}]}).encode())
    words = (f"run={run}", f"input={table}", f"output={tmp_path / 'out.csv'}")
    for reply in (plain, forced):
        with (
            endpoint(lambda request, reply=reply: reply, "base") as server,
            pytest.raises(RunError, match="gives no log-probabilities of the tokens of an answer"),
        ):
            predict.run(config(*BACKEND, *words, f"stage.url={server.url}"))


def test_models_that_no_server_can_score_are_refused(config: Compose, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("涨\n", encoding="utf-8")
    for method in ("classifier", "tfidf_lr"):
        words = (f"run={trained(method)}", f"input={tmp_path / 'in.txt'}", f"output={tmp_path / 'out.csv'}")
        with pytest.raises(ConfigError, match="score it with backend=local"):
            predict.run(config(*BACKEND, *words))
    assert not list(tmp_path.glob("out*"))


def test_options_that_do_not_fit_are_refused(config: Compose, run: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapters and adapter_column belong together"):
        config(*BACKEND, "run=x", "text=x", "stage.adapters={a:b}")
    with pytest.raises(ConfigError, match="adapters are those of a server; add backend=openai"):
        config("stage=predict", "run=x", "text=x", "stage.adapters={a:b}", "stage.adapter_column=source")
    chosen = ("stage.adapter_column=nowhere", "stage.adapters={forum:base}")
    with endpoint(Vllm(run), "base") as server:
        words = (f"run={run}", f"input={table}", f"output={tmp_path / 'out.csv'}", f"stage.url={server.url}")
        with pytest.raises(DataError, match="the input has no column 'nowhere'"):
            predict.run(config(*BACKEND, *words, *chosen))
