"""What the files below ``conf/`` say about themselves: the one source for lists of choices and for the reference."""

from __future__ import annotations

import re
from pathlib import Path

COMMAND = "python run.py"


def about(file: Path) -> str:
    """The description at the top of a configuration file, up to the command that uses it, as one line."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or COMMAND in line:
            break
        if "@package" not in line:
            words.append(line.removeprefix("#").strip())
    return " ".join(words)


def summary(file: Path) -> str:
    """The first sentence of `about`."""
    return re.split(r"(?<! al)\. ", about(file), maxsplit=1)[0].rstrip(".") + "."


def remarks(file: Path) -> dict[str, str]:
    """The remarks beside the keys of a configuration file.

    Returns:
        By dotted key, the text after ``#`` in its line, with further lines that hold nothing but a comment.
    """
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        key = re.match(r"( *)(\w+):", line)
        remark = re.search(r"(?:^|\s)#(?!.*['\"]) (.*)$", line)
        if key:
            path = [(indent, name) for indent, name in path if indent < len(key[1])] + [(len(key[1]), key[2])]
        dotted = ".".join(name for _, name in path)
        if remark and path and (key or (re.match(r" +#", line) and dotted in found)):
            found[dotted] = f"{found[dotted]} {remark[1].strip()}" if dotted in found else remark[1].strip()
        elif not key:
            path = path if line.startswith(" ") else []
    return found
