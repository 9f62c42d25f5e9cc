"""The result of a translation: chosen files and settings, and what happened to every key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from finsa.errors import ConfigError, Problem

SECRET = re.compile("token|secret|api_key|password|webhook", re.IGNORECASE)
Kind = Literal["translated", "no effect", "not supported"]


@dataclass(frozen=True)
class Outcome:
    """What happened to a key.

    Args:
        key: its name in the translated file.
        value: its value; None if a default was translated.
        kind: whether it was translated.
        text: the setting it became, or the reason why it did not become one.
    """

    key: str
    value: Any
    kind: Kind
    text: str


@dataclass
class Translation:
    """A file or an entry of one, and what its keys are translated to.

    Args:
        given: the translated content.
        name: name of the file or entry, for messages.
        choices: chosen file of each group.
        values: settings by dotted key.
        outcomes: outcome of each key.
    """

    given: Mapping[str, Any]
    name: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default if it is missing or null."""
        value = self.given.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """The value of a key as a number; YAML reads 1e-4 as text.

        Raises:
            ConfigError: if it is not a number.
        """
        value = self.get(key, default)
        try:
            return float("none" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            raise self.error(key, f"must be a number, not {yaml_line(value)}") from None

    def integer(self, key: str, default: int) -> int:
        """The value of a key as an integer.

        Raises:
            ConfigError: if it is not an integer.
        """
        value = self.number(key, default)
        if not value.is_integer():
            raise self.error(key, f"must be an integer, not {value}")
        return int(value)

    def error(self, key: str, text: str) -> ConfigError:
        """The error for a key that cannot be translated."""
        return ConfigError([Problem(key, text, self.name)])

    def choose(self, key: str, group: str, choice: str) -> None:
        """Translate a key into the choice of a file."""
        self.choices[group] = choice
        self.record(key, "translated", f"{group}={choice}")

    def set(self, key: str, setting: str, value: Any, remark: str = "") -> None:
        """Translate a key into a setting."""
        self.values[setting] = value
        text = f"{setting}={value if isinstance(value, str) else yaml_line(value)}"
        self.record(key, "translated", f"{text} ({remark})" if remark else text)

    def record(self, key: str, kind: Kind, text: str) -> None:
        """Record the outcome of a key; of a key that is not given, only the translation of its default."""
        if key in self.given or kind == "translated":
            value = "(a secret)" if SECRET.search(key) and "tokens" not in key else self.given.get(key)
            self.outcomes.append(Outcome(key, value, kind, text))

    def remaining(self) -> list[str]:
        """The given keys without an outcome."""
        done = {outcome.key for outcome in self.outcomes}
        return [key for key in self.given if key not in done]


def yaml_line(value: Any) -> str:
    """A value in YAML, on one line."""
    text = str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6))
    return text.removesuffix("...\n").strip()


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections of dotted keys."""
    result: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, last = dotted.split(".")
        section = result
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return result


def header(translation: Translation, title: str, command: str) -> list[str]:
    """The comment at the top of a written file: what it is, how it is used, and which keys were not translated."""
    lines = [title, command]
    for kind, words in (
        ("no effect", "Without effect on the result"),
        ("not supported", "NOT SUPPORTED, so different here"),
    ):
        outcomes = [outcome for outcome in translation.outcomes if outcome.kind == kind]
        lines += [f"{words}:"] if outcomes else []
        lines += [f"  {outcome.key}: {yaml_line(outcome.value)} - {outcome.text}" for outcome in outcomes]
    return [f"# {line}" for line in lines]
