"""Experiment trackers, which copy results of the run folder; the folder is complete without them."""

from __future__ import annotations

import csv
import netrc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, assert_never

from finsa.config import RunConfig, Tracking
from finsa.runs import processes


class Tracker:
    """Receives metrics and figures of a run; this base class discards them."""

    def log(self, step: int, record: dict[str, float]) -> None:
        """Log metrics of a step."""

    def summary(self, values: dict[str, Any]) -> None:
        """Log the final metrics of a run."""

    def figure(self, name: str, file: Path) -> None:
        """Log a figure, a PNG file."""


class WandbTracker(Tracker):
    """Logs to a wandb run."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, step: int, record: dict[str, float]) -> None:
        """Log metrics of a step."""
        self.run.log(record, step=step)

    def summary(self, values: dict[str, Any]) -> None:
        """Write the final metrics to the summary of the run."""
        self.run.summary.update(values)

    def figure(self, name: str, file: Path) -> None:
        """Log a figure as an image."""
        import wandb

        self.run.log({name: wandb.Image(str(file))})


@contextmanager
def track(cfg: RunConfig, folder: Path, group: str | None) -> Iterator[Tracker]:
    """Open the configured tracker for one job, and close it at the end.

    Args:
        cfg: the configuration, which is logged as well.
        folder: the run folder; an offline wandb run is written below it.
        group: the sweep or the larger run that the job belongs to; None if it is not part of one.
    """
    if cfg.tracking.name == "none" or not processes.is_main():
        yield Tracker()
    elif cfg.tracking.name == "wandb":
        with _wandb(cfg, folder, group) as tracker:
            yield tracker
    else:
        assert_never(cfg.tracking.name)


@contextmanager
def _wandb(cfg: RunConfig, folder: Path, group: str | None) -> Iterator[WandbTracker]:
    import wandb

    earlier = next(folder.glob("wandb/*run-*-*"), None)  # of a resumed run, which continues its wandb run
    run_id = earlier.name.rsplit("-", 1)[1] if earlier else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = wandb.init(
            id=run_id,
            resume="allow" if run_id else None,
            project=cfg.tracking.project,
            entity=cfg.tracking.entity,
            mode=wandb_mode(cfg.tracking),
            name=folder.name,
            group=group,
            job_type=cfg.stage.name,
            tags=list(cfg.tracking.tags),
            dir=str(folder),
            config=cfg.model_dump(mode="json"),
            settings=_settings(),
            reinit="finish_previous",
        )
    failed = True
    try:
        yield WandbTracker(run)
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def log_report(tracking: Tracking, folder: Path) -> None:
    """Log the report of a sweep, as a further run of its group.

    Args:
        tracking: settings of the jobs.
        folder: of the sweep; contains ``report.html``, ``report.csv`` and ``figures/``.
    """
    if tracking.name != "wandb":
        return
    import wandb

    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        mode=wandb_mode(tracking),
        name=f"{folder.name} report",
        group=folder.name,
        job_type="report",
        tags=list(tracking.tags),
        dir=str(folder),
        settings=_settings(),
        reinit="finish_previous",
    )
    try:
        with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        with (folder / "report.html").open(encoding="utf-8") as file:
            page = wandb.Html(file)
        figures = {file.stem: wandb.Image(str(file)) for file in sorted((folder / "figures").glob("*.png"))}
        run.log({"table": wandb.Table(header, rows), "page": page, **figures})
    finally:
        run.finish()


def _settings() -> Any:
    import wandb

    return wandb.Settings(console="off", silent=True, x_disable_meta=True, x_disable_stats=True)


def wandb_mode(tracking: Tracking) -> Any:
    """Resolve ``auto``: online if an API key is configured, otherwise offline."""
    if tracking.mode != "auto":
        return tracking.mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_key() else "offline"


def _has_netrc_key() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
