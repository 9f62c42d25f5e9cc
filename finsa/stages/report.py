"""Compare finished runs: tables, significance tests, figures and a page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from finsa.config import ReportStage, RunConfig, locate
from finsa.evaluation import finished_runs, report
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Report on the runs in ``runs``, next to a published table if one is selected."""
    assert isinstance(cfg.stage, ReportStage)
    paths = finished_runs.find_folders(cfg.runs) if cfg.runs else []
    names = [cfg.runs] if isinstance(cfg.runs, str) else cfg.runs or []
    made = report.build(paths, cfg.stage, cfg.published, {}, [locate(name) for name in names])
    folder = _folder(cfg)
    report.write(made, folder)
    named = cfg.runs if isinstance(cfg.runs, str) or cfg.runs is None else f"[{','.join(cfg.runs)}]"
    report.show(made, folder, f"python run.py stage=report runs={named}" if named else None)
    rows = made.comparison.records if made.comparison else []
    return Result("report", folder, {record["arm"]: record for record in rows})


def _folder(cfg: RunConfig) -> Path:
    """The folder of the report: ``output``, the folder that contains all runs, or a new one below ``output_dir``."""
    if cfg.output is not None:
        return Path(cfg.output).absolute()
    if isinstance(cfg.runs, str) and not (locate(cfg.runs) / "run.json").is_file():
        return locate(cfg.runs)
    return Path(cfg.output_dir).absolute() / f"report_{datetime.now():%Y-%m-%d_%H-%M-%S}"
