"""Stages one after another: every link is an ordinary run, found again when the chain is repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finsa import composition, jobs, runs
from finsa.config import ChainStage, RunConfig
from finsa.data import table
from finsa.errors import ConfigError, Problem, suggest
from finsa.runs import Result

RUNS = ("train", "evaluate", "pretrain", "moe_joint", "search")  # stages whose finished run is found again
NO_FOLDER = ("report", "check", "inspect")  # stages that leave none, and are quick


def run(cfg: RunConfig) -> Result:
    """Run the links that have not finished; the result is the last link's that has scores."""
    assert isinstance(cfg.stage, ChainStage)
    links = cfg.stage.links
    if not links:
        raise ConfigError([Problem("stage.links", "names no stage; experiment=finsa_moe has some to look at")])
    # All of them before the first one runs: a wrong key in the last should not cost the time of the others.
    for name in links:
        configure(cfg, name, {earlier: f"@{earlier}" for earlier in links})
    done: dict[str, str] = {}
    last = Result("chain")
    with runs.apart():
        for number, name in enumerate(links, start=1):
            result = _link(configure(cfg, name, done), f"link {number} of {len(links)}, {name}")
            if result.run_dir is not None:
                done[name] = str(result.run_dir)
            last = result if "test" in result.metrics else last
    for name, folder in done.items():
        print(f"{name}: {folder}")
    return Result("chain", last.run_dir, last.metrics, last.objective)


def configure(cfg: RunConfig, name: str, done: dict[str, str]) -> RunConfig:
    """The configuration of a link: the chain's own with what the link changes.

    Args:
        done: run folders of earlier links, by name.

    Raises:
        ConfigError: for what the link says wrong.
    """
    assert isinstance(cfg.stage, ChainStage)
    assert cfg.stage.links is not None
    where = f"stage.links.{name}"
    changes = _resolved(cfg.stage.links[name], done, where)
    chosen, rest = _choices(changes, where)
    if "stage" not in chosen:
        raise ConfigError([Problem(where, "names no stage, as in {stage: train}")])
    if chosen["stage"] not in (*RUNS, *NO_FOLDER):
        text = f"a repeated chain could not find it again. Choose from: {', '.join((*RUNS, *NO_FOLDER))}"
        raise ConfigError([Problem(f"{where}.stage", f"{chosen['stage']} is no link of a chain: {text}")])
    # What values of one section are made of in another.
    made_of = [f"model.adapter_learning_rate={cfg.model.adapter_learning_rate}", f"output_dir='{cfg.output_dir}'"]
    composed, _ = composition.compose_values([*(f"{group}={choice}" for group, choice in chosen.items()), *made_of])
    values = cfg.model_dump(mode="json") | {group: composed[group] for group in chosen}
    for section, change in rest.items():
        values[section] = _merged(values.get(section), change)
    try:
        return composition.build(values, {}, [])
    except ConfigError as error:
        raise ConfigError([Problem(f"{where}.{one.path}", one.text) for one in error.problems]) from None


def _choices(changes: dict[str, Any], where: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Part what a link says into choices of groups and changed values."""
    chosen, rest = dict[str, str](), dict[str, Any]()
    for section, change in changes.items():
        named = {"name": change} if section in composition.groups() and isinstance(change, str) else change
        if section in composition.groups() and isinstance(named, dict):
            named = dict(named)
            if "name" in named:
                chosen[section] = named.pop("name")
        rest[section] = named
    for group, choice in chosen.items():
        known = composition.choices_of(group)
        if choice not in known:
            text = f"there is no '{choice}'. {suggest(choice, known)}"
            raise ConfigError([Problem(f"{where}.{group}", text)])
    return chosen, rest


def _resolved(value: Any, done: dict[str, str], where: str) -> Any:
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


def _link(cfg: RunConfig, title: str) -> Result:
    """Run a link, unless a finished run of it is there; an unfinished one is gone on with under ``resume=true``."""
    if cfg.stage.name in NO_FOLDER:
        print(f"{title}: stage={cfg.stage.name}", flush=True)
        return jobs.run(cfg.model_copy(update={"resume": False}))
    found = runs.finished(cfg, _fingerprint(cfg))
    if found is not None:
        print(f"{title}: finished before, {found}", flush=True)
        return _earlier(cfg.stage.name, found)
    goes_on = cfg.resume and runs.unfinished(cfg) is not None
    print(f"{title}: stage={cfg.stage.name}{', resumed' if goes_on else ''}", flush=True)
    return jobs.run(cfg.model_copy(update={"resume": goes_on}))


def _fingerprint(cfg: RunConfig) -> str | None:
    """Of the rows that the link's run records."""
    if cfg.stage.name == "pretrain":
        return None
    if cfg.stage.name == "evaluate":
        from finsa.inference import rows_named  # it loads libraries that no other link may need

        return table.load(rows_named.data_of(cfg)).fingerprint
    return table.load(cfg.data).fingerprint


def _earlier(stage: str, folder: Path) -> Result:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return Result(stage, folder, metrics, metrics.get("validation", {}).get("macro_f1"))
