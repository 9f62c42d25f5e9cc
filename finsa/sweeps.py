"""What a sweep's jobs came to, and the one table at its end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from finsa.runs import Result


@dataclass(frozen=True)
class Job:
    """One finished or failed job of the sweep that this process runs."""

    name: str
    result: Result | None
    error: str = ""


_jobs: list[Job] = []
_folder: list[Path] = []


def _name() -> str:
    hydra = HydraConfig.get()
    _folder[:] = [Path(hydra.sweep.dir)]
    return str(hydra.job.override_dirname) or str(hydra.job.num)


def finished(result: Result) -> None:
    """Note a job that came to its end."""
    _jobs.append(Job(_name(), result))


def failed(error: str) -> None:
    """Note a job that failed, and say so at once."""
    _jobs.append(Job(_name(), None, error))
    print(f"job {_jobs[-1].name} failed: {error}", file=sys.stderr)


def conclude() -> int:
    """Print the sweep's comparison and return the exit code.

    Returns:
        0 where no sweep ran or all its jobs finished; 1 where some failed.
    """
    if not _jobs:
        return 0
    jobs, failures = list(_jobs), [job for job in _jobs if job.result is None]
    _jobs.clear()
    scored = [job for job in jobs if job.result and "test" in job.result.metrics]
    if scored:
        from finsa.evaluation import tables

        rows = {job.name: job.result.metrics["test"] for job in scored if job.result}
        tables.write_comparison(rows, _folder[0])
        tables.show_comparison(rows, f"sweep of {len(jobs)} jobs, test split")
        print(f"sweep folder: {_folder[0]}")
    for job in failures:
        print(f"failed: {job.name}\n  {job.error}", file=sys.stderr)
    return 1 if failures else 0
