"""Validate everything and print the plan, without loading weights."""

from __future__ import annotations

from typing import Any

from finsa import baselines
from finsa.config import CheckStage, MoeJointStage, RunConfig
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError, FinsaError, Problem
from finsa.evaluation import tables
from finsa.runs import nested, run_folder
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Print rows, token lengths, steps, parameters and memory of the run, or of each link of a chain."""
    session = session or Session()
    assert isinstance(cfg.stage, CheckStage)
    return _chain(cfg, cfg.stage.links, session) if cfg.stage.links else _plan(cfg, session)


def _plan(cfg: RunConfig, session: Session, further: dict[str, object] | None = None) -> Result:
    """Plan one run.

    Args:
        further: lines for the table, known to whoever asks.
    """
    if cfg.method.baseline is not None:
        return _plan_baseline(cfg, session)
    from finsa.training import check_plan  # torch, which a baseline need not wait for

    if cfg.data.corpus is not None and cfg.stage.name in ("check", "pretrain"):
        return check_plan.of_pretraining(cfg, further or {})
    return check_plan.of_training(cfg, further or {}, session)


def _plan_baseline(cfg: RunConfig, session: Session) -> Result:
    data = dataset.load(cfg.data, session)
    data.require("train", "validation", "test")
    job = tokenized.Labelled(data)
    texts = job.texts("train")
    learns = baselines.build(cfg, data.labels.names).plan([texts[row] for row in job.training_order(cfg)])
    told = {"rows": data.sizes(), "labels": ", ".join(data.labels.names), "language model": "none", **learns}
    tables.show_plan(f"{cfg.stage.name}: {cfg.method.name}, {cfg.data.title}", told)
    if cfg.stage.name == "check":
        tables.show_ledger(data.ledger, {})
    return Result("check", None, {})


# ------------------------------------------------------------------------------------------------ a chain


def _chain(cfg: RunConfig, links: dict[str, dict[str, Any]], session: Session) -> Result:
    """Plan a chain link by link; what is missing is reported once, behind the plans of all links.

    Raises:
        ConfigError: with everything that is missing.
    """
    configs = {
        name: nested.configure(cfg, name, {earlier: f"@{earlier}" for earlier in links}, session) for name in links
    }
    problems: dict[str, Problem] = {}
    metrics: dict[str, Any] = {}
    for number, (name, link) in enumerate(configs.items(), start=1):
        print(f"link {number} of {len(links)}, {name}: stage={link.stage.name}", flush=True)
        if link.stage.name in nested.NO_FOLDER or link.run is not None:
            continue  # reads what earlier links leave
        try:
            metrics[name] = _plan(link, session, _beside(link, configs, session)).metrics
        except FinsaError as error:
            for one in error.problems if isinstance(error, ConfigError) else [_problem(error)]:
                problems.setdefault(f"{one.path}{one.text}", one)
            metrics[name] = _without_rows(link, session)
    if problems:
        raise ConfigError(problems.values())
    return Result("check", None, metrics)


def _beside(link: RunConfig, configs: dict[str, RunConfig], session: Session) -> dict[str, object]:
    """What a link finds done already, and what it would have to train first."""
    if link.stage.name == "pretrain":
        done = run_folder.finished(link, None)
        return {"finished before": f"{done}; it is skipped"} if done else {}
    data = dataset.load(link.data, session)
    done = run_folder.finished(link, data.fingerprint)
    told: dict[str, object] = {"finished before": f"{done}; it is skipped"} if done else {}
    if isinstance(link.stage, MoeJointStage):
        from finsa.training import expert_runs

        named = link.stage.experts or dict.fromkeys(expert_runs.names(link.stage, data))
        wanted = {
            f"expert {name}": expert_runs.expert_config(link, name) for name, place in named.items() if place is None
        }
        if link.stage.compare:
            wanted["one adapter on all domains, to compare with"] = expert_runs.expert_config(link, None)
        hashes = {run_folder.config_hash(other) for other in configs.values()}
        lacking = [
            what
            for what, one in wanted.items()
            if run_folder.config_hash(one) not in hashes
            and run_folder.finished(one, dataset.load(one.data, session).fingerprint) is None
        ]
        told["trained first"] = "; ".join(lacking) or "nothing"
    return told


def _without_rows(link: RunConfig, session: Session) -> dict[str, Any]:
    from finsa.training import check_plan

    return check_plan.without_rows(link, session)


# ------------------------------------------------------------------------------------------------ lines


def _problem(error: FinsaError) -> Problem:
    """An error as an entry of a list: what it says begins with the key or file that is meant."""
    place, _, text = str(error).partition(": ")
    return Problem(place, text) if text else Problem("stage.links", place)
