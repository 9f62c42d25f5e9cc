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
    """Print the sweep's comparison and return the exit code.

    Returns:
        0 where no sweep ran or all its jobs finished; 1 where some failed.
    """
    if not _jobs:
        return 0
    jobs = _names(_jobs)
    failures = {name: job for name, job in jobs.items() if job.result is None}
    _jobs.clear()
    rows = {
        name: job.result.metrics["test"] for name, job in jobs.items() if job.result and "test" in job.result.metrics
    }
    if rows:
        from finsa.evaluation import tables

        tables.write_comparison(rows, _folder[0])
        tables.show_comparison(rows, f"sweep of {len(jobs)} jobs, test split")
        print(f"sweep folder: {_folder[0]}")
    for name, job in failures.items():
        print(f"failed: {name}\n  {job.error}", file=sys.stderr)
    return 1 if failures else 0
