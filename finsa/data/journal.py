"""Answers of a model on disk, so that a command that was stopped goes on without asking again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Lock


class Journal:
    """Answers by key, one JSON object per line; only whole lines count.

    Args:
        file: made with the first answer.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, Lock()
        self.answers = dict(self._lines()) if file.is_file() else {}
        self.kept = len(self.answers)

    def _lines(self) -> Iterator[tuple[str, str]]:
        content = self.file.read_bytes()
        if content and not content.endswith(b"\n"):  # a kill cut the last line off; the next one shall not be lost too
            with self.file.open("ab") as stream:
                stream.write(b"\n")
        for line in content.split(b"\n"):
            try:
                record = json.loads(line)
                yield str(record["key"]), str(record["text"])
            except (ValueError, LookupError, TypeError):
                continue

    def add(self, key: str, text: str) -> None:
        """Append an answer; safe to call from several threads."""
        line = json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n"
        with self._lock:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as stream:
                stream.write(line.encode())
            self.answers[key] = text
