"""Lists and maps as users type them, which is more than Hydra's grammar accepts: it allows Chinese only in quotes.

Hydra accepts no quoted keys at all, so a map with Chinese keys is passed on as one quoted text, and parsed here where
the type of its key says that it is a map.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

_CLOSING = {"{": "}", "[": "]"}
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+|(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?)")
_CONSTANTS = {"true": True, "false": False, "null": None}


def split(text: str, separators: str) -> list[str]:
    """Split a text at separators outside of quotes and brackets."""
    pieces, start, depth, place = [], 0, 0, 0
    while place < len(text):
        letter, before = text[place], text[:place].rstrip()
        opens = letter in "'\"" and (not before or before[-1] in "{[(,:，：、")
        if opens and (word := _QUOTED.match(text, place)):
            place = word.end()
            continue
        depth += (letter in "{[(") - (letter in "}])")
        if depth == 0 and letter in separators:
            pieces.append(text[start:place])
            start = place + 1
        place += 1
    return [*pieces, text[start:]]


def is_bracketed(text: str) -> bool:
    """Whether a text is one list or one map."""
    text = text.strip()
    return text[:1] in _CLOSING and split(text, "}]")[1:] == [""] and text.endswith(_CLOSING[text[0]])


def is_quoted(text: str) -> bool:
    """Whether a text is one quoted string."""
    return _QUOTED.fullmatch(text.strip()) is not None


def parse(text: str) -> Any:
    """Parse a list, a map or a plain value, with ASCII or full-width punctuation.

    Raises:
        ValueError: for an entry of a map that is not ``key: value``, or a duplicate key.
    """
    text = text.strip()
    if is_bracketed(text) and text[0] == "[":
        return [parse(item) for item in _items(text)]
    if is_bracketed(text):
        values: dict[str, Any] = {}
        for key, value in _entries(text):
            name = _unquoted(key)
            if name in values:
                raise ValueError(f"the key {name} is given twice")
            values[name] = parse(value)
        return values
    if is_quoted(text):
        return _unquoted(text)
    if _NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    return _CONSTANTS.get(text.lower(), text)


def for_hydra(text: str) -> str:
    """A list, map or plain value, with quotes added where Hydra's grammar needs them."""
    text = text.strip()
    if is_bracketed(text) and text[0] == "[":
        return f"[{', '.join(map(for_hydra, _items(text)))}]"
    if is_bracketed(text):
        return f"{{{', '.join(f'{key}: {for_hydra(value)}' for key, value in _entries(text))}}}"
    return text if text.isascii() or is_quoted(text) else quoted(text)


def quoted(text: str) -> str:
    """A text in Hydra's quotes, in which a backslash only counts before a quote, and ``${`` is an interpolation."""
    inner = re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return "'" + re.sub(r"(\\*)\$\{", r"\1\1\\${", inner) + "'"


def for_shell(word: str) -> str:
    """Quote a word for the shell, in double quotes if it needs quotes and these suffice."""
    safe = shlex.quote(word)
    return safe if safe == word or re.search(r'["$`\\!]', word) else f'"{word}"'


def _items(text: str) -> list[str]:
    """Items of a list; full-width commas separate them if there are no others."""
    items = split(text.strip()[1:-1], ",")
    if len(items) == 1:
        items = split(items[0], "，、")
    return [item.strip() for item in items if item.strip()]


def _entries(text: str) -> list[tuple[str, str]]:
    """Keys and values of a map; a full-width comma separates entries if a key follows it."""
    parts = []
    for part in split(text.strip()[1:-1], ","):
        pieces = split(part, "，")
        parts += pieces if all(len(split(piece, ":：")) > 1 for piece in pieces) else [part]
    return [_entry(part.strip()) for part in parts if part.strip()]


def _entry(text: str) -> tuple[str, str]:
    for colon in ":：":
        key, *rest = split(text, colon)
        if rest and key.strip():
            return key.strip(), text[len(key) + 1 :].strip()
    raise ValueError(f"'{text}' is not an entry of a map; write {{key: value, key: value}}")


def _unquoted(text: str) -> str:
    return re.sub(r"\\(['\"\\])", r"\1", text[1:-1]) if _QUOTED.fullmatch(text) else text
