"""A folder that a run is writing: every file appears whole or not at all; only the log grows, by a line at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finsa.runs import files, processes


@dataclass
class RunFolder:
    """A run folder that is being written.

    Args:
        path: the folder.
        facts: what ``run.json`` says; `note` adds to it.
    """

    path: Path
    facts: dict[str, Any]

    def note(self, **facts: Any) -> None:
        """Add facts to ``run.json``."""
        self.facts.update(facts)
        self.write_json("run.json", self.facts)

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(values, ensure_ascii=False, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all; of several processes the first one writes."""
        if not processes.first():
            return
        files.write_text(self.path / name, text)

    def write_lines(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Write JSON lines, whole or not at all; records may be many more than fit into memory."""
        if not processes.first():
            return
        with (
            files.replacing(self.path / name) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    @property
    def log_file(self) -> Path:
        """``log.jsonl``: grows by a record at a time; `fit` cuts back what a kill left behind the last checkpoint."""
        return self.path / "log.jsonl"

    def log(self, step: int, record: dict[str, float]) -> None:
        """Append a record to ``log.jsonl``."""
        if not processes.first():
            return
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **record}) + "\n")
