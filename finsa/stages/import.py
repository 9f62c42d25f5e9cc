"""Translate files of LLaMA-Factory into an experiment and data files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.table import Table

from finsa.config import ImportStage, RunConfig, catalogue, command_line, locate
from finsa.config.catalogue import Folders
from finsa.errors import DataError, FinsaError
from finsa.evaluation import tables
from finsa.interop import datasets, llamafactory
from finsa.interop.summary import Account, header, nested, yaml_line
from finsa.runs import files
from finsa.runs.run_folder import Result
from finsa.session import Session

ABOVE = 4  # number of folders above a training file that are searched for its data sets


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Translate ``input`` into files below ``output`` that compose, and report every key.

    Raises:
        DataError: if nothing can be translated; then nothing is written.
    """
    assert isinstance(cfg.stage, ImportStage)
    source, folder, added = locate(str(cfg.input)), Path(str(cfg.output)), session.folders if session else ()
    if not source.is_file():
        raise DataError(f"input: no such file: {source}")
    content, refused = llamafactory.read(source), dict[str, str]()
    made: list[Translated] = []
    if datasets.is_dataset_info(content):
        for name in content:
            try:
                made.append(_composing([_data(content, name, source.parent, folder)], added))
            except FinsaError as error:
                refused[name] = str(error).removeprefix(f"{_name(name)}: ")
        if not made:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise DataError(f"input: no entry of {source} can be translated: {reasons}")
    else:
        made.append(_composing(_experiment(content, source, folder, cfg.stage, added), added))
    for written in made:
        for file, lines in written.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            files.write_text(folder / file, "\n".join(lines) + "\n")
    accounts = {name: account for written in made for name, account in written.accounts.items()}
    for name, account in accounts.items():
        _show(name, account)
    for name, reason in refused.items():
        print(f"not translated: {name}: {reason}")
    for written in made:
        print(f"use it: python run.py --config-dir {folder} {written.command}")
    kinds = [fate.kind for account in accounts.values() for fate in account.fates]
    counts = {kind: kinds.count(kind) for kind in ("translated", "no effect", "not supported")}
    return Result("import", None, counts | ({"entries not translated": len(refused)} if refused else {}))


@dataclass(frozen=True)
class Translated:
    """Files that belong together: either all of them are written or none.

    Args:
        command: override that selects the last of them.
        files: lines by path below the output.
        accounts: how each key was translated, by the name of the file or entry.
    """

    command: str
    files: dict[Path, list[str]]
    accounts: dict[str, Account]


def _composing(parts: list[Translated], added: Folders) -> Translated:
    """Join translations, after checking in a temporary folder that they compose.

    Raises:
        FinsaError: if they do not compose.
    """
    whole = Translated(
        parts[-1].command,
        {file: lines for part in parts for file, lines in part.files.items()},
        {name: account for part in reversed(parts) for name, account in part.accounts.items()},
    )
    with TemporaryDirectory() as place:
        for file, lines in whole.files.items():
            (Path(place) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(place) / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        command_line.check([whole.command], folders=(*added, Path(place)))
    return whole


def _name(written: str, group: str = "data") -> str:
    """A valid name on the command line that no file of ``conf/`` has."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", written).strip("_") or "imported"
    return f"{name}_imported" if (catalogue.CONF / group / f"{name}.yaml").exists() else name


def _data(info: dict[str, Any], entry: str, place: Path, folder: Path) -> Translated:
    name = _name(entry)
    account = datasets.translate(info[entry], name, place)
    title = f"{entry}, from LLaMA-Factory's dataset_info.json. Labels: the distinct answers of the training rows."
    lines = header(account, title, f"python run.py --config-dir {folder} data={name}")
    lines += ["defaults: [table, _self_]", _body(account.values)]
    return Translated(f"data={name}", {Path("data", f"{name}.yaml"): lines}, {entry: account})


def _experiment(
    content: dict[str, Any], source: Path, folder: Path, stage: ImportStage, added: Folders
) -> list[Translated]:
    account = llamafactory.translate(content, source.name, stage.processes, added)
    file = _datasets(account, source, stage)
    info = llamafactory.read(file) if file.is_file() else {}
    needed = datasets.of_training(account, info, str(file), added)
    parts = [_data(info, entry, file.parent, folder) for entry in needed]
    names = [_name(entry) for entry in needed]
    if len(names) > 1:
        parts.append(_mixture(account, names, folder))
    elif names:
        account.choices["data"] = names[0]
    datasets.validation(account, names if len(names) > 1 else [])
    if names:
        llamafactory.words(account)
    name = _name(source.stem, "experiment")
    title = f"{source.name} of LLaMA-Factory. Here a checkpoint is chosen on validation rows, and labels are scored."
    lines = ["# @package _global_", *header(account, title, f"python run.py --config-dir {folder} experiment={name}")]
    groups = [f"  - override /{group}: {choice}" for group, choice in account.choices.items()]
    lines += ["defaults:", *groups, "  - _self_", "", f"experiment: {name}", _body(account.values)]
    written = {Path("experiment", f"{name}.yaml"): lines}
    return [*parts, Translated(f"experiment={name}", written, {source.name: account})]


def _datasets(account: Account, source: Path, stage: ImportStage) -> Path:
    """The ``dataset_info.json`` of a training file: as configured, or in ``dataset_dir``.

    A relative path is searched for in the current folder and in the folders above the training file.
    """
    if stage.datasets is not None:
        file = locate(stage.datasets)
        if not file.is_file():
            raise DataError(f"stage.datasets: no such file: {file}")
        return file
    written = Path(str(account.get("dataset_dir", "data")), "dataset_info.json").expanduser()
    above = source.absolute().parents[:ABOVE]
    places = [written, *(place / written for place in above), source.parent / "dataset_info.json"]
    return next((place for place in places if place.is_file()), written)


def _mixture(account: Account, names: list[str], folder: Path) -> Translated:
    name = _name(account.choices["data"])
    account.choices["data"] = name
    lines = [
        f"# {', '.join(names)} joined, as the training file has them.",
        f"# python run.py --config-dir {folder} data={name}",
    ]
    lines += ["defaults:", "  - table", *[f"  - {part}@parts.{part}" for part in names], "  - _self_"]
    lines += [f"name: {name}", "source: mixture", 'prompt: "{text}\\n"']
    return Translated(f"data={name}", {Path("data", f"{name}.yaml"): lines}, {})


def _body(values: dict[str, Any]) -> str:
    return str(yaml.safe_dump(nested(values), allow_unicode=True, sort_keys=False, width=118)).strip()


def _show(name: str, account: Account) -> None:
    shown = Table(title=name, title_justify="left", title_style="bold")
    for column in ("key", "value", "translation", ""):
        shown.add_column(column, overflow="fold")
    styles = {"not supported": "yellow", "no effect": "dim"}
    for fate in account.fates:
        value = yaml_line(fate.value) if fate.key in account.given else "(default)"
        shown.add_row(fate.key, value, fate.kind, fate.text, style=styles.get(fate.kind))
    tables.show(shown)
