"""Lists and maps as a command line writes them: more than Hydra's grammar takes, which knows Chinese in quotes only.

Hydra takes no quoted keys at all, so a map with Chinese keys reaches the configuration as one quoted text and is read
here once its place is known to hold a map.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

_CLOSING = {"{": "}", "[": "]"}
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+|(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?)")
_WORDS = {"true": True, "false": False, "null": None}


def split(text: str, separators: str) -> list[str]:
    """Split a text at characters that stand outside of quotes and brackets; the pieces keep everything else."""
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
    """Whether a text is one word in quotes."""
    return _QUOTED.fullmatch(text.strip()) is not None


def read(text: str) -> Any:
    """Read a list, a map or a plain value, with ASCII or full-width punctuation.

    Raises:
        ValueError: for an entry of a map that is no ``key: value``, or a key that stands there twice.
    """
    text = text.strip()
    if is_bracketed(text) and text[0] == "[":
        return [read(item) for item in items(text)]
    if is_bracketed(text):
        found: dict[str, Any] = {}
        for key, value in entries(text):
            name = str(_plain(key))
            if name in found:
                raise ValueError(f"the key {name} is given twice")
            found[name] = read(value)
        return found
    if is_quoted(text):
        return _plain(text)
    if _NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    return _WORDS.get(text.lower(), text)


def for_hydra(text: str) -> str:
    """The same list, map or plain value with every word quoted that Hydra's grammar takes in quotes only."""
    stripped = text.strip()
    if is_bracketed(stripped) and stripped[0] == "[":
        return f"[{', '.join(map(for_hydra, items(stripped)))}]"
    if is_bracketed(stripped):
        return f"{{{', '.join(f'{key}: {for_hydra(value)}' for key, value in entries(stripped))}}}"
    return stripped if stripped.isascii() or is_quoted(stripped) else quoted(stripped)


def items(text: str) -> list[str]:
    """Items of a list; full-width commas separate them where there are no others."""
    found = split(text.strip()[1:-1], ",")
    if len(found) == 1:
        found = split(found[0], "，、")
    return [item.strip() for item in found if item.strip()]


def entries(text: str) -> list[tuple[str, str]]:
    """Keys and values of a map; a full-width comma separates entries where a key follows it.

    Raises:
        ValueError: for an entry that is no ``key: value``.
    """
    found = []
    for part in split(text.strip()[1:-1], ","):
        pieces = split(part, "，")
        found += pieces if all(len(split(piece, ":：")) > 1 for piece in pieces) else [part]
    return [_entry(part.strip()) for part in found if part.strip()]


def _entry(text: str) -> tuple[str, str]:
    for colon in ":：":
        key, *rest = split(text, colon)
        if rest and key.strip():
            return key.strip(), text[len(key) + 1 :].strip()
    raise ValueError(f"'{text}' is no entry of a map; write {{key: value, key: value}}")


def quoted(text: str) -> str:
    """A text in Hydra's quotes: a backslash counts there before a quote alone, and ${ asks for another value."""
    inner = re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return "'" + re.sub(r"(\\*)\$\{", r"\1\1\\${", inner) + "'"


def for_shell(word: str) -> str:
    """A word of a command as it is typed into a shell, in double quotes where it needs some and they suffice."""
    safe = shlex.quote(word)
    return safe if safe == word or re.search(r'["$`\\!]', word) else f'"{word}"'


def _plain(text: str) -> str:
    return re.sub(r"\\(['\"\\])", r"\1", text[1:-1]) if _QUOTED.fullmatch(text) else text
