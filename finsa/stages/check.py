"""Validate a configuration and print the plan of its run, without loading weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from finsa import baselines
from finsa.config import CheckStage, MoeJointStage, RunConfig
from finsa.config.base import MEASURES
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError, FinsaError, Problem
from finsa.evaluation import tables
from finsa.runs import nested, run_folder
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.training import preflight


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Print rows, token lengths, steps, parameters and memory of the run, or of each link of a chain."""
    session = session or Session()
    assert isinstance(cfg.stage, CheckStage)
    if cfg.stage.links:
        return _check_chain(cfg, cfg.stage.links, session)
    return _check_run(cfg, session, _power_lines(cfg, cfg.stage, session))


def _check_run(cfg: RunConfig, session: Session, lines: dict[str, object] | None = None) -> Result:
    """Check and plan one run.

    Args:
        lines: further ones for the table.
    """
    if cfg.data.corpus is not None and cfg.stage.name in ("check", "pretrain") and cfg.method.baseline is None:
        from finsa.training import check_plan  # imports torch, which errors and baselines do not need

        return check_plan.show_pretraining(cfg, lines or {})
    data = dataset.load(cfg.data, session)
    preflight.require_trainable(cfg, data, session, planned=True)
    if cfg.method.baseline is None:
        from finsa.training import check_plan

        return check_plan.show_training(cfg, lines or {}, session)
    rows = tokenized.Labeled(data, **tokenized.labeled_settings(cfg, session))
    texts = rows.texts("train")
    plan = baselines.build(cfg, data.labels.names).plan([texts[row] for row in rows.training_order(cfg)])
    table = {
        "rows": data.sizes(),
        "labels": ", ".join(data.labels.names),
        "language model": "none",
        **plan,
        **(lines or {}),
    }
    tables.show_plan(f"{cfg.stage.name}: {cfg.method.name}, {cfg.data.title}", table)
    if cfg.stage.name == "check":
        tables.show_ledger(data.ledger, {})
    return Result("check", None, {})


def _power_lines(cfg: RunConfig, stage: CheckStage, session: Session) -> dict[str, object]:
    """Lines on the differences that the test split detects, for one class per row.

    Raises:
        ConfigError: unless ``runs`` names two runs.
    """
    if cfg.data.task in MEASURES or cfg.data.corpus is not None:
        return {}
    accuracy, disagreement = stage.accuracy, stage.disagreement
    data = dataset.load(cfg.data, session)
    counts = np.bincount(data.splits["test"]["label"].to_numpy(), minlength=len(data.labels))
    if not counts.sum():
        return {}
    from finsa.evaluation import finished_runs, power  # imports scipy, after the checks of the rows

    if cfg.runs:
        runs, _ = finished_runs.load(finished_runs.find_folders(cfg.runs))
        if len(runs) != 2 or runs[0].rows != runs[1].rows:
            raise ConfigError(
                [Problem("runs", "stage=check compares two runs on the same test rows; name two such folders")]
            )
        accuracy = min(float(run.correct.mean()) for run in runs)
        disagreement = max(float((runs[0].correct != runs[1].correct).mean()), 1 / len(runs[0].rows))
    return dict(power.describe(counts.tolist(), accuracy, disagreement, stage.power, stage.difference))


# ------------------------------------------------------------------------------------------------ a chain


def _check_chain(cfg: RunConfig, links: dict[str, dict[str, Any]], session: Session) -> Result:
    """Check a chain link by link; all problems are reported together, after the plans of all links.

    Raises:
        ConfigError: with the problems.
    """
    configs = {
        name: nested.configure(cfg, name, {earlier: f"@{earlier}" for earlier in links}, session) for name in links
    }
    problems: dict[str, Problem] = {}
    metrics: dict[str, Any] = {}
    for number, (name, link) in enumerate(configs.items(), start=1):
        print(f"link {number} of {len(links)}, {name}: stage={link.stage.name}", flush=True)
        if link.stage.name in nested.REPEATED or link.run is not None:
            continue  # it reads the output of earlier links
        try:
            metrics[name] = _check_run(link, session, _link_lines(link, configs, session)).metrics
        except FinsaError as error:
            for one in error.problems if isinstance(error, ConfigError) else [_problem(error)]:
                problems.setdefault(f"{one.path}{one.text}", one)
            from finsa.training import check_plan

            metrics[name] = check_plan.show_without_rows(link, session)
    if problems:
        raise ConfigError(problems.values())
    return Result("check", None, metrics)


def _link_lines(link: RunConfig, configs: dict[str, RunConfig], session: Session) -> dict[str, object]:
    """Lines for a link's table: its finished run, and the runs that it would have to train first."""
    fingerprint = None if link.stage.name == "pretrain" else dataset.load(link.data, session).fingerprint
    finished = run_folder.finished(link, fingerprint)
    lines: dict[str, object] = {"finished before": f"{finished}; it is skipped"} if finished else {}
    if isinstance(link.stage, MoeJointStage):
        from finsa.training import expert_runs

        named = link.stage.experts or dict.fromkeys(expert_runs.names(link.stage, dataset.load(link.data, session)))
        wanted = {
            f"expert {name}": expert_runs.expert_config(link, name) for name, place in named.items() if place is None
        }
        if link.stage.compare:
            wanted["one adapter on all domains, to compare with"] = expert_runs.expert_config(link, None)
        hashes = {run_folder.config_hash(other) for other in configs.values()}
        missing = [
            title
            for title, one in wanted.items()
            if run_folder.config_hash(one) not in hashes
            and run_folder.finished(one, dataset.load(one.data, session).fingerprint) is None
        ]
        lines["trained first"] = "; ".join(missing) or "nothing"
    return lines


def _problem(error: FinsaError) -> Problem:
    """Convert an error to a list entry; its message begins with the key or file that it concerns."""
    place, _, text = str(error).partition(": ")
    return Problem(place, text) if text else Problem("stage.links", place)
