"""Predict the rows of a file, a pipe or one text with a finished run or an export."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from finsa.config import CalibratedSelection, Csv, PredictStage, RunConfig, locate
from finsa.data import encodings
from finsa.data.cleaning import normalize
from finsa.data.prompts import with_target
from finsa.data.schema import Reading
from finsa.errors import DataError, counted
from finsa.evaluation import selective, tables
from finsa.inference import predict, predictor, receipts, row_files
from finsa.inference.predict import Columns, Share
from finsa.inference.predictor import Predictor, Record
from finsa.models import quantization
from finsa.runs import files, locks, processes
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Predict one text and print the result, or predict every row of an input and write a file.

    Raises:
        DataError: if the input cannot be read.
        RunError: if the output already exists, or was started by a different command.
    """
    record = predictor.for_inference(predictor.read(str(cfg.run)), cfg.model.inference)
    quantization.require_library(record.cfg.method)
    assert isinstance(cfg.stage, PredictStage)
    chosen = selective.of_run(cfg.stage, record.path, record.labels)
    rule = chosen[0] if chosen else None
    return _predict_file(cfg, record, rule, session) if cfg.text is None else _predict_text(cfg, record, cfg.text, rule)


def _predict_text(cfg: RunConfig, record: Record, text: str, rule: selective.Rule | None) -> Result:
    if not normalize(text):
        raise DataError("text: is empty")
    if record.cfg.data.asks_for_target:
        if not (cfg.target or "").strip():
            raise DataError("target: the prompt of this run asks for the target of the text; add target=<company>")
        text = with_target(str(cfg.target), text)
    elif cfg.target is not None:
        raise DataError("target: the prompt of this run does not ask for a target; leave it out")
    model = _load(cfg, record, rule)
    receipt = receipts.quantize(model, [text], None) if cfg.model.inference == "int8" else None
    started = time.perf_counter()
    predictions = model([text])
    milliseconds = 1000 * (time.perf_counter() - started)
    label = predictions.predicted[0]
    table = Table(title=label or "none of the labels", title_justify="left", title_style="bold", show_header=False)
    for name, prob in zip(predictions.labels, predictions.probs[0], strict=True):
        table.add_row(name, f"{prob:.4f}", "█" * round(30 * float(prob)))
    if predictions.labels:
        tables.show(table)
    else:
        print(f"{label}")
    for name, cells in predictions.decisions.items():
        print(f"{name}: {json.dumps(cells[0], ensure_ascii=False)}")
    for thought in predictions.thoughts[0] if predictions.thoughts else ():
        print(f"thought: {thought}")
    limit = record.cfg.data.max_length
    truncated = f", truncated to {limit} tokens with its prompt" if predictions.truncated[0] else ""
    routed = f", route {predictions.routes[0]}" if predictions.routes else ""
    print(f"{record.name}: {milliseconds:.1f} ms{routed}{truncated}")
    if receipt is not None:
        print(f"int8 against float32 on this text: largest difference {receipt['largest_difference']:.2g}")
    return Result("predict", None, {"label": label})


