"""Files of weights and their neighbours, looked at without torch: what they hold, and whether they are whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

LFS = b"version https://git-lfs"  # how a file begins that git clone left without Git LFS


def read_json(file: Path) -> dict[str, Any] | None:
    """The values of a JSON file; None where it is missing, damaged or not an object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def fault(file: Path) -> str | None:
    """What is wrong with a file of weights: a pointer of Git LFS, empty, damaged or incomplete; None: nothing."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(len(LFS)) == LFS:
            return f"{file} is a Git LFS pointer instead of the weights; run git lfs pull in its folder"
    if file.suffix != ".safetensors":
        return f"{file} is empty" if size == 0 else None
    header = safetensors_header(file)
    if header is None:
        return f"{file} is damaged: it has no safetensors header"
    start, entries = header
    expected = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != expected:
        return f"{file} is incomplete: {size:,} bytes of {expected:,}; copy or download it again"
    return None


def safetensors_header(file: Path) -> tuple[int, dict[str, Any]] | None:
    """The byte at which the tensors of a safetensors file begin, and its entries; None where it has no such header."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= file.stat().st_size - 8:
            return None
        try:
            entries = json.loads(stream.read(length))
        except ValueError:
            return None
    if not isinstance(entries, dict):
        return None
    return 8 + length, {name: entry for name, entry in entries.items() if name != "__metadata__"}


def listed(folder: Path) -> str:
    """What a folder holds, for a message."""
    names = sorted(each.name for each in folder.iterdir())
    if not names:
        return "it is empty"
    return f"it holds {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
