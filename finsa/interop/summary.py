"""What became of every key of a translated file, and the file that is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from finsa.errors import ConfigError, Problem

SECRET = re.compile("token|secret|api_key|password|webhook", re.IGNORECASE)
Kind = Literal["translated", "no effect", "not supported"]


@dataclass(frozen=True)
class Fate:
    """What became of one key.

    Args:
        key: as the other trainer calls it.
        value: as given; None where its default was taken.
        kind: what became of it.
        text: what it is called here, or the reason.
    """

    key: str
    value: Any
    kind: Kind
    text: str


@dataclass
class Account:
    """A file's keys, taken one by one; what nobody takes is still there in the end.

    Args:
        given: the file's content.
        name: of the file, for messages.
        choices: files chosen, by group.
        values: settings, by dotted key.
        fates: what became of the keys.
    """

    given: Mapping[str, Any]
    name: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value; the default as well where it is empty."""
        value = self.given.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """A key's value as a number; YAML reads 1e-4 as text.

        Raises:
            ConfigError: where it is none.
        """
        value = self.get(key, default)
        try:
            return float("none" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            raise ConfigError([Problem(key, f"is a number, not {yaml_line(value)}", self.name)]) from None

    def whole(self, key: str, default: int) -> int:
        """A key's value as a whole number.

        Raises:
            ConfigError: where it is none.
        """
        value = self.number(key, default)
        if not value.is_integer():
            raise ConfigError([Problem(key, f"is a whole number, not {value}", self.name)])
        return int(value)

    def choose(self, key: str, group: str, choice: str) -> None:
        """A key becomes the choice of a file."""
        self.choices[group] = choice
        self.tell(key, "translated", f"{group}={choice}")

    def set(self, key: str, dotted: str, value: Any, remark: str = "") -> None:
        """A key becomes a setting."""
        self.values[dotted] = value
        said = f"{dotted}={value if isinstance(value, str) else yaml_line(value)}"
        self.tell(key, "translated", f"{said} ({remark})" if remark else said)

    def tell(self, key: str, kind: Kind, text: str) -> None:
        """Note what became of a key; one that is not in the file is noted where its default is translated."""
        if key in self.given or kind == "translated":
            value = "(a secret)" if SECRET.search(key) and "tokens" not in key else self.given.get(key)
            self.fates.append(Fate(key, value, kind, text))

    def left(self) -> Iterator[str]:
        """Keys that nothing was said about yet."""
        told = {fate.key for fate in self.fates}
        return (key for key in self.given if key not in told)


def yaml_line(value: Any) -> str:
    """A value as it stands in a YAML file, on one line."""
    return (
        str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6))
        .removesuffix("...\n")
        .strip()
    )


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections within sections."""
    whole: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, last = dotted.split(".")
        place = whole
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return whole


def header(account: Account, title: str, command: str) -> list[str]:
    """Comment lines: what the file is, how it is used, and what it does not say."""
    lines = [title, command]
    for kind, words in (
        ("no effect", "Without effect on the result"),
        ("not supported", "NOT SUPPORTED, so different here"),
    ):
        told = [fate for fate in account.fates if fate.kind == kind]
        lines += [f"{words}:"] if told else []
        lines += [f"  {fate.key}: {yaml_line(fate.value)} - {fate.text}" for fate in told]
    return [f"# {line}" for line in lines]
