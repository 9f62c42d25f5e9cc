"""Translate files of LLaMA-Factory into an experiment and data files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from finsa import arguments, composition, files
from finsa.config import ImportStage, RunConfig, locate
from finsa.errors import DataError
from finsa.evaluation import tables
from finsa.migration import datasets, llamafactory
from finsa.migration.account import Account, header, nested, yaml_line
from finsa.runs import Result


def run(cfg: RunConfig) -> Result:
    """Read ``input``, write files below ``output``, check that they compose, and tell of every key."""
    assert isinstance(cfg.stage, ImportStage)
    source, folder = locate(str(cfg.input)), Path(str(cfg.output))
    if not source.is_file():
        raise DataError(f"input: no such file: {source}")
    content = llamafactory.read(source)
    if datasets.is_dataset_info(content):
        accounts = _write_data(content, list(content), source.parent, folder)
        commands = [f"data={_name(name)}" for name in accounts]
    else:
        accounts, commands = (
            _write_experiment(content, source, folder, cfg.stage),
            [f"experiment={_name(source.stem, 'experiment')}"],
        )
    composition.add_folder(folder)
    for name, account in accounts.items():
        _show(name, account)
    for command in commands:
        arguments.check([command])
        print(f"use it: python run.py --config-dir {folder} {command}")
    kinds = [fate.kind for account in accounts.values() for fate in account.fates]
    return Result("import", None, {kind: kinds.count(kind) for kind in ("translated", "no effect", "not supported")})


def _name(written: str, group: str = "data") -> str:
    """A name that a command line takes, and that no file of ``conf/`` has."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", written).strip("_") or "imported"
    return f"{name}_imported" if (composition.CONF / group / f"{name}.yaml").exists() else name


def _write_data(info: dict[str, Any], names: list[str], place: Path, folder: Path) -> dict[str, Account]:
    accounts = {}
    for name in names:
        account = datasets.translate(info[name], _name(name), place)
        title = f"{name}, from LLaMA-Factory's dataset_info.json. Labels: the distinct answers of the training rows."
        lines = header(account, title, f"python run.py --config-dir {folder} data={_name(name)}")
        lines += ["defaults: [table, _self_]", _body(account.values)]
        _write(folder / "data" / f"{_name(name)}.yaml", lines)
        accounts[name] = account
    return accounts


def _write_experiment(content: dict[str, Any], source: Path, folder: Path, stage: ImportStage) -> dict[str, Account]:
    account = llamafactory.translate(content, source.name, stage.processes)
    file = _datasets(account, source, stage)
    info = llamafactory.read(file) if file.is_file() else None
    needed = datasets.of_training(account, info, str(file))
    accounts = {source.name: account} | (_write_data(info, needed, file.parent, folder) if info and needed else {})
    if len(needed) > 1:
        _write_mixture(account, needed, folder)
    elif needed:
        account.choices["data"] = _name(needed[0])
    if account.values.get("model.prompt") == "chat" and needed:
        account.values["data.prompt"] = "{text}"
    name = _name(source.stem, "experiment")
    title = f"{source.name} of LLaMA-Factory. Here a checkpoint is chosen on validation rows, and labels are scored."
    lines = ["# @package _global_", *header(account, title, f"python run.py --config-dir {folder} experiment={name}")]
    groups = [f"  - override /{group}: {choice}" for group, choice in account.choices.items()]
    lines += ["defaults:", *groups, "  - _self_", "", f"experiment: {name}", _body(account.values)]
    _write(folder / "experiment" / f"{name}.yaml", lines)
    return accounts


def _datasets(account: Account, source: Path, stage: ImportStage) -> Path:
    """Where the entries of the data sets stand: as told, or below ``dataset_dir``, which is relative to one of two."""
    if stage.datasets is not None:
        file = locate(stage.datasets)
        if not file.is_file():
            raise DataError(f"stage.datasets: no such file: {file}")
        return file
    written = Path(str(account.get("dataset_dir", "data")), "dataset_info.json")
    places = [written, source.parent / written, source.parent / "dataset_info.json"]
    return next((place for place in places if place.is_file()), written)


def _write_mixture(account: Account, names: list[str], folder: Path) -> None:
    name = _name(account.choices["data"])
    account.choices["data"] = name
    parts = [f"  - {_name(part)}@parts.{_name(part)}" for part in names]
    lines = [
        f"# {', '.join(names)} joined, as the training file has them.",
        f"# python run.py --config-dir {folder} data={name}",
    ]
    lines += ["defaults:", "  - table", *parts, "  - _self_", f"name: {name}", "source: mixture"]
    _write(folder / "data" / f"{name}.yaml", lines)


def _body(values: dict[str, Any]) -> str:
    return str(yaml.safe_dump(nested(values), allow_unicode=True, sort_keys=False, width=118)).strip()


def _write(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(file, "\n".join(lines) + "\n")


def _show(name: str, account: Account) -> None:
    shown = Table(title=name, title_justify="left", title_style="bold")
    for column in ("key", "value", "what became of it", ""):
        shown.add_column(column, overflow="fold")
    styles = {"not supported": "yellow", "no effect": "dim"}
    for fate in account.fates:
        value = yaml_line(fate.value) if fate.key in account.given else "(default)"
        shown.add_row(fate.key, value, fate.kind, fate.text, style=styles.get(fate.kind))
    tables.show(shown)
