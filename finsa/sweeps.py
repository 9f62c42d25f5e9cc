"""Records of a sweep's jobs, and the report at the end of the sweep.

Every job writes ``job.json`` to its folder, so that jobs that ran in other processes or on other machines count too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf, flag_override

from finsa.config import ReportStage, RunConfig, Tracking, compose
from finsa.config.base import headline
from finsa.config.catalogue import Folders
from finsa.errors import FinsaError
from finsa.runs import run_folder, trackers
from finsa.runs.run_folder import JOB, Result, RunFolder
from finsa.session import Job

STARTED = "FINSA_SWEEP_DIR"  # environment variable: folder of the sweep that this process started


class Remember(Callback):
    """Passes the sweep's folder on: Hydra creates this object and returns nothing, so it goes by the environment."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Keep the sweep's folder for `conclude`; the jobs may run in other processes, or on other machines."""
        os.environ[STARTED] = str(Path(config.hydra.sweep.dir).absolute())
        init = OmegaConf.select(config, "hydra.launcher.ray.init")
        if init is None:
            return
        with flag_override(init, ["struct", "readonly"], False):
            if init.get("address"):
                init.object_store_memory = None  # the launcher has a default, which a running cluster refuses
            else:
                init.address, init.include_dashboard = "local", False


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep, as recorded in ``job.json``.

    Args:
        overrides: of the command line, for this job.
        status: ``complete``, ``failed``, or ``running`` for one that was stopped.
        run: its run folder, which an earlier sweep may have made; None for a stage that writes none.
        error: why it failed.
        published: name of the published table it belongs to.
        tracking: as configured.
        output_dir: as configured.
    """

    overrides: tuple[str, ...]
    status: str
    run: Path | None
    error: str
    published: str | None
    tracking: Tracking
    output_dir: Path


def begin(cfg: RunConfig, job: Job) -> None:
    """Record that a job has started."""
    _record(cfg, job, status="running")


def finished(cfg: RunConfig, job: Job, result: Result) -> None:
    """Record that a job has finished."""
    _record(cfg, job, status="complete", run=None if result.run_dir is None else str(result.run_dir))


def failed(cfg: RunConfig, job: Job, error: str) -> None:
    """Record that a job has failed and report it at once; an error that earlier jobs had too is not repeated."""
    assert job.sweep_dir is not None
    known = error in (other.error for other in _jobs(job.sweep_dir))
    _record(cfg, job, status="failed", error=error)
    print(f"job {job.number} failed{' for the same reason' if known else f': {error}'}", file=sys.stderr)


def earlier(cfg: RunConfig, job: Job, data_fingerprint: str | None) -> Result | None:
    """Return the result of the same job if an earlier command has finished it."""
    path = None if cfg.fresh else run_folder.finished(cfg, data_fingerprint)
    if path is None:
        return None
    metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    print(f"job {job.number}: finished before in {path}; fresh=true runs it again")
    return Result(cfg.stage.name, path, metrics, metrics.get("validation", {}).get(headline(cfg.data.task)))


def _record(cfg: RunConfig, job: Job, **facts: Any) -> None:
    folder = job.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        "overrides": list(job.overrides),
        "published": cfg.published and cfg.published.name,
        "tracking": cfg.tracking.model_dump(mode="json"),
        "output_dir": str(Path(cfg.output_dir).absolute()),
        "time": round(time.time(), 3),
    }
    RunFolder(folder, {}).write_json(JOB, {**known, **facts})


def conclude(added: Folders = ()) -> int:
    """Write and print the report of the sweep that this process started, and return the exit code.

    Args:
        added: folders of ``--config-dir``.

    Returns:
        0 if there was no sweep or all its jobs finished; 1 if some failed.
    """
    started = os.environ.pop(STARTED, None)
    if started is None:
        return 0
    folder = Path(started)
    jobs = _names(_jobs(folder))
    failures = {name: job.error for name, job in jobs.items() if job.status != "complete"}
    scored = {name: metrics["test"] for name, job in jobs.items() if "test" in (metrics := _metrics(job.run))}
    if scored:
        _compare(folder, jobs, scored, failures, added)
        print(f"sweep folder: {folder}")
    for error in dict.fromkeys(failures.values()):
        names = [name for name, other in failures.items() if other == error]
        text = f"failed: {_listed(names)}" if len(names) < len(jobs) else f"failed: all {len(jobs)} jobs"
        # Without scores there is no report between this line and the reasons, which were printed as they occurred.
        print(f"{text}\n  {error}" if scored else text, file=sys.stderr)
    return 1 if failures else 0


def _listed(names: list[str], show: int = 8) -> str:
    more = f", … ({len(names)} jobs)" if len(names) > show else ""
    return ", ".join(names[:show]) + more


def _jobs(folder: Path) -> list[SweepJob]:
    found = []
    for file in sorted(folder.glob(f"*/{JOB}"), key=lambda file: (len(file.parent.name), file.parent.name)):
        values = json.loads(file.read_text(encoding="utf-8"))
        run, status = values.get("run"), values["status"]
        lost = "its process was stopped" if status == "running" else ""
        found.append(
            SweepJob(
                tuple(values["overrides"]),
                status,
                Path(run) if run else None,
                values.get("error", lost),
                values["published"],
                Tracking.model_validate({"also": [], **values["tracking"]}, strict=False),
                Path(values.get("output_dir", folder.parent.parent)),
            )
        )
    return found


def _metrics(run: Path | None) -> dict[str, Any]:
    file = run / "metrics.json" if run else None
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}


def _names(jobs: list[SweepJob]) -> dict[str, SweepJob]:
    """Name every job by the overrides that distinguish it from the others."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    names: dict[str, SweepJob] = {}
    for number, job in enumerate(jobs):
        name = " ".join(text for text in job.overrides if text not in common) or f"job {number}"
        names[name if name not in names else f"{name} ({number})"] = job
    return names


def _compare(
    folder: Path, jobs: dict[str, SweepJob], scored: dict[str, Any], failures: dict[str, str], added: Folders
) -> None:
    """Write the jobs' scores, then the report, or the reason why the jobs cannot be compared."""
    from finsa.evaluation import report, tables

    title = f"sweep of {len(jobs)} jobs, test split"
    tables.write_comparison(scored, folder)
    print(title)
    try:
        paths = [job.run for name, job in jobs.items() if name in scored and job.run is not None]
        cfg = _report_config(folder, {job.published for job in jobs.values()}, added)
        assert isinstance(cfg.stage, ReportStage)
        made = report.build(list(dict.fromkeys(paths)), cfg.stage, cfg.published, failures)
        report.write(made, folder)
        report.show(made, folder, f"python run.py stage=report runs={folder}")
    except FinsaError as error:
        tables.scores(scored, title).show()
        print(f"no report: {error}", file=sys.stderr)
        return
    first = next(iter(jobs.values()))
    trackers.log_report(first.tracking, folder, first.output_dir)


def _report_config(folder: Path, published: set[str | None], added: Folders) -> RunConfig:
    """The report's options as ``conf/stage/report.yaml`` has them, and the published table that all jobs name."""
    overrides = ["stage=report", f"runs='{folder}'"]
    if len(published) == 1 and None not in published:
        overrides.append(f"published={published.copy().pop()}")
    return compose.build(*compose.compose_values(overrides, added), overrides)
