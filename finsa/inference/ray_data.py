"""Prediction of an input by the workers of a Ray cluster, with Ray Data.

One task next to the command reads the input in order and yields one block per chunk. Each worker is an actor with a
model; it writes the file of a chunk that it has predicted, as `finsa.inference.predict` does, and reports its number.
If a worker is lost, Ray starts it again where there is room, and the chunks that it had are left out; a further pass
over the input predicts what is missing. So nothing depends on Ray's memory, and a repeated command resumes.
"""

from __future__ import annotations

import json
import logging
import platform
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle  # by which Ray itself sends arguments; between processes of a command, never from files
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finsa.config import RayCluster, Train
from finsa.data.schema import Reading
from finsa.errors import ConfigError, FinsaError, Problem, RunError, counted
from finsa.evaluation import selective
from finsa.inference import predict, predictor
from finsa.inference.predict import Columns
from finsa.inference.predictor import Record
from finsa.inference.row_files import Stream, Writer
from finsa.runs import processes


@dataclass(frozen=True)
class Job:
    """What the reader and the workers need to know; it is sent to them.

    Args:
        record, train, rule: see `predictor.for_files`.
        open_input: opens the input.
        open_writer: creates the writer of the output from the types of the added columns.
        reading: extracts the text of a row.
        columns: of the input.
        folder: receives one file per chunk, on a file system that all nodes share.
        size: rows per chunk.
    """

    record: Record
    train: Train
    rule: selective.Rule | None
    open_input: Callable[[], Stream]
    open_writer: Callable[[dict[str, type]], Writer]
    reading: Reading
    columns: list[str]
    folder: Path
    size: int


class Worker:
    """An actor that loads the model and predicts chunks. Its errors are returned; only a lost worker raises one."""

    def __init__(self, job: Job) -> None:
        processes.quiet()
        self.job, self.fault = job, ""
        try:
            self.model = predictor.for_files(job.record, job.train, job.rule)
            self.added = Columns.of(self.model, job.columns)
            self.writer = job.open_writer(self.added.types())
        except Exception as error:
            self.fault = _message(error)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Predict and write the chunks of a block; a row of the result reports a chunk, or the end of the input."""
        return pa.Table.from_pylist([self._report(**values) for values in block.to_pylist()])

    def _report(self, number: int, header: bytes, position: int, rows: bytes | None, fault: str) -> dict[str, Any]:
        answered, added = 0, b""
        try:
            if not (fault := fault or self.fault):
                if rows is None:
                    added = cloudpickle.dumps(self.added)
                else:
                    answered = self._predict(predict.chunk_file(self.job.folder, number), rows, json.loads(header))
        except Exception as error:
            fault = _message(error)
        return {"number": number, "answered": answered, "position": position, "fault": fault, "added": added}

    def _predict(self, file: Path, rows: bytes, header: dict[str, Any]) -> int:
        known = predict.read_header(file)
        if known is not None:  # written before, but the worker was lost before it could report that
            return int(known["counts"]["answered"])
        encoded, rejected, counts = predict.predict_rows(
            self.model, cloudpickle.loads(rows), self.job.reading, self.writer, self.added
        )
        predict.write_chunk(file, {**header, "counts": counts}, encoded, rejected)
        return counts["answered"]


def _read(_: Any, job: Job, done: frozenset[int]) -> Iterator[pa.Table]:
    """Read the chunks that are not done, always the same, as Ray demands; a last row has the number of all chunks."""
    number, position, fault = 0, 0, ""
    try:
        stream = job.open_input()
        for number, rows, header, _known in predict.read_chunks(stream, job.folder, job.size):
            position = stream.position
            if number not in done:
                yield _block(number, json.dumps(header).encode(), position, cloudpickle.dumps(rows), "")
            number += 1  # the number of chunks after the last one
    except Exception as error:
        fault = _message(error)
    yield _block(number, b"", position, None, fault)


def _block(number: int, header: bytes, position: int, rows: bytes | None, fault: str) -> pa.Table:
    values = {"number": number, "header": header, "position": position, "rows": rows, "fault": fault}
    kinds = {"header": pa.large_binary(), "rows": pa.large_binary(), "fault": pa.string()}
    schema = pa.schema([(name, kinds.get(name, pa.int64())) for name in values])
    return pa.Table.from_pylist([values], schema=schema)


def _message(error: Exception) -> str:
    """A user's error in one line, anything else with its traceback."""
    if isinstance(error, FinsaError | OSError | MemoryError):
        return f"{error or 'out of memory'} (on node {platform.node()})"
    return traceback.format_exc()


