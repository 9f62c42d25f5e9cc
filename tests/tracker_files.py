"""Read what trackers have written to local folders, with the reader of each library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Logged:
    """What a tracker has of one run.

    Args:
        scalars: values by name and step.
        files: how many images and tables there are.
        config: the configuration as text.
        runs: number of runs.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    files: int = 0
    config: str = ""
    runs: int = 1


def mlflow(output_dir: Path) -> Logged:
    """The only experiment of a database."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output_dir / 'mlflow.db'}")
    experiments = [one for one in client.search_experiments() if one.name != "Default"]
    runs = client.search_runs([one.experiment_id for one in experiments])
    found = Logged(config=str(runs[0].data.params), runs=len(runs))
    for name in runs[0].data.metrics:
        history = client.get_metric_history(runs[0].info.run_id, name)
        found.scalars[name] = {one.step: one.value for one in sorted(history, key=lambda one: one.timestamp)}
    found.files = sum(path.is_file() for path in (output_dir / "mlartifacts").rglob("*"))
    assert runs[0].info.status == "FINISHED"
    return found


def tensorboard(run: Path) -> Logged:
    """The event files of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    found = Logged(files=len(tags["images"]))
    for name in tags["scalars"]:
        found.scalars[name] = {event.step: event.value for event in events.Scalars(name)}
    for name in tags["tensors"]:
        text = events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
        found.files += "| id |" in text
        found.config += text if name.startswith("configuration") else ""
    return found


def swanlab(run: Path) -> Logged:
    """The offline files of a run folder; a resumed run has several of the same id."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    files = sorted(run.glob("swanlog/run-*/run-*.swanlab"))
    found = Logged(runs=len({file.name for file in files}))
    for file in files:
        reader = DataStoreReader()
        reader.open(str(file))
        while (data := reader.scan()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.HasField("scalar"):
                found.scalars.setdefault(record.scalar.key, {})[record.scalar.step] = record.scalar.value.number
    found.files = sum(path.is_file() for path in run.glob("swanlog/run-*/media/*/*"))
    found.config = "".join(path.read_text("utf-8") for path in run.glob("swanlog/run-*/files/config.yaml"))
    return found


def trackio(project: str) -> Logged:
    """A project of trackio's database."""
    from trackio.sqlite_storage import SQLiteStorage

    names = SQLiteStorage.get_runs(project)
    found = Logged(config=str(SQLiteStorage.get_run_config(project, names[0])), runs=len(names))
    for record in SQLiteStorage.get_logs(project, names[0]):
        for name, value in record.items():
            if isinstance(value, dict):
                found.files += 1
            elif isinstance(value, int | float) and name != "step":
                found.scalars.setdefault(name, {})[record["step"]] = value
    return found
