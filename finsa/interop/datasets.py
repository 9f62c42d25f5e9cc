"""Entries of LLaMA-Factory's ``dataset_info.json`` (Alpaca and ShareGPT rows) as data files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finsa.config.catalogue import Folders, choices_of
from finsa.data.conversations import CHATS
from finsa.data.readers import READERS
from finsa.errors import DataError, suggest
from finsa.interop.summary import Account

SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name")
_TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content"), "user_tag": ("human", "user")}
TAGS = {**_TAGS, "assistant_tag": ("gpt", "assistant")}


def is_dataset_info(content: Mapping[str, Any]) -> bool:
    """Whether a file holds entries of data sets rather than settings of a training."""
    return any(isinstance(entry, dict) and set(SOURCES) & set(entry) for entry in content.values())


def translate(entry: Any, name: str, folder: Path) -> Account:
    """Translate one entry.

    Args:
        entry: its content.
        name: of the data set.
        folder: that file names are relative to.

    Raises:
        DataError: for rows that cannot be read as text and label.
    """
    if not isinstance(entry, dict) or not set(SOURCES) & set(entry):
        raise DataError(f"{name}: is no entry of a data set; one has {', '.join(SOURCES[:2])} or another source")
    account = Account(entry, name)
    account.values["name"] = name
    shape = account.get("formatting", "alpaca")
    if shape not in ("alpaca", "sharegpt"):
        raise DataError(f"{name}: formatting '{shape}' is not translated. {suggest(shape, ('alpaca', 'sharegpt'))}")
    for key in ("ranking",):
        if account.get(key, False):
            raise DataError(f"{name}: {key} is true: pairs of answers are not labels")
    if shape == "sharegpt":
        account.set("formatting", "source", "messages", "the last answer is the label")
    _columns(account, shape, name)
    _place(account, name, folder)
    account.values["prompt"] = "{text}\n"
    account.values["columns.domain"] = None
    if account.get("split", "train") != "train" and "file_name" in entry:
        account.tell("split", "not supported", "a file's name says its split: train, valid or test")
    account.tell("num_samples", "not supported", "all rows are read; method.rows_per_class caps a class")
    for key in list(account.left()):
        if key in ("ranking", "split"):
            account.tell(key, "no effect", "its default, and so it is here")
        else:
            account.tell(key, "not supported", "unknown to this translation")
    return account


def _place(account: Account, name: str, folder: Path) -> None:
    if "hf_hub_url" in account.given:
        if account.values["source"] != "table":
            raise DataError(
                f"{name}: chats of the hub are not read ({account.given['hf_hub_url']}): save them as a file beside "
                "dataset_info.json and name it by file_name"
            )
        account.values["source"] = "hub"
        split = str(account.get("split", "train"))
        account.set("hf_hub_url", "hub.id", str(account.given["hf_hub_url"]))
        account.set("subset", "hub.config", account.get("subset"))
        account.set("revision", "hub.revision", str(account.get("revision", "main")))
        account.set("split", "hub.splits", {"train": split})
    elif "file_name" in account.given:
        file = (folder / str(account.given["file_name"])).absolute()
        if not file.is_dir() and file.suffix.lower() not in READERS:
            raise DataError(f"{name}: {file.name} is not read. Choose from: {', '.join(sorted(READERS))}")
        account.set("file_name", "files", str(file), "" if file.exists() else "not there at present")
    else:
        found = next(key for key in SOURCES if key in account.given)
        raise DataError(f"{name}: {found} is not read; save the rows as a file and name it by file_name")


def _columns(account: Account, shape: str, name: str) -> None:
    written = account.get("columns", {})
    columns = {key: value for key, value in dict(written).items() if value} if isinstance(written, dict) else {}
    for key in ("system", "history"):
        if columns.get(key, key) != key:
            raise DataError(
                f"{name}: columns.{key} is read from the field '{key}' alone; rename '{columns[key]}' in the file"
            )
    for key in ("chosen", "rejected", "kto_tag"):
        if key in columns:
            raise DataError(f"{name}: columns.{key}: preferences between answers are not labels")
    read = {"alpaca": ("prompt", "query", "response", "system", "history"), "sharegpt": ("messages", "system")}[shape]
    other = [key for key in columns if key not in read]
    if shape == "alpaca":
        _alpaca(account, columns, name)
    elif columns.get("messages", "conversations") not in CHATS:
        raise DataError(f"{name}: turns are read from {' or '.join(CHATS)}, not '{columns['messages']}'")
    if "tags" in account.given:
        wrong = {
            key: value for key, value in dict(account.given["tags"]).items() if value not in TAGS.get(key, (value,))
        }
        if wrong:
            key, value = next(iter(wrong.items()))
            raise DataError(f"{name}: tags.{key} '{value}' is not read. {suggest(str(value), TAGS[key])}")
        account.tell("tags", "translated", "the form of the turns is recognised")
    if other:
        account.tell("columns", "not supported", f"{', '.join(other)}: not read; rows with images are unreadable")
    elif "columns" in account.left():
        account.tell("columns", "translated", "data.columns")


def _alpaca(account: Account, columns: Mapping[str, Any], name: str) -> None:
    usual = {"prompt": "instruction", "query": "input", "response": "output"}
    own = columns or usual
    if "prompt" not in own or "response" not in own:
        raise DataError(f"{name}: columns needs prompt and response")
    if all(own.get(key, value) == value for key, value in usual.items()) and "hf_hub_url" not in account.given:
        account.set("formatting", "source", "alpaca")
        if not {"system", "history"} & set(columns):  # fields that no column names are not read there either
            account.values["turns"] = "last"
        return
    if {"system", "history"} & set(columns):
        raise DataError(f"{name}: system and history are read beside the fields instruction, input and output alone")
    if own.get("query") and "hf_hub_url" not in account.given:
        raise DataError(
            f"{name}: the columns {own['prompt']} and {own['query']} are joined under the names instruction and input "
            "alone; rename them in the file"
        )
    account.set("formatting", "source", "table", "one column of text, one of labels")
    account.set("columns", "columns.text", own["prompt"])
    account.set("columns", "columns.label", own["response"])


def of_training(account: Account, info: Mapping[str, Any] | None, where: str, folders: Folders = ()) -> list[str]:
    """Decide the data of a training file: names of entries that have to be written, or a file of ``conf/data``.

    Args:
        account: of the training file; takes note.
        info: content of ``dataset_info.json``; None where there is none.
        where: its path, for messages.
        folders: added with ``--config-dir``.
    """
    written = account.get("dataset", "")
    names = [str(word).strip() for word in (written if isinstance(written, list) else str(written).split(",")) if word]
    known = [name for name in names if info is not None and name in info]
    if names and known == names:
        account.choose("dataset", "data", names[0] if len(names) == 1 else "_".join(names)[:60])
    elif len(names) == 1 and names[0] in choices_of("data", folders):
        account.choose("dataset", "data", names[0])
    else:
        account.choices["data"] = "table"
        missing = ", ".join(name for name in names if name not in known) or "no data set"
        reason = f"{missing}: not in {where}. Add data=<name> to the command, or stage.datasets=<dataset_info.json>"
        account.tell("dataset", "not supported", reason)
        known = []
    account.tell("dataset_dir", "translated" if known else "no effect", f"{where} was read" if known else "not read")
    return known


def validation(account: Account, parts: Sequence[str]) -> None:
    """Translate how many rows validate.

    Args:
        account: of the training file; takes note.
        parts: data sets that are mixed, each of which is divided by its own rule; empty for a single one.
    """
    share = account.number("val_size", 0.0)
    if 0 < share < 0.5:
        for place in [f"data.parts.{part}" for part in parts] or ["data"]:
            account.set("val_size", f"{place}.split.validation", share, "where the files name no validation split")
            account.set("val_size", f"{place}.split.rule", "random")
    elif share:
        account.tell("val_size", "not supported", "data.split.validation is a share of the rows below 0.5")
    else:
        account.tell("val_size", "not supported", "a checkpoint is chosen on validation rows: data.split.validation")
    account.tell("eval_dataset", "not supported", "call its file valid.json and put it beside train.json")
