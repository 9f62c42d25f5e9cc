"""finsa's errors: each says what is wrong, where, and what to do next.

Whatever a user can cause ends in one of these classes, is shown as one message without a traceback, and gives exit
code 2. ``FINSA_DEBUG=1`` (or ``--debug``) shows the traceback as well.
"""

from __future__ import annotations

import difflib
import re
import signal
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


class FinsaError(Exception):
    """Something the user can mend. The message carries path, problem and remedy."""

    exit_code = 2


class DataError(FinsaError):
    """A file, column, label or split that cannot be used."""


class ModelError(FinsaError):
    """Weights, a tokenizer or an adapter that cannot be had or do not fit."""


class RunError(FinsaError):
    """A run folder that is missing, incomplete, damaged or of another kind."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the command; what it wrote can be gone on with.

    Args:
        number: of the signal.
        saved: what was saved last, for the message.
    """

    def __init__(self, number: int, saved: str = "") -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}{f'; {saved}' if saved else ''}")


class Pruned(Exception):  # noqa: N818 - a wish of the search, no error
    """A trial of a search that was stopped early because others did better; nothing is wrong."""


@dataclass(frozen=True)
class Problem:
    """One fault of a configuration.

    Args:
        path: dotted path of the key, such as ``train.learning_rate``.
        text: what is wrong with it, the remedy included.
        origin: where the value was written: a file below ``conf/`` or ``command line``.
    """

    path: str
    text: str
    origin: str = ""

    def __str__(self) -> str:
        where = f"  [{self.origin}]" if self.origin else ""
        return f"{self.path}: {self.text}{where}"


class ConfigError(FinsaError):
    """All problems of a configuration at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def suggest(name: str, choices: Iterable[str], show: int = 12) -> str:
    """Say which of the choices was probably meant.

    Args:
        name: what the user wrote.
        choices: what would have been right.
        show: how many choices are listed when none is near.

    Returns:
        ``Did you mean 'lora'?`` or ``Choose from: a, b, c.``; empty where there is nothing to choose from.
    """
    known = sorted(set(choices))
    near = nearest(name, known)
    if near:
        return f"Did you mean '{near}'?"
    if not known:
        return ""
    more = f", … ({len(known)} in all)" if len(known) > show else ""
    return f"Choose from: {', '.join(known[:show])}{more}."


# Letters of other scripts that look like Latin ones, after Unicode's own folding of wide and styled forms.
_ALIKE = str.maketrans(
    "аеорсухіјѕһԁӏɡ" + "АВЕКМНОРСТХІЅ" + "αονικρτυ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijshdlg" + "ABEKMHOPCTXIS" + "aovikptu" + "ABEZHIKMNOPTYX",
)
_UNSEEN = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")


def plainly(text: str) -> str:
    """A text with the Latin letters that its letters look like, and without characters that cannot be seen."""
    return _UNSEEN.sub("", unicodedata.normalize("NFKC", text)).translate(_ALIKE)


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like `name`, or None where none is near."""
    known = list(choices)
    lowered, name = {choice.lower(): choice for choice in known}, plainly(name)
    if name.lower() in lowered:
        return lowered[name.lower()]
    initials = {"".join(word[:1] for word in choice.split("_")): choice for choice in known if "_" in choice}
    if name.lower() in initials:  # lr for learning_rate
        return initials[name.lower()]
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.55)
    return lowered[found[0]] if found else None
