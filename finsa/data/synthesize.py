"""Rows that a model made up: taking texts out of its answers, and keeping what is new of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from finsa.data.cleaning import folded

# "1. ", "2、", "(3)", "④", "- ": a number, but no figure such as 3.5 and no time such as 10:30.
_NUMBER = re.compile(r"(?:[（(]?\d{1,2}[)）、．]|\d{1,2}\.(?!\d)|[①-⑳]|[-*•](?=\s))\s*")
_JSON = re.compile(r'[\[{]\s*["{\[]')
_QUOTES = {"“": "”", '"': '"', "「": "」", "'": "'"}


def texts_of(answer: str) -> list[str]:
    """Take the texts out of an answer: a JSON list, or one text per line; of numbered lines, the numbered ones only.

    Args:
        answer: without thoughts. A fence around it (```json) is ignored.

    Returns:
        The texts; none where the JSON is broken or holds something else. A line that ends in a colon is a heading.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip() and not line.lstrip().startswith("```")]
    written = "\n".join(lines)
    if _JSON.match(written):
        return [_unquoted(text) for text in map(_text, _entries(written)) if text]
    numbered = [_NUMBER.sub("", line, count=1) for line in lines if _NUMBER.match(line)]
    return [_unquoted(text) for text in numbered or lines if text and not text.endswith((":", "："))]


def _entries(written: str) -> list[object]:
    try:
        content = json.loads(written)
    except (ValueError, RecursionError):
        return []
    if isinstance(content, dict) and len(content) == 1:  # {"texts": [...]}
        content = next(iter(content.values()))
    return content if isinstance(content, list) else []


def _text(entry: object) -> str:
    if isinstance(entry, dict):
        entry = entry.get("text")
    return entry.strip() if isinstance(entry, str) else ""


def _unquoted(text: str) -> str:
    return text[1:-1].strip() if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] else text


@dataclass
class Harvest:
    """Texts per class, none of them twice in any class, so that no text has two labels or is in two splits.

    Args:
        wanted: per class.
        texts: those that are kept.
        counts: what became of the answers and their texts.
    """

    wanted: int
    texts: dict[str, list[str]]
    counts: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, labels: Sequence[str], wanted: int) -> Harvest:
        """Begin with nothing."""
        return cls(wanted, {label: [] for label in labels})

    def missing(self, label: str) -> int:
        """How many texts of a class are still wanted."""
        return self.wanted - len(self.texts[label])

    def add(self, label: str, answer: str) -> None:
        """Keep the new texts of an answer, as far as they are wanted, and count the others."""
        found = texts_of(answer)
        self.counts["answers"] += 1
        self.counts["answers without a text"] += not found
        for text, key in zip(found, _keys(found), strict=True):
            fate = self._fate(label, text, key)
            self.counts[fate] += 1
            if fate == "kept":
                self.seen.add(key)
                self.texts[label].append(text)

    def _fate(self, label: str, text: str, key: str) -> str:
        if not key or "\x00" in text or "\ufffd" in text:
            return "dropped: unreadable"
        if key in self.seen:
            return "dropped: repeated"
        return "kept" if self.missing(label) else "dropped: more than wanted"


def _keys(texts: list[str]) -> list[str]:
    """Texts as the ledger compares them."""
    return pl.DataFrame({"text": texts}, schema={"text": pl.String}).select(folded("text"))["text"].to_list()


def in_blocks(texts: dict[str, list[str]], first: int, last: int, block: int, split: str) -> pl.DataFrame:
    """Arrange texts `first` to `last` of every class in blocks: some of the first class, as many of the second, ...

    Returns:
        Columns id, text, label.
    """
    rows = [
        (text, label)
        for start in range(first, last, block)
        for label, own in texts.items()
        for text in own[start : min(start + block, last)]
    ]
    numbered = [(f"{split}-{number:05}", *row) for number, row in enumerate(rows, 1)]
    return pl.DataFrame(numbered, schema=dict.fromkeys(("id", "text", "label"), pl.String), orient="row")
