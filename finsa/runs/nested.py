"""A stage within another one: the trials of a search, the links of a chain."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from finsa.config import ChainStage, CheckStage, RunConfig, catalogue, compose
from finsa.errors import ConfigError, Problem, suggest
from finsa.runs.run_folder import Result
from finsa.session import Session

RUNS = ("train", "evaluate", "pretrain", "moe_joint", "search")  # stages whose finished run is found again
NO_FOLDER = ("report", "check", "inspect")  # stages that leave none, and are quick


def run(cfg: RunConfig, session: Session) -> Result:
    """Run the stage that a configuration names; stages find each other by name and never import each other."""
    result: Result = import_module(f"finsa.stages.{cfg.stage.name}").run(cfg, session)
    return result


def configure(cfg: RunConfig, name: str, done: Mapping[str, str], session: Session) -> RunConfig:
    """The configuration of a link: the chain's own with what the link changes.

    Args:
        done: run folders of earlier links, by name.

    Raises:
        ConfigError: for what the link says wrong.
    """
    assert isinstance(cfg.stage, ChainStage | CheckStage)
    assert cfg.stage.links is not None
    where = f"stage.links.{name}"
    changes = _resolved(cfg.stage.links[name], done, where)
    chosen, rest = _choices(changes, where, session)
    if "stage" not in chosen:
        raise ConfigError([Problem(where, "names no stage, as in {stage: train}")])
    if chosen["stage"] not in (*RUNS, *NO_FOLDER):
        text = f"a repeated chain could not find it again. Choose from: {', '.join((*RUNS, *NO_FOLDER))}"
        raise ConfigError([Problem(f"{where}.stage", f"{chosen['stage']} is no link of a chain: {text}")])
    # What values of one section are made of in another.
    made_of = [f"model.adapter_learning_rate={cfg.model.adapter_learning_rate}", f"output_dir='{cfg.output_dir}'"]
    words = [*(f"{group}={choice}" for group, choice in chosen.items()), *made_of]
    composed, _ = compose.compose_values(words, session.folders)
    values = cfg.model_dump(mode="json") | {group: composed[group] for group in chosen}
    for section, change in rest.items():
        values[section] = _merged(values.get(section), change)
    try:
        return compose.build(values, {}, [])
    except ConfigError as error:
        raise ConfigError([Problem(f"{where}.{one.path}", one.text) for one in error.problems]) from None


def _choices(changes: dict[str, Any], where: str, session: Session) -> tuple[dict[str, str], dict[str, Any]]:
    """Part what a link says into choices of groups and changed values."""
    chosen, rest = dict[str, str](), dict[str, Any]()
    for section, change in changes.items():
        named = {"name": change} if section in catalogue.groups() and isinstance(change, str) else change
        if section in catalogue.groups() and isinstance(named, dict):
            named = dict(named)
            if "name" in named:
                chosen[section] = named.pop("name")
        rest[section] = named
    for group, choice in chosen.items():
        known = catalogue.choices_of(group, session.folders)
        if choice not in known:
            text = f"there is no '{choice}'. {suggest(choice, known)}"
            raise ConfigError([Problem(f"{where}.{group}", text)])
    return chosen, rest


def _resolved(value: Any, done: Mapping[str, str], where: str) -> Any:
    """Put run folders where ``@name`` stands."""
    if isinstance(value, dict):
        return {key: _resolved(one, done, where) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(one, done, where) for one in value]
    if isinstance(value, str) and value.startswith("@"):
        if value[1:] not in done:
            text = f"{value} is no earlier link with a run folder. {suggest(value[1:], done)}".strip()
            raise ConfigError([Problem(where, text)])
        return done[value[1:]]
    return value


def _merged(values: Any, change: Any) -> Any:
    if isinstance(values, dict) and isinstance(change, dict):
        return values | {key: _merged(values.get(key), one) for key, one in change.items()}
    return change
