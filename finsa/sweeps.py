"""What a sweep's jobs came to, and the report at its end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from finsa import composition
from finsa.config import ReportStage
from finsa.errors import FinsaError
from finsa.runs import Result


@dataclass(frozen=True)
class Job:
    """One finished or failed job of the sweep that this process runs."""

    overrides: tuple[str, ...]
    result: Result | None
    error: str = ""


_jobs: list[Job] = []
_folder: list[Path] = []


def _overrides() -> tuple[str, ...]:
    hydra = HydraConfig.get()
    _folder[:] = [Path(hydra.sweep.dir)]
    return tuple(hydra.overrides.task)


def _names(jobs: list[Job]) -> dict[str, Job]:
    """Name every job by what distinguishes it from the others."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    names: dict[str, Job] = {}
    for number, job in enumerate(jobs):
        name = " ".join(text for text in job.overrides if text not in common) or f"job {number}"
        names[name if name not in names else f"{name} ({number})"] = job
    return names


def finished(result: Result) -> None:
    """Note a job that came to its end."""
    _jobs.append(Job(_overrides(), result))


def failed(error: str) -> None:
    """Note a job that failed, and say so at once."""
    _jobs.append(Job(_overrides(), None, error))
    print(f"job {len(_jobs) - 1} failed: {error}", file=sys.stderr)


def conclude() -> int:
    """Write and print the sweep's report and return the exit code.

    Returns:
        0 where no sweep ran or all its jobs finished; 1 where some failed.
    """
    if not _jobs:
        return 0
    jobs = _names(_jobs)
    failures = {name: job.error for name, job in jobs.items() if job.result is None}
    _jobs.clear()
    scored = {name: job.result for name, job in jobs.items() if job.result and "test" in job.result.metrics}
    if scored:
        _compare(scored, failures, f"sweep of {len(jobs)} jobs, test split")
        print(f"sweep folder: {_folder[0]}")
    for name, error in failures.items():
        print(f"failed: {name}\n  {error}", file=sys.stderr)
    return 1 if failures else 0


def _compare(scored: dict[str, Result], failures: dict[str, str], title: str) -> None:
    """Write the jobs' scores as they are, then the report; where the jobs cannot be compared, say why instead."""
    from finsa.evaluation import report, tables

    rows = {name: result.metrics["test"] for name, result in scored.items()}
    tables.write_comparison(rows, _folder[0])
    print(title)
    try:
        paths = [result.run_dir for result in scored.values() if result.run_dir is not None]
        made = report.build(paths, _options(), None, failures)
        report.write(made, _folder[0])
        report.show(made, _folder[0], f"python run.py stage=report runs={_folder[0]}")
    except FinsaError as error:
        tables.show_comparison(rows, title)
        print(f"no report: {error}", file=sys.stderr)


def _options() -> ReportStage:
    """The report's options as ``conf/stage/report.yaml`` has them."""
    overrides = ["stage=report", f"runs='{_folder[0]}'"]
    values, choices = composition.compose_values(overrides)
    stage = composition.build(values, choices, overrides).stage
    assert isinstance(stage, ReportStage)
    return stage
