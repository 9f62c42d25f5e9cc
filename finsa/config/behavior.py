"""The section ``behavior``: rules that change test rows, and what must then happen to the predicted label."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from finsa.config.base import Label, Name, Section


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the regular expression {pattern!r} does not compile: {error}") from None
    return pattern


Pattern = Annotated[str, BeforeValidator(lambda value: _compiles(value) if isinstance(value, str) else value)]


class BehaviorRule(Section):
    """A change of a text that must not change its label, or must flip it (invariance and directional tests, CheckList).

    The changes are made in the order swap, replace, characters, append; a rule applies to the rows that they change.

    Args:
        expect: ``stay``: the label must stay; ``flip``: it must become the opposite one.
        about: what is changed, for readers of the table.
        of: only rows with a positive or with a negative true label; null: all rows, for a flip all with an opposite.
        when, unless: regular expressions that a text must and must not contain.
        swap: words, each of which is replaced by the other; a capital first letter is kept.
        around: regular expressions before and after a swapped word, such as ``['\\b', '\\b']``.
        replace: regular expressions and their replacements.
        times: maximum number of replacements per expression; null: all.
        characters: two texts of the same length: each character of the first becomes that of the second.
        append: a sentence.
    """

    expect: Literal["stay", "flip"]
    about: str
    of: Literal["positive", "negative"] | None = None
    when: Pattern | None = None
    unless: Pattern | None = None
    swap: dict[str, str] = Field(default_factory=dict)
    around: tuple[Pattern, Pattern] = ("", "")
    replace: dict[Pattern, str] = Field(default_factory=dict)
    times: PositiveInt | None = None
    characters: tuple[str, str] | None = None
    append: str = ""

    @model_validator(mode="after")
    def _check(self) -> BehaviorRule:
        if not (self.swap or self.replace or self.characters or self.append):
            raise ValueError("changes nothing; it needs swap, replace, characters or append")
        if self.characters is not None and len(self.characters[0]) != len(self.characters[1]):
            raise ValueError(f"characters: {len(self.characters[0])} against {len(self.characters[1])}")
        for pattern, new in self.replace.items():
            try:
                re.sub(pattern, new, "")
            except (re.error, IndexError) as error:
                raise ValueError(f"the replacement {new!r} does not fit {pattern!r}: {error}") from None
        return self

    def changed(self, text: str) -> str:
        """The changed text; the same text if the rule does not apply to it."""
        if (self.when and not re.search(self.when, text)) or (self.unless and re.search(self.unless, text)):
            return text
        new = text
        if self.swap:
            pairs = {**{b.lower(): a for a, b in self.swap.items()}, **{a.lower(): b for a, b in self.swap.items()}}
            words = "|".join(re.escape(word) for word in sorted(pairs, key=len, reverse=True))

            def other(found: re.Match[str]) -> str:
                old, (start, end) = found["word"], found.span("word")
                word = pairs[old.lower()]
                word = word[:1].upper() + word[1:] if old[:1].isupper() else word
                return f"{text[found.start() : start]}{word}{text[end : found.end()]}"

            new = re.sub(f"{self.around[0]}(?P<word>{words}){self.around[1]}", other, text, flags=re.IGNORECASE)
        for pattern, replacement in self.replace.items():
            new = re.sub(pattern, replacement, new, count=self.times or 0)
        if self.characters is not None:
            new = new.translate(str.maketrans(*self.characters))
        return new + self.append


class Poles(Section):
    """A pair of opposite labels."""

    positive: Label
    negative: Label

    @model_validator(mode="after")
    def _check(self) -> Poles:
        if self.positive == self.negative:
            raise ValueError(f"the same label twice, {self.positive}")
        return self


class Behavior(Section):
    """Rules for the texts of one language.

    Args:
        opposites: pairs of labels; those that the data have decide what a flip is.
        rules: by name.
    """

    name: Name
    opposites: tuple[Poles, ...]
    rules: Annotated[dict[Name, BehaviorRule], Field(min_length=1)]
