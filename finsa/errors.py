"""finsa's errors: each message says what is wrong, where, and what to do next.

Errors that a user can cause are instances of these classes, are reported in one message without a traceback, and end
with exit code 2. ``FINSA_DEBUG=1`` (or ``--debug``) shows the traceback as well.
"""

from __future__ import annotations

import difflib
import re
import signal
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


class FinsaError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do."""

    exit_code = 2


class DataError(FinsaError):
    """A file, column, label or split that cannot be used."""


class ModelError(FinsaError):
    """Weights, a tokenizer or an adapter that is not available or not compatible."""


class RunError(FinsaError):
    """A run folder that is missing, incomplete, damaged or of the wrong kind."""


class Stopped(KeyboardInterrupt):
    """The command was stopped by a signal; it can be resumed from what it has written.

    Args:
        number: number of the signal.
        saved: what was saved last, for the message.
    """

    def __init__(self, number: int, saved: str = "") -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}{f'; {saved}' if saved else ''}")


class Pruned(Exception):  # noqa: N818 - requested by the search, not an error
    """A trial of a search is stopped early because others have better scores."""


@dataclass(frozen=True)
class Problem:
    """One problem of a configuration.

    Args:
        path: dotted path of the key, such as ``train.learning_rate``.
        text: what is wrong with it, and what to do.
        origin: where the value was written: a file or ``command line``.
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
    """Suggest the choice that was probably meant, or list the choices.

    Args:
        name: what the user wrote.
        choices: the valid values.
        show: maximum number of choices listed if none is similar.

    Returns:
        ``Did you mean 'lora'?`` or ``Choose from: a, b, c.``; empty if there are no choices.
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
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")


def latinize(text: str) -> str:
    """Replace letters by the Latin letters they look like, and remove invisible characters."""
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).translate(_ALIKE)


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.55) -> str | None:
    """The choice most similar to `name`, or None if none has this similarity."""
    known = list(choices)
    lowered, name = {choice.lower(): choice for choice in known}, latinize(name)
    if name.lower() in lowered:
        return lowered[name.lower()]
    initials = {"".join(word[:1] for word in choice.split("_")): choice for choice in known if "_" in choice}
    if name.lower() in initials:  # lr for learning_rate
        return initials[name.lower()]
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=cutoff)
    return lowered[found[0]] if found else None


def counted(number: int, noun: str = "row") -> str:
    """A number of things, with the noun in the singular for one: 1 row, 1,203 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
