"""Translate files of LLaMA-Factory into experiments and data files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.table import Table

from finsa.config import ImportStage, RunConfig, catalogue, command_line, locate
from finsa.config.catalogue import Folders
from finsa.errors import ConfigError, DataError, FinsaError, Problem
from finsa.evaluation import tables
from finsa.interop import datasets, llamafactory
from finsa.interop.translation import Translation, header, nested, yaml_line
from finsa.runs import files
from finsa.runs.run_folder import Result
from finsa.session import Session

PARENTS = 4  # number of folders above a training file that are searched for its data sets


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Translate ``input``, write files that compose below ``output``, and report what happened to every key.

    Raises:
        DataError: if nothing can be translated; then nothing is written.
    """
    assert isinstance(cfg.stage, ImportStage)
    source, folder, added = locate(str(cfg.input)), Path(str(cfg.output)), session.folders if session else ()
    if not source.is_file():
        raise DataError(f"input: no such file: {source}")
    content, refused = llamafactory.read(source), dict[str, str]()
    results: list[TranslatedFiles] = []
    if datasets.is_dataset_info(content):
        for name in content:
            try:
                results.append(_checked([_data(content, name, source.parent, folder)], added))
            except FinsaError as error:
                refused[name] = str(error).removeprefix(f"{_name(name)}: ")
        if not results:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise DataError(f"input: no entry of {source} can be translated: {reasons}")
    else:
        results.append(_checked(_experiment(content, source, folder, cfg.stage, added), added))
    for result in results:
        for file, lines in result.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            files.write_text(folder / file, "\n".join(lines) + "\n")
    translations = {name: translation for result in results for name, translation in result.translations.items()}
    for name, translation in translations.items():
        _show(name, translation)
    for name, reason in refused.items():
        print(f"not translated: {name}: {reason}")
    for result in results:
        print(f"use it: python run.py --config-dir {folder} {result.command}")
    kinds = [outcome.kind for translation in translations.values() for outcome in translation.outcomes]
    counts = {kind: kinds.count(kind) for kind in ("translated", "no effect", "not supported")}
    return Result("import", None, counts | ({"entries not translated": len(refused)} if refused else {}))


@dataclass(frozen=True)
class TranslatedFiles:
    """Files that are written together or not at all.

    Args:
        command: the override that selects the last file.
        files: lines of each file, by path below the output.
        translations: translations by the name of the translated file or entry.
    """

    command: str
    files: dict[Path, list[str]]
    translations: dict[str, Translation]


