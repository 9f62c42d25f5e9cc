"""Predict the rows of a file, a pipe or one text with a finished run or an export."""

from __future__ import annotations

import json
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from finsa.config import CalibratedSelection, Csv, PredictStage, RunConfig, locate
from finsa.data import encodings
from finsa.data.cleaning import normalize
from finsa.data.prompts import with_target
from finsa.data.schema import Reading
from finsa.errors import ConfigError, DataError, Problem, RunError, counted
from finsa.evaluation import selective, tables
from finsa.inference import predict, predictor, receipts, row_files
from finsa.inference.predict import Columns, Share
from finsa.inference.predictor import Predictor, Record
from finsa.inference.row_files import Stream
from finsa.models import quantization
from finsa.runs import files, locks, processes
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Predict one text and print the result, or predict every row of an input and write a file.

    Raises:
        DataError: if the input cannot be read.
        RunError: if the output already exists, or was started by a different command.
        ConfigError: for an engine that is not installed, or cannot do this.
    """
    assert isinstance(cfg.stage, PredictStage)
    if cfg.stage.engine == "ray":
        _require_ray(cfg)
    record = predictor.for_inference(predictor.read(str(cfg.run)), cfg.model.inference)
    quantization.require_library(record.cfg.method)
    if cfg.stage.backend == "openai":
        predictor.require_served(record)
    chosen = selective.of_run(cfg.stage, record.path, record.labels)
    rule = chosen[0] if chosen else None
    return _predict_file(cfg, record, rule, session) if cfg.text is None else _predict_text(cfg, record, cfg.text, rule)


def _require_ray(cfg: RunConfig) -> None:
    if find_spec("ray") is None or find_spec("ray.data") is None:
        raise ConfigError([Problem("stage.engine", "Ray is not installed: pip install 'finsa[ray]'")])
    if cfg.text is not None or cfg.input == "-":
        what = "one text" if cfg.text is not None else "a pipe, which can be read only once"
        raise ConfigError([Problem("stage.engine", f"ray predicts files, not {what}; leave out stage.engine")])
    if isinstance(cfg.stage, PredictStage) and cfg.stage.backend != "local":
        text = "ray predicts by models of its workers, and stage.backend=openai by a server; leave out one of them"
        raise ConfigError([Problem("stage.engine", text)])
    if cfg.model.inference == "int8":
        raise ConfigError([Problem("model.inference", "int8 is not for stage.engine=ray; leave out one of them")])


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
    limits = stage.model_dump(include=set(CalibratedSelection.model_fields))
    state |= {f"stage.{name}": value if rule else None for name, value in limits.items()}
    server = stage.model_dump(include={"backend", "model", "adapters", "adapter_column"})
    state |= {f"stage.{name}": value if stage.backend == "openai" else None for name, value in server.items()}
    if stage.engine == "ray":
        from finsa.inference import ray_data  # imports Ray

        workers = ray_data.connect(stage.ray)  # before anything is written
    predict.begin(folder, state)
    with locks.held(predict.lock_file(folder, share.rank), f"output {output}"), predict.undone(folder, share):
        predict.enter(folder, share)
        if share.rank == 0 and (done := len(list(folder.glob("chunk-*")))):
            print(f"resuming: {done:,} chunks of up to {stage.chunk:,} rows are done ({folder})")
        for note in stream.notes:
            print(note)
        found, quantized = columns or stream.first_columns, None
        receipt_file = output.with_name(f"{output.name}.{receipts.FILE}")
        open_writer = partial(row_files.open_writer, target, columns, stream.schema)
        started = time.monotonic()
        if stage.engine == "ray":
            open_input = partial(row_files.open_stream, str(file), form, reading, csv)
            job = ray_data.Job(record, cfg.train, rule, open_input, open_writer, reading, found, folder, stage.chunk)
            with predict.progress_bar(stream.total, shown=True) as show:
                chunks, rows, added = ray_data.run(job, stage.ray, workers, cfg.train.process_timeout, show)
            writer, by = open_writer(added.types()), f" by {counted(workers, 'Ray worker')}"
        else:
            model = _load(cfg, record, rule)
            if cfg.model.inference == "int8":
                texts, gold = receipts.validation_rows(record.cfg, session)
                if not texts:
                    text = "the validation rows of the run, on which it is compared, are gone"
                    raise DataError(f"model.inference=int8: {text}")
                quantized = receipts.quantize(model, texts, gold)
                print(receipts.describe(quantized))
            if stage.adapter_column is not None and stage.adapter_column not in found:
                raise DataError(f"stage.adapter_column: the input has no column '{stage.adapter_column}'")
            compared = receipt_file.is_file() and any(folder.glob("chunk-*"))  # otherwise of an earlier output
            if stage.backend == "openai" and stage.receipt and share.rank == 0 and not compared:
                if source == "-":
                    print("note: a pipe cannot be read twice, so the scores of the server are not compared")
                else:
                    again = row_files.open_stream(source, form, reading, csv)
                    _compare(cfg, record, model, again, reading, receipt_file)
            added = Columns.of(model, found)
            writer = open_writer(added.types())
            started = time.monotonic()
            chunks, rows = predict.predict(model, stream, reading, folder, writer, added, share, stage.chunk)
            by = f" by process 0 of {share.processes}" if share.processes > 1 else ""
        seconds = max(time.monotonic() - started, 1e-9)
        if share.rank != 0:
            return Result("predict", None, {"rows": rows})
        predict.wait(folder, chunks, share, cfg.train.process_timeout)
        counts = predict.join(folder, chunks, writer, output, rejected)
    if not chunks:
        print("note: the input has no rows")
    print(f"predicted {counted(rows)}{by} in {seconds:.1f} s: {rows / seconds:,.0f} rows/s")
    if counts.get("truncated"):
        print(f"truncated texts: {counts['truncated']:,}")
    if counts.get("rejected"):
        print(f"rejected rows: {counts['rejected']:,} ({rejected})")
    print(f"wrote {counted(counts.get('answered', 0))} to {output}")
    results: dict[str, Any] = {"rows": rows, "rows_per_second": rows / seconds, **counts}
    if quantized is not None:
        results["receipt"] = quantized
        files.write_text(receipt_file, json.dumps(quantized, indent=1) + "\n")
    return Result("predict", None, results)


def _compare(cfg: RunConfig, record: Record, model: Predictor, stream: Stream, reading: Reading, file: Path) -> None:
    """Score the first texts with the server and with the run, and write a receipt.

    Raises:
        RunError: if their predictions differ on more of them than the stage allows.
    """
    stage = cfg.stage
    scorer: Any = model.scorer
    assert isinstance(stage, PredictStage)
    rows = next(iter(stream.chunks(stage.receipt)), [])
    if stage.adapters is not None:  # the run is none of these
        rows = [row for row in rows if stage.model and model.choose(row.values)[0] == stage.model]
    texts = model.check_room([("", 0, row.fault) if row.fault else reading.text_of(row.values) for row in rows])
    kept = [text for text, fault in texts if fault is None]
    if not kept:
        print("note: stage.model scores no text at the start of the input, so nothing is compared with the run")
        return
    started = time.perf_counter()
    remote = model(kept, models=[str(stage.model)] * len(kept) if stage.adapters else None)
    seconds = {"server": time.perf_counter() - started}
    run = predictor.for_files(record, cfg.train, None)
    started = time.perf_counter()
    local = run(kept)
    seconds["run"] = time.perf_counter() - started
    run.close()
    agreement, largest, mean = receipts.agreement(record.labels, remote, local)
    receipt = {
        "rows": len(kept),
        "agreement": agreement,
        "largest_difference": largest,
        "mean_difference": mean,
        "url": stage.url,
        "model": scorer.model,
        "sent": "token ids" if scorer.as_ids else "text",
        "prompts_with_other_tokens": scorer.other_tokens,
        "rows_per_second": {name: round(len(kept) / value, 1) for name, value in seconds.items()},
    }
    print(
        f"receipt: equal predictions on {agreement:.2%} of {len(kept):,} texts; largest difference of a "
        f"{'number' if record.labels.task == 'regression' else 'probability'} {largest:.2g}, mean {mean:.2g}; "
        f"{receipt['sent']} sent, "
        f"{scorer.other_tokens} prompts with other tokens"
    )
    if agreement < stage.agreement:
        raise RunError(
            f"stage.url: agreement {agreement:.4f} is below stage.agreement={stage.agreement}: "
            f"{scorer.model} there is another model than {record.path} or rounds further; nothing is predicted"
        )
    file.write_text(json.dumps(receipt, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _csv(cfg: RunConfig, record: Record, source: str) -> Csv:
    """Format of the input: from the command, otherwise that of the run's data; valid UTF-8 is always read as UTF-8."""
    given, trained = cfg.data.csv.model_dump(exclude_none=True), record.cfg.data.csv
    if source != "-" and trained.encoding is not None and encodings.is_utf8(locate(source)):
        trained = trained.model_copy(update={"encoding": None})
    return trained.model_copy(update=given)


def _load(cfg: RunConfig, record: Record, rule: selective.Rule | None) -> Predictor:
    stage = cfg.stage
    assert isinstance(stage, PredictStage)
    if stage.backend == "local":
        return predictor.for_files(record, cfg.train, rule)
    model = predictor.served(record, stage, stage.adapter_column, stage.adapters)
    model.selection = rule
    return model
