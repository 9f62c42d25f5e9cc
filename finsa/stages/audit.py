"""Score answer files of any system by the reading rules of several publications."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from finsa.config import AuditStage, RunConfig
from finsa.evaluation import audit, figures, pages
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Read the answers, score them by every rule, and report which order of the systems depends on the rule."""
    stage = cfg.stage
    assert isinstance(stage, AuditStage)
    systems = audit.load([cfg.input] if isinstance(cfg.input, str) else cfg.input or (), stage)
    records, remarks = audit.audit(systems, stage)
    folder = Path(cfg.output or f"{cfg.output_dir}/audit_{datetime.now():%Y-%m-%d_%H-%M-%S}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"systems": ", ".join(system.name for system in systems)}
    title = "Weighted F1 of the same answers by reading rule"
    figure = figures.bars(records, "rule", "system", "weighted_f1", title, "weighted F1", folder / "audit.png")
    pages.publish(folder, "audit", "Answers by reading rule", facts, remarks, [audit.table(records)], figure, records)
    return Result("audit", folder, {f"{record['system']}, {record['rule']}": record for record in records})
