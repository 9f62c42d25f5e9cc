"""Stages that run within another one: the trials of a search, the links of a chain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from finsa.config import USED_BY, ChainStage, CheckStage, RunConfig, catalogue, compose
from finsa.config.base import headline
from finsa.errors import ConfigError, Problem, suggest
from finsa.runs import run_folder
from finsa.runs.run_folder import Result
from finsa.session import Session

REUSABLE = ("train", "evaluate", "pretrain", "moe_joint", "search")  # stages whose finished runs can be reused
REPEATED = ("report", "check", "inspect")  # quick stages that run every time


def run(cfg: RunConfig, session: Session) -> Result:
    """Run the stage of a configuration; stages find each other by name and never import each other."""
    result: Result = import_module(f"finsa.stages.{cfg.stage.name}").run(cfg, session)
    return result


def run_or_reuse(cfg: RunConfig, title: str, fingerprint: str | None, session: Session) -> Result:
    """Run a configuration unless a finished run of it exists; an unfinished one is resumed with ``resume=true``.

    Args:
        title: of the run, for messages.
        fingerprint: of its rows; None if it reads documents.
    """
    found = run_folder.finished(cfg, fingerprint)
    if found is not None:
        print(f"{title}: finished before, {found}", flush=True)
        metrics = json.loads((found / "metrics.json").read_text(encoding="utf-8"))
        return Result(cfg.stage.name, found, metrics, metrics.get("validation", {}).get(headline(cfg.data.task)))
    resumes = cfg.resume and run_folder.unfinished(cfg) is not None
    print(f"{title}: stage={cfg.stage.name}{', resumed' if resumes else ''}", flush=True)
    return run(cfg.model_copy(update={"resume": resumes}), session)


def configure(cfg: RunConfig, name: str, done: Mapping[str, str], session: Session) -> RunConfig:
    """The configuration of a link: that of the chain with the changes of the link.

    Args:
        done: run folders of earlier links, by name.

    Raises:
        ConfigError: with every problem of the link.
    """
    assert isinstance(cfg.stage, ChainStage | CheckStage)
    assert cfg.stage.links is not None
    where = f"stage.links.{name}"
    changes = _resolved(cfg.stage.links[name], done, where)
    chosen, rest = _choices(changes, where, session)
    if "stage" not in chosen:
        raise ConfigError([Problem(where, "names no stage, as in {stage: train}")])
    if chosen["stage"] not in (*REUSABLE, *REPEATED):
        text = f"cannot be a link of a chain. Choose from: {', '.join((*REUSABLE, *REPEATED))}"
        raise ConfigError([Problem(f"{where}.stage", f"{chosen['stage']} {text}")])
    # Values that other sections refer to.
    referenced = [f"model.adapter_learning_rate={cfg.model.adapter_learning_rate}", f"output_dir='{cfg.output_dir}'"]
    words = [*(f"{group}={choice}" for group, choice in chosen.items()), *referenced]
    composed, _ = compose.compose_values(words, session.folders)
    values = cfg.model_dump(mode="json") | {group: composed[group] for group in chosen}
    for option in ("resume", "reuse_outdated"):  # of the command, for the links that have them
        values[option] = values[option] and chosen["stage"] in USED_BY[option]
    for section, change in rest.items():
        values[section] = _merged(values.get(section), change)
    try:
        return compose.build(values, {}, [])
    except ConfigError as error:
        raise ConfigError([Problem(f"{where}.{one.path}", one.text) for one in error.problems]) from None


def _choices(changes: dict[str, Any], where: str, session: Session) -> tuple[dict[str, str], dict[str, Any]]:
    """Separate the changes of a link into choices of groups and changed values."""
    chosen, rest = dict[str, str](), dict[str, Any]()
    for section, change in changes.items():
        if section in catalogue.groups():
            change = {"name": change} if isinstance(change, str) else change
            if isinstance(change, dict) and "name" in change:
                change = dict(change)
                chosen[section] = change.pop("name")
        rest[section] = change
    for group, choice in chosen.items():
        known = catalogue.choices_of(group, session.folders)
        if choice not in known:
            text = f"there is no '{choice}'. {suggest(choice, known)}"
            raise ConfigError([Problem(f"{where}.{group}", text)])
    return chosen, rest


def _resolved(value: Any, done: Mapping[str, str], where: str) -> Any:
    """Replace ``@name`` by the run folder of that link."""
    if isinstance(value, dict):
        return {key: _resolved(one, done, where) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(one, done, where) for one in value]
    if isinstance(value, str) and value.startswith("@"):
        if value[1:] not in done:
            text = f"{value} is not an earlier link with a run folder. {suggest(value[1:], done)}".strip()
            raise ConfigError([Problem(where, text)])
        return done[value[1:]]
    return value


def _merged(values: Any, change: Any) -> Any:
    if isinstance(values, dict) and isinstance(change, dict):
        return values | {key: _merged(values.get(key), one) for key, one in change.items()}
    return change
