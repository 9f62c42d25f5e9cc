"""Weight files and JSON files next to them, inspected without torch: their contents, and whether they are complete."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

LFS = b"version https://git-lfs"  # first bytes of a file that was cloned without Git LFS


def read_json(file: Path) -> dict[str, Any] | None:
    """The values of a JSON file; None if it is missing, damaged or not an object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def fault(file: Path) -> str | None:
    """What is wrong with a weight file: a Git LFS pointer, empty, damaged or incomplete; None if it is intact."""
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
    """Offset of the tensors in a safetensors file, and the entries of its header; None if it has no valid header."""
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
    """List the contents of a folder, for a message."""
    names = sorted(each.name for each in folder.iterdir())
    if not names:
        return "it is empty"
    return f"it contains {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
