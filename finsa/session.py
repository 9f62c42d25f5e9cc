"""What the jobs of one command share, and where the job that is running belongs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


@dataclass(frozen=True)
class Job:
    """A job as Hydra runs it: the whole command, or one combination of a sweep.

    Args:
        overrides: what the command line sets for this job.
        choices: the file chosen from each configuration group.
        folders: added to ``conf/`` with ``--config-dir``.
        output_dir: the folder that Hydra gives the job.
        sweep_dir: folder of the sweep that the job belongs to; None outside of a sweep.
        number: of the job within the sweep, from 0.
    """

    overrides: tuple[str, ...]
    choices: dict[str, str | None]
    folders: tuple[Path, ...]
    output_dir: Path
    sweep_dir: Path | None
    number: int


def current_job() -> Job | None:
    """The job that Hydra is running in this process; None outside of Hydra. The only place that asks Hydra."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    return Job(
        overrides=tuple(hydra.overrides.task),
        choices=dict(hydra.runtime.choices),
        folders=tuple(Path(s.path) for s in hydra.runtime.config_sources if s.provider == "command-line"),
        output_dir=Path(hydra.runtime.output_dir).absolute(),
        sweep_dir=Path(hydra.sweep.dir).absolute() if sweep else None,
        number=int(hydra.job.num) if sweep else 0,
    )


@dataclass(frozen=True)
class Parent:
    """A larger run that a run is part of, such as the search that a trial belongs to.

    Args:
        path: folder of the run, below the parent's.
        name: of the parent; trackers group by it.
        watch: receives every logged step with its values; may raise `Pruned` to stop the run.
    """

    path: Path
    name: str
    watch: Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Session:
    """State that the jobs of a command share; created by the command line and passed on.

    Args:
        job: the job that is running; None where stages are called without Hydra.
        parent: the larger run that the next run is part of.
        own_folders: runs get folders of their own below ``output_dir``, even within a sweep's job (links of a chain).
        own_data: the running link of a chain names its data, which an evaluation then scores.
        datasets: loaded data sets by settings and files, see `finsa.data.dataset.load`.
        tokenized: rendered and tokenized data sets, see `finsa.data.tokenized.build`.
        base_models: the loaded base model, see `finsa.models.base.load_base`.
        start_scores: of training rows, by the model that training starts from, or by models that were not trained on
            them; see `finsa.training.preferences`.
        run_folders: those that the command has opened.
        errors: of a job outside of a sweep, which the command line reports.
        measures: functions of true classes (n,), predicted classes (n,) and probabilities (n, c), by the name under
            which they are reported; only for callers in Python, never from YAML.
    """

    job: Job | None = None
    parent: Parent | None = None
    own_folders: bool = False
    own_data: bool = False
    datasets: dict[str, Any] = field(default_factory=dict)
    tokenized: dict[tuple[object, ...], Any] = field(default_factory=dict)
    base_models: dict[str, Any] = field(default_factory=dict)
    start_scores: dict[tuple[object, ...], Any] = field(default_factory=dict)
    run_folders: list[Path] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    measures: dict[str, Callable[..., float]] = field(default_factory=dict)

    def for_job(self, job: Job | None) -> Session:
        """This session while a job of the command runs."""
        return replace(self, job=job)

    def below(self, parent: Parent) -> Session:
        """This session for a run that is part of a larger one."""
        return replace(self, parent=parent)

    def with_own_folders(self) -> Session:
        """This session for runs that get folders of their own, such as the links of a chain."""
        return replace(self, own_folders=True)

    @property
    def overrides(self) -> tuple[str, ...]:
        """What the command line sets for the job that is running."""
        return self.job.overrides if self.job else ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that the command adds to ``conf/`` with ``--config-dir``."""
        return self.job.folders if self.job else ()

    @property
    def group(self) -> str | None:
        """Name of the larger run or the sweep that a run belongs to; None where it stands alone."""
        if self.parent is not None:
            return self.parent.name
        return self.job.sweep_dir.name if self.job and self.job.sweep_dir else None
