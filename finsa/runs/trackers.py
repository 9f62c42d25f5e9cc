"""Experiment trackers, which copy results of the run folder; the folder is complete without them."""

from __future__ import annotations

import csv
import io
import json
import logging
import netrc
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finsa.config import RunConfig, Tracking
from finsa.errors import ConfigError, Problem
from finsa.runs import files, processes

MAX_ROWS = 1000  # of a table of predictions


class Tracker:
    """Receives metrics, figures and tables of a run; this base class discards them."""

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Log metrics of a step."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the final metrics of a run."""

    def figure(self, name: str, file: Path) -> None:
        """Log a figure, a PNG file."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""

    def page(self, name: str, file: Path) -> None:
        """Log an HTML page; most trackers cannot show one."""

    def predictions(self, file: Path, labels: Sequence[str]) -> None:
        """Log the predictions of the test rows.

        Args:
            file: ``predictions.jsonl`` of the run folder.
            labels: the classes; empty for numbers.
        """


class RunTracker(Tracker):
    """Logs to a run of a library, an object whose method `log` takes values by name."""

    run: Any

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        self.run.log(dict(record), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the final metrics of a run."""
        self.run.log(dict(values))

    def confusion_matrix(self, gold: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> None:
        """Log an interactive confusion matrix, if the library has one; a figure shows it in any case."""

    def close(self, failed: bool) -> None:
        """Finish the run."""

    def predictions(self, file: Path, labels: Sequence[str]) -> None:
        """Log the first `MAX_ROWS` predictions as a table, and the confusion matrix of all."""
        records = files.json_lines(file)
        if not records:
            return
        columns = [name for name in records[0] if name not in ("probs", "log_probs", "log_odds", "gates")]
        one_class = isinstance(records[0].get("label"), str)
        rows = [[_cell(record.get(name)) for name in columns] for record in records[:MAX_ROWS]]
        if one_class:
            columns.append("probability")
            for row, record in zip(rows, records, strict=False):
                row.append(record["probs"][record["label"]])
        self.table("predictions", columns, rows)
        if one_class:
            number = {name: place for place, name in enumerate(labels)}
            gold, predicted = ([number[record[key]] for record in records] for key in ("gold", "label"))
            self.confusion_matrix(gold, predicted, labels)


class Several(Tracker):
    """Passes everything on to several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        for tracker in self.trackers:
            tracker.log(step, record)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the final metrics of a run."""
        for tracker in self.trackers:
            tracker.summary(values)

    def figure(self, name: str, file: Path) -> None:
        """Log a figure."""
        for tracker in self.trackers:
            tracker.figure(name, file)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        for tracker in self.trackers:
            tracker.table(name, columns, rows)

    def page(self, name: str, file: Path) -> None:
        """Log an HTML page."""
        for tracker in self.trackers:
            tracker.page(name, file)

    def predictions(self, file: Path, labels: Sequence[str]) -> None:
        """Log the predictions of the test rows."""
        for tracker in self.trackers:
            tracker.predictions(file, labels)


class WandbTracker(RunTracker):
    """Logs to a wandb run, offline below the run folder unless an API key is configured."""

    def __init__(self, tracking: Tracking, folder: Path, info: Mapping[str, Any]) -> None:
        import wandb

        # A resumed run continues its wandb run; a sweep's report is a new one.
        earlier = next(folder.glob("wandb/*run-*-*"), None) if info["job_type"] != "report" else None
        run_id = earlier.name.rsplit("-", 1)[1] if earlier else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.run = wandb.init(
                id=run_id,
                resume="allow" if run_id else None,
                project=tracking.project,
                entity=tracking.entity,
                mode=wandb_mode(tracking),
                tags=list(tracking.tags),
                dir=str(folder),
                settings=wandb.Settings(console="off", silent=True, x_disable_meta=True, x_disable_stats=True),
                reinit="finish_previous",
                **info,
            )

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the final metrics to the summary of the run."""
        self.run.summary.update(dict(values))

    def figure(self, name: str, file: Path) -> None:
        """Log a figure as an image."""
        import wandb

        self.run.log({name: wandb.Image(str(file))})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        import wandb

        self.run.log({name: wandb.Table(list(columns), [list(row) for row in rows], allow_mixed_types=True)})

    def page(self, name: str, file: Path) -> None:
        """Log a page."""
        import wandb

        with file.open(encoding="utf-8") as opened:
            self.run.log({name: wandb.Html(opened)})

    def confusion_matrix(self, gold: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> None:
        """Log wandb's chart of a confusion matrix."""
        from wandb import plot

        chart = plot.confusion_matrix(y_true=list(gold), preds=list(predicted), class_names=list(labels))
        self.run.log({"confusion matrix (interactive)": chart})

    def close(self, failed: bool) -> None:
        """Finish the run."""
        self.run.finish(exit_code=int(failed))


class MlflowTracker(RunTracker):
    """Logs to the server of MLFLOW_TRACKING_URI, or else to ``mlflow.db`` and ``mlartifacts`` below `output_dir`."""

    def __init__(self, tracking: Tracking, folder: Path, info: Mapping[str, Any], store: Path) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.resolve() / 'mlflow.db'}"
        place = None if "MLFLOW_TRACKING_URI" in os.environ else (store / "mlartifacts").resolve().as_uri()
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports the tables of a new database
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self.client.get_experiment_by_name(tracking.project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(tracking.project, place)
        known, self.run_id, self.last = folder / "mlflow.json", "", 0
        if known.is_file() and info["job_type"] != "report":  # a resumed run continues its MLflow run
            saved = json.loads(known.read_text(encoding="utf-8"))
            try:
                self.client.update_run(saved["run_id"], status="RUNNING")
                self.run_id = saved["run_id"]
            except MlflowException:
                pass  # another server, or deleted
        if not self.run_id:
            named = {"group": info["group"], "job_type": info["job_type"], "run_folder": str(folder)}
            tags = {f"finsa.{key}": value for key, value in named.items() if value} | dict.fromkeys(tracking.tags, "")
            self.run_id = self.client.create_run(number, run_name=info["name"], tags=tags).info.run_id
            for key, value in _flat(info["config"]).items():
                self.client.log_param(self.run_id, key, value[:500])
            if info["job_type"] != "report":
                files.write_text(known, json.dumps({"tracking_uri": uri, "run_id": self.run_id}, indent=2) + "\n")

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        self.last = step
        for name, value in record.items():
            self.client.log_metric(self.run_id, name, float(value), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the final metrics."""
        self.log(self.last, {name: value for name, value in values.items() if isinstance(value, int | float)})

    def figure(self, name: str, file: Path) -> None:
        """Log a figure as an artifact."""
        self.client.log_artifact(self.run_id, str(file), "figures")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table as an artifact."""
        values = {column: [row[place] for row in rows] for place, column in enumerate(columns)}
        self.client.log_text(self.run_id, json.dumps(values, ensure_ascii=False), f"{name}.json")

    def page(self, name: str, file: Path) -> None:
        """Log a page as an artifact."""
        self.client.log_artifact(self.run_id, str(file))

    def close(self, failed: bool) -> None:
        """Finish the run."""
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class SwanlabTracker(RunTracker):
    """Logs to a SwanLab run, offline below the run folder unless an API key is configured."""

    def __init__(self, tracking: Tracking, folder: Path, info: Mapping[str, Any]) -> None:
        import swanlab

        online = bool(os.environ.get("SWANLAB_API_KEY") or _has_netrc_key("api.swanlab.cn"))
        mode = tracking.mode if tracking.mode != "auto" else "online" if online else "offline"
        known = folder / "swanlab.json"
        earlier = known.is_file() and info["job_type"] != "report"
        run_id = json.loads(known.read_text(encoding="utf-8"))["run_id"] if earlier else None
        log_dir = folder / "swanlog"
        log_dir.mkdir(exist_ok=True)
        with _quiet():
            self.run = swanlab.init(
                id=run_id,
                resume="allow" if run_id else None,
                project=tracking.project,
                workspace=tracking.entity,
                mode=mode,
                tags=list(tracking.tags),
                log_dir=str(log_dir),
                settings=swanlab.Settings(terminal={"proxy_type": "none"}),
                **info,
            )
        if not earlier and info["job_type"] != "report":
            files.write_text(known, json.dumps({"run_id": self.run.id}) + "\n")

    def figure(self, name: str, file: Path) -> None:
        """Log a figure as an image."""
        import swanlab

        self.run.log({name: swanlab.Image(str(file))})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        import swanlab

        self.run.log({name: swanlab.echarts.Table().add(list(columns), [list(row) for row in rows])})

    def close(self, failed: bool) -> None:
        """Finish the run."""
        with _quiet():
            self.run.finish("crashed" if failed else "success")


class TrackioTracker(RunTracker):
    """Logs to trackio's local database (``trackio show``), or to its server if one is configured."""

    def __init__(self, tracking: Tracking, folder: Path, info: Mapping[str, Any]) -> None:
        import trackio

        with _quiet():
            self.run = trackio.init(
                project=tracking.project,
                name=info["name"],
                group=info["group"],
                config={**info["config"], "job_type": info["job_type"], "tags": list(tracking.tags)},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def figure(self, name: str, file: Path) -> None:
        """Log a figure as an image."""
        import trackio

        self.run.log({name: trackio.Image(str(file))})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        import trackio

        self.run.log({name: trackio.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self, failed: bool) -> None:
        """Finish the run."""
        import trackio

        with _quiet():
            trackio.finish()


class TensorboardTracker(RunTracker):
    """Writes event files into the folder ``tensorboard`` of the run folder."""

    def __init__(self, folder: Path, info: Mapping[str, Any]) -> None:
        self.folder, self.last = folder / "tensorboard", 0
        self.writer: Any = None
        self.resumed = any(self.folder.glob("events.*"))
        self.config = "\n".join(f"    {key}: {value}" for key, value in _flat(info["config"]).items())

    def _writer(self, step: int) -> Any:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run repeats the steps after its checkpoint, which replace those of its earlier files.
            self.writer = SummaryWriter(str(self.folder), purge_step=step if self.resumed else None)
            self.writer.add_text("configuration", self.config, step)
        return self.writer

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        self.last = step
        for name, value in record.items():
            self._writer(step).add_scalar(name, float(value), step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the final metrics at the last step."""
        self.log(self.last, {name: value for name, value in values.items() if isinstance(value, int | float)})

    def figure(self, name: str, file: Path) -> None:
        """Log a figure as an image."""
        from matplotlib import image

        self._writer(self.last).add_image(name, image.imread(file), self.last, dataformats="HWC")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table as Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
        self._writer(self.last).add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), self.last)

    def close(self, failed: bool) -> None:
        """Write what is buffered."""
        if self.writer is not None:
            self.writer.close()


def require_installed(tracking: Tracking) -> None:
    """Check that the libraries of the configured trackers are installed.

    Raises:
        ConfigError: names the extra of each that is missing.
    """
    missing = [name for name in tracking.names if find_spec(name) is None]
    if missing:
        text = f"{', '.join(missing)} not installed: pip install 'finsa[{','.join(missing)}]', or tracking=none"
        raise ConfigError([Problem("tracking", text)])


@contextmanager
def track(cfg: RunConfig, folder: Path, group: str | None) -> Iterator[Tracker]:
    """Open the configured trackers for one job, and close them at the end.

    Args:
        cfg: the configuration, which is logged as well.
        folder: the run folder; local files of trackers are written below it, except the shared store of MLflow
            (``mlflow.db`` and ``mlartifacts`` below `output_dir`) and trackio's own database.
        group: the sweep or the larger run that the job belongs to; None if it is not part of one.
    """
    info = {"name": folder.name, "group": group, "job_type": cfg.stage.name, "config": cfg.model_dump(mode="json")}
    with _opened(cfg.tracking if processes.is_main() else None, folder, info, Path(cfg.output_dir)) as tracker:
        yield tracker


def log_report(tracking: Tracking, folder: Path, output_dir: Path) -> None:
    """Log the report of a sweep, as a further run of its group.

    Args:
        tracking: settings of the jobs.
        folder: of the sweep; contains ``report.html``, ``report.csv`` and ``figures/``.
        output_dir: of the jobs.
    """
    info = {"name": f"{folder.name} report", "group": folder.name, "job_type": "report", "config": {}}
    with _opened(tracking, folder, info, output_dir) as tracker:
        with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        tracker.table("table", header, rows)
        tracker.page("page", folder / "report.html")
        for figure in sorted((folder / "figures").glob("*.png")):
            tracker.figure(figure.stem, figure)


@contextmanager
def _opened(tracking: Tracking | None, folder: Path, info: Mapping[str, Any], output_dir: Path) -> Iterator[Tracker]:
    if tracking is None or not tracking.names:
        yield Tracker()
        return
    require_installed(tracking)
    trackers, failed = list[RunTracker](), True
    try:
        for name in tracking.names:
            if name == "wandb":
                trackers.append(WandbTracker(tracking, folder, info))
            elif name == "mlflow":
                trackers.append(MlflowTracker(tracking, folder, info, output_dir))
            elif name == "swanlab":
                trackers.append(SwanlabTracker(tracking, folder, info))
            elif name == "trackio":
                trackers.append(TrackioTracker(tracking, folder, info))
            elif name == "tensorboard":
                trackers.append(TensorboardTracker(folder, info))
        yield trackers[0] if len(trackers) == 1 else Several(trackers)
        failed = False
    finally:
        for tracker in reversed(trackers):
            tracker.close(failed)


def wandb_mode(tracking: Tracking) -> Any:
    """Resolve ``auto``: online if an API key is configured, otherwise offline."""
    if tracking.mode != "auto":
        return tracking.mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_key("api.wandb.ai") else "offline"


def _has_netrc_key(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what a library prints; errors are raised in any case."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else "" if value is None else json.dumps(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``section.key`` and their text; null is left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = str(value)
    return flat
