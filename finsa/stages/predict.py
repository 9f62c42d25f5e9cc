"""Answer the rows of a file, a pipe or one text with a finished run or an export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.table import Table

from finsa.config import Csv, PredictStage, RunConfig, locate
from finsa.data import encodings
from finsa.data.reading import Reading
from finsa.data.texts import normalize
from finsa.errors import DataError, RunError
from finsa.evaluation import tables
from finsa.inference import predict, predictor, row_streams, shards, writers
from finsa.inference.predict import Added, Share
from finsa.inference.predictor import Answerer, Record
from finsa.models import quantization
from finsa.runs import locks, processes
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Answer one text on the terminal, or every row of an input in a file that is put in its place whole.

    Raises:
        DataError: for an input that cannot be read.
        RunError: where the output is there already, or was begun by another command.
    """
    record = predictor.read(str(cfg.run))
    quantization.require_library(record.cfg.method)
    if cfg.text is not None:
        return _one(cfg, record, cfg.text)
    return _file(cfg, record)


def _one(cfg: RunConfig, record: Record, text: str) -> Result:
    if not normalize(text):
        raise DataError("text: is empty")
    answerer = _load(cfg, record)
    started = time.perf_counter()
    answers = answerer([text])
    spent = 1000 * (time.perf_counter() - started)
    table = Table(title=answers.chosen[0], title_justify="left", title_style="bold", show_header=False)
    for label, share in zip(answers.labels, answers.probabilities[0], strict=True):
        table.add_row(label, f"{share:.4f}", "█" * round(30 * float(share)))
    tables.show(table)
    cut = f", the text was cut to {record.cfg.data.max_length} tokens with its prompt" if answers.cut[0] else ""
    routed = f", route {answers.routes[0]}" if answers.routes else ""
    print(f"{record.name}: {spent:.1f} ms{routed}{cut}")
    return Result("predict", None, {"label": answers.chosen[0]})


def _file(cfg: RunConfig, record: Record) -> Result:
    assert isinstance(cfg.stage, PredictStage)
    source, output = str(cfg.input), Path(str(cfg.output)).absolute()
    share = Share(processes.rank(), processes.world())
    reading = Reading.of(record.cfg.data, cfg.stage.text_column)
    form, target = row_streams.format_of(source, cfg.stage.input_format), writers.require_format(output)
    if source == "-" and share.processes > 1:
        raise DataError("input: a pipe cannot be shared by several processes; name a file")
    folder, rejected = _places(output)
    csv = _written(cfg, record, source)
    stream = row_streams.open_stream(source, form, reading, csv)
    columns = stream.columns
    if columns is None and (source != "-" or target != "jsonl"):
        columns = row_streams.keys_of(source, csv.encoding)
    shards.begin(folder, {**_state(cfg, record, source, reading, share), "data.csv": csv.model_dump(mode="json")})
    if share.rank == 0:
        shards.forget(folder)
    with locks.held(folder / f"lock-{share.rank}", f"output {output}"):
        part = shards.Part(folder, share.rank)
        if part.chunks and share.rank == 0:
            print(f"going on behind row {part.chunks[-1].read:,} ({folder})")
        for note in stream.notes:
            print(note)
        answerer = _load(cfg, record)
        added = Added.beside(columns or stream.first_keys, answerer.labels, bool(answerer.experts))
        shape = writers.open_format(target, columns, stream.schema, added.kinds())
        started = time.monotonic()
        now = predict.predict(answerer, stream, reading, part, shape, added, share, cfg.stage.chunk)
        seconds = time.monotonic() - started
        if share.rank != 0:
            return Result("predict", None, {"rows": now})
        predict.wait(folder, share, cfg.train.process_timeout)
        counts = shards.join(folder, share.processes, shape, output, rejected)
    _tell(counts, now, seconds, output, rejected, share)
    return Result("predict", None, {"rows": now, "rows_per_second": now / max(seconds, 1e-9), **counts})


def _written(cfg: RunConfig, record: Record, source: str) -> Csv:
    """How the input is written: as the command says, else as the run's data; valid UTF-8 is read as such."""
    given, trained = cfg.data.csv.model_dump(exclude_none=True), record.cfg.data.csv
    if source != "-" and trained.encoding is not None and encodings.is_utf8(locate(source)):
        trained = trained.model_copy(update={"encoding": None})
    return trained.model_copy(update=given)


def _load(cfg: RunConfig, record: Record) -> Answerer:
    predictor.announce(record.name)
    if record.uses_torch:
        from finsa.models import hardware  # torch takes seconds to import: after the checks

        hardware.prepare(cfg.train)
        hardware.take_own_device()
    return predictor.load(record, cfg.train.score_tokens, cfg.train.threads, merge=True)


def _places(output: Path) -> tuple[Path, Path]:
    """The folder in which an output grows, and the file of rejected rows.

    Raises:
        RunError: where one of them cannot be made.
    """
    folder = output.with_name(f"{output.name}.partial")
    rejected = output.with_name(f"{output.name}.rejected.jsonl")
    begun = (folder / shards.STATE).is_file()
    for place in (output, rejected):
        if place.exists() and not begun:
            raise RunError(f"output: {place} is there already; name another file, or remove it")
    if any(parent.is_file() for parent in output.parents):
        raise RunError(f"output: {output} lies below a file; name another one")
    return folder, rejected


def _state(cfg: RunConfig, record: Record, source: str, reading: Reading, share: Share) -> dict[str, Any]:
    """What has to be the same for a stopped command to go on."""
    assert isinstance(cfg.stage, PredictStage)
    file = None if source == "-" else locate(source)
    return {
        "run": str(record.path),
        "run finished": [record.facts.get("finished"), record.facts.get("config_hash"), record.name],
        "input": str(file or "-"),
        "input size": file.stat().st_size if file else None,
        "text column": "; ".join([*reading.fields, reading.column]),
        "stage.chunk": cfg.stage.chunk,
        "train.score_tokens": cfg.train.score_tokens,
        "number of processes": share.processes,
    }


def _tell(counts: dict[str, int], now: int, seconds: float, output: Path, rejected: Path, share: Share) -> None:
    shared = f" by process 0 of {share.processes}" if share.processes > 1 else ""
    if not counts.get("answered") and not counts.get("rejected"):
        print("note: the input has no rows")
    print(f"answered {now:,} rows{shared} in {seconds:.1f} s: {now / max(seconds, 1e-9):,.0f} rows/s")
    if counts.get("cut"):
        print(f"texts cut: {counts['cut']:,}")
    if counts.get("rejected"):
        print(f"rejected rows: {counts['rejected']:,} ({rejected})")
    print(f"wrote {counts.get('answered', 0):,} rows to {output}")
