"""Synthetic rows and rationales written by a model: extract them from its answers, and keep those that are of use."""

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
    """Extract the texts of an answer: a JSON list, or one text per line; if any lines are numbered, only those.

    Args:
        answer: without thoughts. A fence around it (```json) is ignored.

    Returns:
        The texts; none if the JSON is broken or has another structure. A line that ends in a colon is a heading.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip() and not line.lstrip().startswith("```")]
    written = "\n".join(lines)
    if _JSON.match(written):
        try:
            content = json.loads(written)
        except (ValueError, RecursionError):
            return []
        if isinstance(content, dict) and len(content) == 1:  # {"texts": [...]}
            content = next(iter(content.values()))
        entries = content if isinstance(content, list) else []
        texts = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
        stripped = [text.strip() for text in texts if isinstance(text, str)]
        return [_unquoted(text) for text in stripped if text]
    numbered = [_NUMBER.sub("", line, count=1) for line in lines if _NUMBER.match(line)]
    return [_unquoted(text) for text in numbered or lines if text and not text.endswith((":", "："))]


def reasons_of(answer: str, words: Sequence[str]) -> tuple[str, int | None]:
    """Divide an answer into a rationale and the label that its last line names.

    Args:
        answer: without thoughts.
        words: of the labels, (c,).

    Returns:
        The text before the last line, and the number of the label; None if the line names none or several.
    """
    *reasons, last = [line.strip() for line in answer.splitlines() if line.strip()] or [""]
    named = [word for word in words if word.lower() in last.lower()]
    named = [word for word in named if not any(word != other and word.lower() in other.lower() for other in named)]
    return "\n".join(reasons), words.index(named[0]) if len(named) == 1 else None


def _unquoted(text: str) -> str:
    return text[1:-1].strip() if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] else text


@dataclass
class Harvest:
    """The texts collected per class. A text occurs only once, so none has two labels or is in two splits.

    Args:
        wanted: number of texts per class.
        texts: kept so far, by class.
        counts: number of answers, and of their texts by fate.
        seen: keys of the kept texts.
    """

    wanted: int
    texts: dict[str, list[str]]
    counts: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, labels: Sequence[str], wanted: int) -> Harvest:
        """An empty harvest."""
        return cls(wanted, {label: [] for label in labels})

    def missing(self, label: str) -> int:
        """Number of texts of a class that are still needed."""
        return self.wanted - len(self.texts[label])

    def add(self, label: str, answer: str) -> None:
        """Keep the new texts of an answer up to the wanted number, and count the others."""
        found = texts_of(answer)
        self.counts["answers"] += 1
        self.counts["answers without a text"] += not found
        keys = pl.DataFrame({"text": found}, schema={"text": pl.String}).select(folded("text"))["text"].to_list()
        for text, key in zip(found, keys, strict=True):
            if not key or "\x00" in text or "\ufffd" in text:
                fate = "dropped: unreadable"
            elif key in self.seen:
                fate = "dropped: repeated"
            elif not self.missing(label):
                fate = "dropped: more than wanted"
            else:
                fate = "kept"
                self.seen.add(key)
                self.texts[label].append(text)
            self.counts[fate] += 1


def in_blocks(texts: dict[str, list[str]], first: int, last: int, block: int, split: str) -> pl.DataFrame:
    """Arrange texts `first` to `last` of every class in blocks: some of the first class, as many of the second, ...

    Returns:
        Columns id, text, label.
    """
    rows = [
        (text, label)
        for start in range(first, last, block)
        for label, of_class in texts.items()
        for text in of_class[start : min(start + block, last)]
    ]
    numbered = [(f"{split}-{number:05}", *row) for number, row in enumerate(rows, 1)]
    return pl.DataFrame(numbered, schema=dict.fromkeys(("id", "text", "label"), pl.String), orient="row")