def _checked(parts: list[TranslatedFiles], added: Folders) -> TranslatedFiles:
    """Combine translated files, and check in a temporary folder that they compose.

    Raises:
        FinsaError: if they do not compose.
    """
    whole = TranslatedFiles(
        parts[-1].command,
        {file: lines for part in parts for file, lines in part.files.items()},
        {name: translation for part in reversed(parts) for name, translation in part.translations.items()},
    )
    with TemporaryDirectory() as place:
        for file, lines in whole.files.items():
            (Path(place) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(place) / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            command_line.check([whole.command], folders=(*added, Path(place)))
        except ConfigError as error:  # it names keys and files that the user has not written
            name, translation = next(iter(whole.translations.items()))
            given = {one.text.partition("=")[0]: one.key for one in translation.outcomes if one.kind == "translated"}
            problems = [
                Problem(given[one.path], f"as {one.path}: {one.text}", name) if one.path in given else one
                for one in error.problems
            ]
            raise ConfigError([replace(one, origin=name) for one in problems]) from None
    return whole


def _name(written: str, group: str = "data") -> str:
    """A name that is valid on the command line and is not the name of a file in ``conf/``."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", written).strip("_") or "imported"
    return f"{name}_imported" if (catalogue.CONF / group / f"{name}.yaml").exists() else name


def _data(info: dict[str, Any], entry: str, place: Path, folder: Path) -> TranslatedFiles:
    name = _name(entry)
    translation = datasets.translate(info[entry], name, place)
    title = f"{entry}, from LLaMA-Factory's dataset_info.json. Labels: the distinct answers of the training rows."
    lines = header(translation, title, f"python run.py --config-dir {folder} data={name}")
    lines += ["defaults: [table, _self_]", _body(translation.values)]
    return TranslatedFiles(f"data={name}", {Path("data", f"{name}.yaml"): lines}, {entry: translation})


def _experiment(
    content: dict[str, Any], source: Path, folder: Path, stage: ImportStage, added: Folders
) -> list[TranslatedFiles]:
    translation = llamafactory.translate(content, source.name, stage.processes, added)
    file = _datasets(translation, source, stage)
    info = llamafactory.read(file) if file.is_file() else {}
    needed = datasets.choose_data(translation, info, str(file), added)
    parts = [_data(info, entry, file.parent, folder) for entry in needed]
    names = [_name(entry) for entry in needed]
    if len(names) > 1:
        parts.append(_mixture(translation, names, folder))
    elif names:
        translation.choices["data"] = names[0]
    datasets.set_validation(translation, names if len(names) > 1 else [])
    if names:
        llamafactory.set_prompt(translation)
    name = _name(source.stem, "experiment")
    title = f"{source.name} of LLaMA-Factory. Here a checkpoint is chosen on validation rows, and labels are scored."
    lines = [
        "# @package _global_",
        *header(translation, title, f"python run.py --config-dir {folder} experiment={name}"),
    ]
    groups = [f"  - override /{group}: {choice}" for group, choice in translation.choices.items()]
    lines += ["defaults:", *groups, "  - _self_", "", f"experiment: {name}", _body(translation.values)]
    written = {Path("experiment", f"{name}.yaml"): lines}
    return [*parts, TranslatedFiles(f"experiment={name}", written, {source.name: translation})]


def _datasets(translation: Translation, source: Path, stage: ImportStage) -> Path:
    """The ``dataset_info.json``: as given, or in ``dataset_dir``.

    A relative ``dataset_dir`` refers to the folder that LLaMA-Factory was started in: the current one, or one above the
    training file.
    """
    if stage.datasets is not None:
        file = locate(stage.datasets)
        if not file.is_file():
            raise DataError(f"stage.datasets: no such file: {file}")
        return file
    written = Path(str(translation.get("dataset_dir", "data")), "dataset_info.json").expanduser()
    above = source.absolute().parents[:PARENTS]
    places = [written, *(place / written for place in above), source.parent / "dataset_info.json"]
    return next((place for place in places if place.is_file()), written)


def _mixture(translation: Translation, names: list[str], folder: Path) -> TranslatedFiles:
    name = _name(translation.choices["data"])
    translation.choices["data"] = name
    lines = [
        f"# {', '.join(names)} joined, as the training file has them.",
        f"# python run.py --config-dir {folder} data={name}",
    ]
    lines += ["defaults:", "  - table", *[f"  - {part}@parts.{part}" for part in names], "  - _self_"]
    lines += [f"name: {name}", "source: mixture", 'prompt: "{text}\\n"']
    return TranslatedFiles(f"data={name}", {Path("data", f"{name}.yaml"): lines}, {})


def _body(values: dict[str, Any]) -> str:
    return str(yaml.safe_dump(nested(values), allow_unicode=True, sort_keys=False, width=118)).strip()


def _show(name: str, translation: Translation) -> None:
    table = Table(title=name, title_justify="left", title_style="bold")
    for column in ("key", "value", "translation", ""):
        table.add_column(column, overflow="fold")
    styles = {"not supported": "yellow", "no effect": "dim"}
    for outcome in translation.outcomes:
        value = yaml_line(outcome.value) if outcome.key in translation.given else "(default)"
        table.add_row(outcome.key, value, outcome.kind, outcome.text, style=styles.get(outcome.kind))
    tables.show(table)
