"""Prediction over files: every row once, in order, with its columns, also after interruptions."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import interruptions
import polars as pl
import pytest
from openpyxl import Workbook

from finsa.config import RunConfig, command_line
from finsa.data import dataset as data_table
from finsa.errors import ConfigError, DataError, FinsaError, RunError
from finsa.inference import predictor
from finsa.stages import predict, train

Compose = Callable[..., RunConfig]
Trained = Callable[..., Path]
ROWS, BAD = 200, 3
SETTINGS = ("stage=predict", "stage.chunk=16", "train.threads=1")


@pytest.fixture(scope="module")
def texts(project: Path) -> list[str]:
    return pl.read_csv(project / "data" / "sample" / "test.csv")["text"].to_list()[:ROWS]


@pytest.fixture(scope="module")
def table(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with a label column, including three bad ones."""
    file = tmp_path_factory.mktemp("input") / "rows.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["id", "text", "label"])
        for number, text in enumerate(texts):
            writer.writerow([number, text, "?"])
            if number in (20, 90):
                writer.writerow([number, "", "?"])
        writer.writerow(["short"])
    return file


@pytest.fixture(scope="module")
def run(trained: Trained) -> Path:
    return trained("lora_response")


@pytest.fixture(scope="module")
def whole(config: Compose, run: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted command."""
    output = tmp_path_factory.mktemp("whole") / "out.csv"
    predict.run(config(*SETTINGS, f"run={run}", f"input={table}", f"output={output}"))
    return output


def command(run: Path, source: str, output: Path) -> list[str]:
    return [*SETTINGS, f"run={run}", f"input={source}", f"output={output}"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def test_rows_keep_their_order_and_columns_and_get_answers(whole: Path, run: Path, texts: list[str]) -> None:
    rows = list(csv.DictReader(whole.open(encoding="utf-8")))
    assert list(rows[0]) == ["id", "text", "label", "predicted_label", "p_利空", "p_中性", "p_利好"]
    assert [row["id"] for row in rows] == [str(number) for number in range(ROWS)]
    assert [row["text"] for row in rows] == texts
    assert {row["label"] for row in rows} == {"?"}
    answers = predictor.restore(str(run), 16384)(texts)
    assert [row["predicted_label"] for row in rows] == answers.predicted
    assert len(set(answers.predicted)) > 1
    for row, shares in zip(rows, answers.probs, strict=True):
        found = [float(row[f"p_{label}"]) for label in answers.labels]
        assert found == pytest.approx(shares, abs=1e-5)
    assert not list(whole.parent.glob("*.partial"))


def test_bad_rows_are_reported_with_line_and_reason(whole: Path) -> None:
    lines = whole.with_name("out.csv.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    bad = [json.loads(line) for line in lines]
    assert [(row["line"], row["reason"].split(":")[0]) for row in bad] == [
        (23, "empty text"),
        (94, "empty text"),
        (ROWS + 4, "unreadable"),
    ]
    assert bad[0]["row"] == {"id": "20", "text": "", "label": "?"}


def test_a_killed_command_resumes_and_writes_the_same_file(
    config: Compose, run: Path, table: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.csv"
    folder = tmp_path / "out.csv.partial"
    words = command(run, str(table), output)
    process = commands.Command(*words)
    until = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < until:
        if len(list(folder.glob("chunk-*"))) >= 2:
            break
        time.sleep(0.002)
    process.signal(signal.SIGKILL)
    process.wait()
    assert not output.exists(), "it was done before it could be killed"
    chunks = sorted(folder.glob("chunk-*"))
    # what a kill in the middle of a write leaves behind, and a power cut where nothing is synchronized
    chunks[-1].with_name(f".{chunks[-1].name}.part").write_bytes(b'{"torn')
    chunks[-1].write_bytes(chunks[-1].read_bytes()[:-1])
    result = predict.run(config(*SETTINGS, f"run={run}", f"input={table}", f"output={output}"))
    assert 0 < result.metrics["rows"] < ROWS + BAD
    assert output.read_bytes() == whole.read_bytes()
    rejected = [file.with_name("out.csv.rejected.jsonl").read_bytes() for file in (output, whole)]
    assert rejected[0] == rejected[1]
    assert not folder.exists()


def test_two_processes_and_a_pipe_write_the_same_file(run: Path, table: Path, whole: Path, tmp_path: Path) -> None:
    shared, piped = tmp_path / "shared.csv", tmp_path / "piped.csv"
    both = [
        commands.Command(*command(run, str(table), shared), environment=environment(RANK=str(rank), WORLD_SIZE="2"))
        for rank in (0, 1)
    ]
    pipe = commands.Command(*command(run, "-", piped), stdin=table)
    for process in (pipe, *both):
        assert process.wait(120) == 0, process.err
    assert shared.read_bytes() == whole.read_bytes()
    assert piped.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("kind", "ending"), [("csv", "jsonl"), ("jsonl", "csv"), ("parquet", "parquet"), ("txt", "tsv")]
)
def test_all_formats_give_the_same_predictions(
    config: Compose, run: Path, texts: list[str], tmp_path: Path, kind: str, ending: str
) -> None:
    frame = pl.DataFrame({"number": range(40), "text": texts[:40]})
    source, output = tmp_path / f"in.{kind}", tmp_path / f"out.{ending}"
    if kind == "txt":
        source.write_text("\n".join(texts[:40]), encoding="utf-8")
    else:
        {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[kind](source)
    predict.run(config(*SETTINGS, f"run={run}", f"input={source}", f"output={output}"))
    readers: dict[str, Callable[..., pl.DataFrame]] = {
        "csv": pl.read_csv,
        "tsv": lambda file: pl.read_csv(file, separator="\t", quote_char='"'),
        "jsonl": pl.read_ndjson,
        "parquet": pl.read_parquet,
    }
    found = readers[ending](output)
    assert found["text"].to_list() == texts[:40]
    if kind == "parquet":
        assert found.schema["number"] == pl.Int64
    assert found["label"].to_list() == predictor.restore(str(run), 16384)(texts[:40]).predicted


def test_a_baseline_answers_files_too(config: Compose, trained: Trained, table: Path, tmp_path: Path) -> None:
    run = trained("tfidf_lr")
    predict.run(config(*SETTINGS, f"run={run}", f"input={table}", f"output={tmp_path / 'out.jsonl'}"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == ROWS
    assert all(
        sum(row[f"p_{label}"] for label in ("利空", "中性", "利好")) == pytest.approx(1, abs=1e-5) for row in rows
    )


@pytest.mark.parametrize(
    ("content", "codec", "words"),
    [
        ("text,id\n{},0\n{},1\n", "gb18030", []),
        ("sep=;\ntext;id\n{};0\n{};1\n", "utf-8", []),
        ("text|id\n{}|0\n{}|1\n", "utf-16", []),
        ("0\t{}\n1\t{}\n", "utf-8", ["data.csv.delimiter=tab", "data.csv.header=[id,text]"]),
        ("text,id\n{},0\n{},1\n", "utf-7", ["data.csv.encoding=utf-7"]),
    ],
)
def test_inputs_in_all_csv_formats_and_encodings_are_read(
    config: Compose, trained: Trained, tmp_path: Path, content: str, codec: str, words: list[str]
) -> None:
    """With the detection and the keys of training."""
    texts, run, source = ["公司净利润增长", "股价大跌"], trained("majority"), tmp_path / "rows.csv"
    source.write_bytes(content.format(*texts).encode(codec))
    overrides = [*command(run, str(source), tmp_path / "out.jsonl"), *words]
    command_line.check(overrides)
    predict.run(config(*overrides))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == list(zip("01", texts, strict=True))


def test_input_is_read_as_the_run_read_its_rows(config: Compose, tmp_path: Path) -> None:
    """With the run's settings for files without a header, in Cyrillic; a file in UTF-8 is still read as such."""
    rows = [(f"Цена {number} выросла", "ab"[number % 2]) for number in range(40)]
    content = "".join(f"{label};{text}\n" for text, label in rows)
    (tmp_path / "rows.csv").write_bytes(content.encode("cp1251"))
    data = [f"data.files={tmp_path / 'rows.csv'}", "data.csv.encoding=cp1251", "data.csv.header=[label,text]"]
    done = train.run(config("data=table", "method=majority", *data, f"output_dir={tmp_path / 'runs'}"))
    for name, codec in {"old": "cp1251", "new": "utf-8"}.items():
        source, output = tmp_path / f"{name}.csv", tmp_path / f"{name}.jsonl"
        source.write_bytes(content.encode(codec))
        predict.run(config(*command(done.run_dir or tmp_path, str(source), output)))
        found = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
        assert found == [text for text, _ in rows]


def test_a_single_text_is_predicted_directly(config: Compose, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "公司净利润大幅增长, 'A' ${x}"
    cfg = config("stage=predict", f"run={run}", "text='涨停'").model_copy(update={"text": text})
    result = predict.run(cfg)
    assert result.metrics["label"] == predictor.restore(str(run), 16384)([text]).predicted[0]
    shown = capsys.readouterr().out
    assert "ms" in shown
    assert all(label in shown for label in ("利空", "中性", "利好"))


@pytest.fixture
def begun(config: Compose, run: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output that was interrupted after its first chunks."""
    output = tmp_path / "out.csv"
    interruptions.after_two_chunks(config(*SETTINGS, f"run={run}", f"input={table}", f"output={output}"), monkeypatch)
    return output


def test_another_command_does_not_resume_a_started_output(
    config: Compose, run: Path, trained: Trained, table: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("stage=predict", "stage.chunk=16", "train.threads=1", f"output={begun}")
    with pytest.raises(RunError, match="was started with another run "):
        predict.run(config(*words, f"run={trained('tfidf_lr')}", f"input={table}"))
    other = table.with_name("other.csv")
    content = table.read_text(encoding="utf-8")
    other.write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match="was started with another input "):
        predict.run(config(*words, f"run={run}", f"input={other}"))
    with pytest.raises(RunError, match=r"was started with another stage\.chunk \(16, now 32\)"):
        predict.run(config(*words, "stage.chunk=32", f"run={run}", f"input={table}"))
    stamp = table.stat()
    try:
        table.write_text(content.replace("\n0,", "\n9,", 1), encoding="utf-8")
        with pytest.raises(RunError, match="its first 16 rows have changed since they were predicted"):
            predict.run(config(*words, f"run={run}", f"input={table}"))
    finally:
        table.write_text(content, encoding="utf-8")
        os.utime(table, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_impossible_commands_are_refused_before_weights_are_loaded(
    config: Compose, run: Path, table: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "load", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"text": "a"}\n')))
    base = ("stage=predict", f"run={run}")
    new = f"output={tmp_path / 'new.csv'}"
    cases: list[tuple[tuple[str, ...], type[FinsaError], str]] = [
        ((f"input={tmp_path / 'rows.csv'}", new), DataError, "there is no file"),
        ((f"input={table}", f"output={whole}"), RunError, "already exists"),
        ((f"input={table}", f"output={tmp_path / 'new.xls'}"), DataError, "Choose from: csv, tsv, jsonl, parquet"),
        ((f"input={table}", new, "stage.text_column=texts"), DataError, "Did you mean 'text'"),
        ((f"input={table}", f"output={table}/new.csv"), RunError, "is below a file"),
        (("input=-", new), DataError, r"name an output that ends in \.jsonl"),
    ]
    for words, kind, message in cases:
        with pytest.raises(kind, match=message):
            predict.run(config(*base, *words))
    with pytest.raises(RunError, match="is not a run folder"):
        predict.run(config("stage=predict", f"run={tmp_path}", f"input={table}", new))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="cannot be shared by several processes"):
        predict.run(config(*base, "input=-", new))


# ------------------------------------------------------------------------------------------------ forms of rows


SIGN = re.compile(r"[甲乙]第\d+条：.{3}\d+")  # of a row, in whatever form


def _texts_of_training(folder: Path) -> dict[str, str]:
    """The texts that the run read."""
    cfg = predictor.read(str(folder)).cfg
    texts = [text for part in data_table.load(cfg.data).splits.values() for text in part["text"]]
    return {sign[0]: text for text in texts if (sign := SIGN.search(text))}


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "xlsx", "parquet", "feather"])
def test_rows_are_read_as_training_read_them(
    config: Compose, instructed: tuple[Path, Path], tmp_path: Path, form: str
) -> None:
    """Instruction rows and chats, with and without system and history: the same texts and probabilities."""
    run, files = instructed
    texts, known = _texts_of_training(run), list[str]()
    for name in ("instructions", "chats"):
        rows = json.loads((files / f"{name}.json").read_text(encoding="utf-8"))[:9]
        asked = [{key: value for key, value in row.items() if key != "output"} for row in rows]
        source, output = tmp_path / f"{name}.{form}", tmp_path / f"{name}.out.jsonl"
        _save(asked, source)
        predict.run(config(*command(run, str(source), output)))
        answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        found = [texts[SIGN.findall(json.dumps(row, ensure_ascii=False))[0]] for row in rows]
        known += found
        expected = predictor.restore(str(run), 16384)(found)
        assert [row["label"] for row in answers] == expected.predicted
        for row, shares in zip(answers, expected.probs, strict=True):
            assert [row[f"p_{label}"] for label in expected.labels] == pytest.approx(shares, abs=1e-5)
    starts = {text[:6] for text in known}
    assert {"判断情绪\n甲", "user: ", "system", "乙第0条：涨"} <= starts, "every form was among them"


def _save(rows: list[dict[str, Any]], file: Path) -> None:
    """Write rows; formats of tables have lists as JSON text."""
    flat = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows]
    match file.suffix:
        case ".json":
            file.write_text(json.dumps({"data": rows}), encoding="utf-8")
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".csv":
            pl.DataFrame(flat).write_csv(file)
        case ".parquet":
            pl.DataFrame(rows if "input" in rows[0] else flat).write_parquet(file)
        case ".feather":
            pl.DataFrame(flat).write_ipc(file)
        case ".xlsx":
            book = Workbook()
            for cells in ([*flat[0]], *([*row.values()] for row in flat)):
                book.active.append(cells)
            book.save(file)


def test_rows_that_training_would_refuse_are_rejected(
    config: Compose, instructed: tuple[Path, Path], tmp_path: Path
) -> None:
    """Plain texts are also predicted; an instruction that fills the prompt is never predicted without its input."""
    rows: list[dict[str, Any]] = [
        {"text": "大涨"},
        {"instruction": "判断" * 400, "input": "大涨"},
        {"conversations": [{"from": "human", "value": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": "大涨"}]},
        {"title": "x"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    _save(rows, source)
    predict.run(config(*command(instructed[0], str(source), output)))
    assert [json.loads(line).keys() & {"text", "messages"} for line in output.open(encoding="utf-8")] == [
        {"text"},
        {"messages"},
    ]
    bad = [json.loads(line) for line in output.with_name("out.jsonl.rejected.jsonl").open(encoding="utf-8")]
    room = predictor.restore(str(instructed[0]), 16384).renderer.room  # type: ignore[union-attr]
    assert [(row["line"], row["reason"]) for row in bad] == [
        (2, f"no room for the input: the fixed part needs 401 tokens, but only {room} are available"),
        (3, "unreadable: a turn has a part of type 'image_url', which is not text"),
        (5, "no text"),
    ]


def test_a_file_without_any_text_is_reported(config: Compose, instructed: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    for rows, message in (
        (
            [{"title": "x"}],
            "in.json has neither the fields instruction, input, nor the fields messages or conversations",
        ),
        ([], "in.json contains no rows"),
        ({"a": 1}, "contains no list of rows"),
    ):
        source.write_text(json.dumps(rows), encoding="utf-8")
        with pytest.raises(DataError, match=f"^input: .*{message}"):
            predict.run(config(*command(instructed[0], str(source), tmp_path / "out.csv")))
    assert [file.name for file in tmp_path.iterdir()] == ["in.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=predict"], r"needs run=<folder>"),
        (["stage=predict", "run=a", "input=b.csv"], r"needs input=<file or -> output=<file>"),
        (["stage=predict", "run=a", "input=b.csv", "output=c.csv", "text=d"], "needs input="),
        (["stage=evaluate", "run=a", "input=b.csv"], "input is not used by stage=evaluate, only by predict"),
        (["run=a", "text=b"], "is not used by stage=train"),
    ],
)
def test_incompatible_settings_are_refused(config: Compose, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*words)


def test_a_lost_process_ends_the_wait_and_the_command_resumes(
    run: Path, table: Path, whole: Path, tmp_path: Path
) -> None:
    """Process 1 has started and died: process 0 reports it instead of waiting, and a repeated command finishes."""
    output = tmp_path / "out.csv"
    words = [*command(run, str(table), output), "train.process_timeout=60"]

    def start(rank: int) -> commands.Command:
        return commands.Command(*words, environment=environment(RANK=str(rank), WORLD_SIZE="2"))

    first, lost = start(0), start(1)
    until = time.monotonic() + 90
    while len(list(tmp_path.glob("out.csv.partial/alive-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.002)
    lost.signal(signal.SIGKILL)
    lost.wait()
    assert first.wait(200) == 2, first.err
    assert "process 1 is no longer running" in first.err
    assert "Traceback" not in first.err
    both = [start(0), start(1)]
    assert [process.wait(200) for process in both] == [0, 0], [process.err for process in both]
    assert output.read_bytes() == whole.read_bytes()


def test_a_command_is_checked_and_a_baseline_answers_before_torch_is_imported(
    run: Path, trained: Trained, tmp_path: Path
) -> None:
    """In one new process, in which the imports of every command would remain."""
    (tmp_path / "in.csv").write_text("id,body\n1,涨\n", encoding="utf-8")
    commands_and_words = [
        (
            ["stage=predict", f"run={run}", f"input={tmp_path / 'in.csv'}", f"output={tmp_path / 'out.csv'}"],
            "no column",
        ),
        (["stage=predict", f"run={run}", "text='  '"], "text: is empty"),
        (["stage=export", f"run={trained('classifier')}", "format=classifier"], "its head reads the mean"),
        (["stage=evaluate", f"run={run}", "stage.protocol=generate", "stage.parse=letter"], "letter reads options"),
        (["stage=predict", f"run={run}", f"input={tmp_path / 'in.csv'}", "output=-"], "cannot be written to a pipe"),
        (["stage=predict", f"run={trained('tfidf_lr')}", "text=公司大涨"], "loading tfidf_lr, sample"),
        (["stage=check", "method=tfidf_lr"], ""),
        (["method=majority", "tracking=none", f"output_dir={tmp_path / 'runs'}"], ""),
    ]
    code = (
        "import json, sys\nfrom finsa import cli\ncodes = []\n"
        "for words in json.loads(sys.argv[1]):\n    sys.argv[1:] = words\n    codes.append(cli.run())\n"
        "print(json.dumps([codes, [name for name in ('torch', 'transformers', 'peft') if name in sys.modules]]))"
    )
    given = json.dumps([words for words, _ in commands_and_words])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, env=environment())
    assert json.loads(done.stdout.splitlines()[-1]) == [[2, 2, 2, 2, 2, 0, 0, 0], []], done.stderr
    for _, told in commands_and_words:
        assert told in done.stderr
    assert "公司" not in done.stderr
    assert not (tmp_path / "out.csv").exists()


def test_an_input_without_rows_is_reported(
    config: Compose, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("text\n", encoding="utf-8")
    words = (f"run={trained('majority')}", f"input={tmp_path / 'in.csv'}", f"output={tmp_path / 'out.csv'}")
    predict.run(config("stage=predict", *words))
    assert "note: the input has no rows\n" in capsys.readouterr().out
