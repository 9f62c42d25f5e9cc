"""Read offline files of wandb: protobuf records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")  # checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last part of a record
PREFIX = 7  # of the file: its magic and version


def records(file: Path) -> Iterator[Any]:
    """The records of a file, parsed."""
    data, at, parts = file.read_bytes(), PREFIX, b""
    while at + HEADER.size <= len(data):
        rest = BLOCK - at % BLOCK
        if rest < HEADER.size:  # what is left of a block is padding
            at += rest
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        if kind == 0:
            return
        parts += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def run(file: Path) -> dict[str, Any]:
    """The run in a file: id, group, type, configuration, names of logged values."""
    found: dict[str, Any] = {"config": {}, "logged": set()}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "group": record.run.run_group, "type": record.run.job_type}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found["logged"] |= {item.nested_key[0] if item.nested_key else item.key for item in record.history.item}
    return found
