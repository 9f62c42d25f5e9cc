"""Translation of ``dataset_info.json`` of LLaMA-Factory (Alpaca and ShareGPT rows) into data files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finsa.config.catalogue import Folders, choices_of
from finsa.data.conversations import CHATS
from finsa.data.readers import READERS
from finsa.errors import DataError, suggest
from finsa.interop.translation import Translation

SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name")
# The tags that finsa recognizes in ShareGPT rows.
TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
}


def is_dataset_info(content: Mapping[str, Any]) -> bool:
    """Whether a file describes data sets rather than a training."""
    return any(isinstance(entry, dict) and set(SOURCES) & set(entry) for entry in content.values())


def translate(entry: Any, name: str, folder: Path) -> Translation:
    """Translate an entry of ``dataset_info.json``.

    Args:
        entry: content of the entry.
        name: name of the data set.
        folder: the folder that file names are relative to.

    Raises:
        DataError: if the rows cannot be read as text and label.
    """
    if not isinstance(entry, dict) or not set(SOURCES) & set(entry):
        raise DataError(
            f"{name}: does not describe a data set; an entry needs {', '.join(SOURCES[:2])} or another source"
        )
    translation = Translation(entry, name)
    translation.values["name"] = name
    formatting = translation.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        hint = suggest(formatting, ("alpaca", "sharegpt"))
        raise DataError(f"{name}: formatting '{formatting}' is not translated. {hint}")
    if formatting == "sharegpt":
        translation.set("formatting", "source", "messages", "the last answer is the label")
    _columns(translation, formatting)
    _source(translation, folder)
    translation.values["prompt"] = "{text}\n"
    translation.values["columns.domain"] = None
    if translation.get("split", "train") != "train" and "file_name" in entry:
        translation.record("split", "not supported", "the split is given by the file name: train, valid or test")
    translation.record("num_samples", "not supported", "all rows are read; method.rows_per_class limits a class")
    for key in translation.remaining():
        if key in ("ranking", "split"):
            translation.record(key, "no effect", "the same default here")
        else:
            translation.record(key, "not supported", "unknown key")
    return translation


def _source(translation: Translation, folder: Path) -> None:
    name, given = translation.name, translation.given
    if "hf_hub_url" in given:
        if translation.values["source"] != "table":
            raise DataError(
                f"{name}: chats on the hub are not read ({given['hf_hub_url']}): save them as a file next to "
                "dataset_info.json and name it by file_name"
            )
        translation.values["source"] = "hub"
        split = str(translation.get("split", "train"))
        translation.set("hf_hub_url", "hub.id", str(given["hf_hub_url"]))
        translation.set("subset", "hub.config", translation.get("subset"))
        translation.set("revision", "hub.revision", str(translation.get("revision", "main")))
        translation.set("split", "hub.splits", {"train": split})
    elif "file_name" in given:
        file = (folder / str(given["file_name"])).absolute()
        if not file.is_dir() and file.suffix.lower() not in READERS:
            raise DataError(f"{name}: {file.name} is not read. Choose from: {', '.join(sorted(READERS))}")
        translation.set("file_name", "files", str(file), "" if file.exists() else "does not exist yet")
    else:
        source = next(key for key in SOURCES if key in given)
        raise DataError(f"{name}: {source} is not read; save the rows as a file and name it by file_name")


def _columns(translation: Translation, formatting: str) -> None:
    name, given = translation.name, translation.given
    written = translation.get("columns", {})
    columns = {key: value for key, value in dict(written).items() if value} if isinstance(written, dict) else {}
    for key in ("system", "history"):
        if columns.get(key, key) != key:
            raise DataError(
                f"{name}: columns.{key} is only read from the field '{key}'; rename '{columns[key]}' in the file"
            )
    if "kto_tag" in columns:
        raise DataError(f"{name}: columns.kto_tag: tagged answers are not read; method=kto learns from pairs")
    ranking = bool(translation.get("ranking", False))
    if not ranking and {"chosen", "rejected"} & set(columns):
        raise DataError(f"{name}: columns.chosen and columns.rejected need ranking: true")
    if ranking and not {"chosen", "rejected"} <= set(columns or {"chosen", "rejected"}):
        raise DataError(f"{name}: ranking is true, so columns needs chosen and rejected")
    known: tuple[str, ...] = ("messages", "system")
    if ranking:
        known = (*known, "chosen", "rejected")
        translation.set("ranking", "columns.rejected", columns.get("rejected", "rejected"))
        translation.values["columns.label"] = columns.get("chosen", "chosen")
    if formatting == "alpaca":
        known = (*known, "prompt", "query", "response", "history")
        _alpaca(translation, columns, "chosen" if ranking else "response")
    elif columns.get("messages", "conversations") not in CHATS:
        raise DataError(f"{name}: turns are read from {' or '.join(CHATS)}, not '{columns['messages']}'")
    if "tags" in given:
        for key, value in dict(given["tags"]).items():
            if value not in TAGS.get(key, (value,)):
                raise DataError(f"{name}: tags.{key} '{value}' is not read. {suggest(str(value), TAGS[key])}")
        translation.record("tags", "translated", "the format of the turns is detected")
    other = [key for key in columns if key not in known]
    if other:
        reason = f"{', '.join(other)}: not read; rows with images are unreadable"
        translation.record("columns", "not supported", reason)
    elif "columns" in translation.remaining():
        translation.record("columns", "translated", "data.columns")


def _alpaca(translation: Translation, columns: Mapping[str, Any], answer: str) -> None:
    """Translate instruction rows, whose answer is the column `response`, or `chosen` in pairs."""
    name, on_hub = translation.name, "hf_hub_url" in translation.given
    usual = {"prompt": "instruction", "query": "input", answer: "output" if answer == "response" else answer}
    fields = columns or usual
    if "prompt" not in fields or answer not in fields:
        raise DataError(f"{name}: columns needs prompt and {answer}")
    asked = all(fields.get(key, usual[key]) == usual[key] for key in ("prompt", "query"))
    if asked and not on_hub and (answer == "chosen" or fields.get(answer, "output") == "output"):
        translation.set("formatting", "source", "alpaca")
        if not {"system", "history"} & set(columns):  # LLaMA-Factory does not read fields that are not named either
            translation.values["turns"] = "last"
        return
    if {"system", "history"} & set(columns):
        raise DataError(f"{name}: system and history are only read with the fields instruction, input and output")
    if fields.get("query") and not on_hub:
        raise DataError(
            f"{name}: the columns {fields['prompt']} and {fields['query']} are only joined under the names instruction "
            "and input; rename them in the file"
        )
    translation.set("formatting", "source", "table", "one column of text, one of labels")
    translation.set("columns", "columns.text", fields["prompt"])
    translation.set("columns", "columns.label", fields[answer])


def choose_data(
    translation: Translation, info: Mapping[str, Any] | None, where: str, folders: Folders = ()
) -> list[str]:
    """Choose the data of a training file: entries of ``dataset_info.json``, or a file in ``conf/data``.

    Args:
        translation: translation of the training file, to which the choice is added.
        info: content of ``dataset_info.json``; None if there is none.
        where: its path, for messages.
        folders: folders added with ``--config-dir``.

    Returns:
        Names of the entries that have to be translated.
    """
    written = translation.get("dataset", "")
    names = [str(word).strip() for word in (written if isinstance(written, list) else str(written).split(",")) if word]
    known = [name for name in names if info is not None and name in info]
    if names and known == names:
        translation.choose("dataset", "data", names[0] if len(names) == 1 else "_".join(names)[:60])
    elif len(names) == 1 and names[0] in choices_of("data", folders):
        translation.choose("dataset", "data", names[0])
    else:
        translation.choices["data"] = "table"
        missing = ", ".join(name for name in names if name not in known) or "no data set"
        reason = f"{missing}: not in {where}. Add data=<name> to the command, or stage.datasets=<dataset_info.json>"
        translation.record("dataset", "not supported", reason)
        known = []
    read = f"{where} was read" if known else "not read"
    translation.record("dataset_dir", "translated" if known else "no effect", read)
    return known


def set_validation(translation: Translation, parts: Sequence[str]) -> None:
    """Translate the number of validation rows.

    Args:
        translation: translation of the training file.
        parts: the data sets of a mixture, each of which is split on its own; empty for a single data set.
    """
    share = translation.number("val_size", 0.0)
    if 0 < share < 0.5:
        for section in [f"data.parts.{part}" for part in parts] or ["data"]:
            remark = "if the files name no validation split"
            translation.set("val_size", f"{section}.split.validation", share, remark)
            translation.set("val_size", f"{section}.split.rule", "random")
    elif share:
        translation.record("val_size", "not supported", "data.split.validation is a share of the rows below 0.5")
    else:
        reason = "a checkpoint is chosen on validation rows, see data.split.validation"
        translation.record("val_size", "not supported", reason)
    translation.record("eval_dataset", "not supported", "name its file valid.json and put it next to train.json")