def _predict_file(cfg: RunConfig, record: Record, rule: selective.Rule | None, session: Session | None) -> Result:
    stage = cfg.stage
    assert isinstance(stage, PredictStage)
    source, output = str(cfg.input), Path(str(cfg.output)).absolute()
    share = Share(processes.rank(), processes.world_size())
    reading = Reading.of(record.cfg.data, stage.text_column)
    form, target = row_files.input_format(source, stage.input_format), row_files.output_format(output)
    if source == "-" and share.processes > 1:
        raise DataError("input: a pipe cannot be shared by several processes; name a file")
    # Chunks are written to this folder.
    folder, rejected = output.with_name(f"{output.name}.partial"), output.with_name(f"{output.name}.rejected.jsonl")
    if not (folder / predict.STATE).is_file():
        files.require_new(output, "file")
        files.require_new(rejected, "file")
    csv = _csv(cfg, record, source)
    stream = row_files.open_stream(source, form, reading, csv)
    columns = stream.columns
    if columns is None and (source != "-" or target != "jsonl"):
        columns = row_files.keys_of(source, csv.encoding)
    file = None if source == "-" else locate(source)
    state = {  # must be the same for an interrupted command to be resumed
        "run": str(record.path),
        "run finished": [record.facts.get("finished"), record.facts.get("config_hash"), record.name],
        "input": str(file or "-"),
        "input size": file.stat().st_size if file else None,
        "text column": "; ".join([*reading.fields, reading.column]),
        "stage.chunk": stage.chunk,
        "train.score_tokens": cfg.train.score_tokens,
        "number of processes": share.processes,
        "data.csv": csv.model_dump(mode="json"),
        "model.inference": cfg.model.inference,
    }
    if rule is not None:
        limits = CalibratedSelection.model_fields
        state |= {f"stage.{name}": value for name, value in stage.model_dump(include=set(limits)).items()}
    predict.begin(folder, state)
    with locks.held(predict.lock_file(folder, share.rank), f"output {output}"):
        predict.enter(folder, share)
        if share.rank == 0 and (done := len(list(folder.glob("chunk-*")))):
            print(f"resuming: {done:,} chunks of up to {stage.chunk:,} rows are done ({folder})")
        for note in stream.notes:
            print(note)
        model, receipt = _load(cfg, record, rule), None
        if cfg.model.inference == "int8":
            texts, gold = receipts.validation_rows(record.cfg, session)
            if not texts:
                raise DataError(
                    "model.inference=int8: the validation rows of the run, on which it is compared, are gone"
                )
            receipt = receipts.quantize(model, texts, gold)
            print(receipts.describe(receipt))
        found, thinks = columns or stream.first_columns, model.thinks
        decisions = rule.columns if rule else ()
        added = Columns.added_to(found, model.probable, bool(model.experts), model.task, thinks, decisions)
        writer = row_files.open_writer(target, columns, stream.schema, added.types())
        started = time.monotonic()
        chunks, rows = predict.predict(model, stream, reading, folder, writer, added, share, stage.chunk)
        seconds = max(time.monotonic() - started, 1e-9)
        if share.rank != 0:
            return Result("predict", None, {"rows": rows})
        predict.wait(folder, chunks, share, cfg.train.process_timeout)
        counts = predict.join(folder, chunks, writer, output, rejected)
    if not chunks:
        print("note: the input has no rows")
    by = f" by process 0 of {share.processes}" if share.processes > 1 else ""
    print(f"predicted {counted(rows)}{by} in {seconds:.1f} s: {rows / seconds:,.0f} rows/s")
    if counts.get("truncated"):
        print(f"truncated texts: {counts['truncated']:,}")
    if counts.get("rejected"):
        print(f"rejected rows: {counts['rejected']:,} ({rejected})")
    print(f"wrote {counted(counts.get('answered', 0))} to {output}")
    results: dict[str, Any] = {"rows": rows, "rows_per_second": rows / seconds, **counts}
    if receipt is not None:
        results["receipt"] = receipt
        files.write_text(output.with_name(f"{output.name}.{receipts.FILE}"), json.dumps(receipt, indent=1) + "\n")
    return Result("predict", None, results)


def _csv(cfg: RunConfig, record: Record, source: str) -> Csv:
    """Format of the input: from the command, otherwise that of the run's data; valid UTF-8 is always read as UTF-8."""
    given, trained = cfg.data.csv.model_dump(exclude_none=True), record.cfg.data.csv
    if source != "-" and trained.encoding is not None and encodings.is_utf8(locate(source)):
        trained = trained.model_copy(update={"encoding": None})
    return trained.model_copy(update=given)


def _load(cfg: RunConfig, record: Record, rule: selective.Rule | None) -> Predictor:
    predictor.announce(record.name)
    if record.uses_torch:
        from finsa.models import hardware  # torch takes seconds to import: after the checks

        hardware.prepare(cfg.train)
    model = predictor.load(record, cfg.train.score_tokens, cfg.train.threads, merge=True)
    model.selection = rule
    return model