# ------------------------------------------------------------------------------------------------ the command


def connect(cluster: RayCluster) -> int:
    """Connect to a cluster, and return the number of workers.

    Raises:
        ConfigError: if there is none at its address, or the workers do not fit into it.
    """
    if ray.is_initialized():
        text = "ray inside a job of hydra/launcher=ray would wait for its own cores: leave one of them out"
        raise ConfigError([Problem("stage.engine", text)])
    processes.require_cluster(cluster.address, "stage.ray.address")
    own = {"include_dashboard": False} if cluster.address == "local" else {}
    try:
        ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        text = (
            f"no Ray cluster at '{cluster.address}' ({reason}). Start one (ray start --head) or connect this machine "
            "to one (ray start --address=<head>:6379), or use this machine alone (stage.ray.address=local)"
        )
        raise ConfigError([Problem("stage.ray.address", text)]) from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": cluster.cpus, "GPU": cluster.gpus}
    fit = int(sum(min(node.get(name, 0) // count for name, count in wanted.items() if count) for node in nodes))
    if fit < (cluster.workers or 1):
        has = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes[:8])
        text = (
            f"{counted(fit, 'worker')} with {cluster.cpus} CPU cores and {cluster.gpus:g} GPUs fit into the cluster, "
            f"{cluster.workers or 1} are needed; CPU cores and GPUs by node: {has}. Lower stage.ray.workers, "
            "stage.ray.cpus or stage.ray.gpus, or add nodes"
        )
        raise ConfigError([Problem("stage.ray.workers", text)])
    return cluster.workers or fit


def run(
    job: Job, cluster: RayCluster, workers: int, patience: float, show: Callable[[int, int], None]
) -> tuple[int, int, Columns]:
    """Predict all chunks that do not exist yet.

    Args:
        job: what to predict.
        cluster: resources of a worker.
        workers: number of them.
        patience: seconds without a new chunk after which the workers are considered lost.
        show: called with the position in the input and the number of new rows.

    Returns:
        Number of chunks of the whole input, number of new rows without rejected ones, and columns of the predictions.

    Raises:
        RunError: if a worker reports an error, or workers are lost without finishing a chunk.
    """
    done = {int(file.name[6:]) for file in job.folder.glob("chunk-*") if predict.read_header(file) is not None}
    answered, kept = 0, f"finished rows are kept in {job.folder}, and the same command resumes from there"
    while True:
        before, end = len(done), None
        try:
            for report in _reports(job, cluster, workers, patience, frozenset(done)):
                if fault := report["fault"]:
                    if fault.startswith("Traceback"):
                        raise RuntimeError(f"of a Ray worker:\n{fault}")
                    raise RunError(fault)
                if report["added"]:
                    end = report
                    continue
                done.add(report["number"])
                answered += report["answered"]
                show(report["position"], answered)
        except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
            raise RunError(f"Ray: {str(error).strip().splitlines()[0][:200]}; {kept}") from error
        if end is not None and len(done) == end["number"]:
            ray.shutdown()
            return end["number"], answered, cloudpickle.loads(end["added"])
        if len(done) == before:
            raise RunError(
                "all Ray workers were lost before they finished a chunk; they may need more memory (fewer workers per "
                f"node, or a smaller stage.chunk); {kept}"
            )
        print("a worker was lost; its chunks are predicted again", flush=True)


def _reports(
    job: Job, cluster: RayCluster, workers: int, patience: float, done: frozenset[int]
) -> Iterator[dict[str, Any]]:
    """One pass over the input: the reports of the workers, as they come."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # so that every chunk is a block
    context.max_errored_blocks = -1  # the chunks of a lost worker are left out instead of ending the pass
    context.execution_no_progress_timeout_s = patience
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    with DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)  # there is no other way to say this
        source = ray.data.from_items([{"start": 0}], override_num_blocks=1)
        blocks = source.map_batches(
            _read,
            fn_kwargs={"job": job, "done": done},
            batch_format="pyarrow",
            num_cpus=0,
            ray_remote_args_fn=lambda: {"scheduling_strategy": here},
        )
        reports = blocks.map_batches(
            Worker,
            fn_constructor_kwargs={"job": job},
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
            compute=ActorPoolStrategy(size=workers),
            ray_remote_args_fn=lambda: {"max_task_retries": 0},  # a retry would wait until the lost worker is back
        )
        yield from reports.iter_rows()
