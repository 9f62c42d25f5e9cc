"""Mutation tests of commands: every valid command with one fault, its message, and whether anything was started.

    python tests/mutations.py 3000        the long version: `make mutations`

A mutation knows the path that must be named and, where one can be made, the suggestion that must come first. The real
check runs for each command in this process, with a main function that records that it was reached.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from finsa import cli
from finsa.config import RunConfig, catalogue, command_line, compose
from finsa.config import keys as dotted
from finsa.errors import ConfigError, nearest
from finsa.session import Session

NEEDS = {
    "stage=audit": ["input=answers.csv"],
    "stage=augment": ["output=somewhere"],
    "stage=behave": ["run=somewhere"],
    "stage=cascade": ["runs=[somewhere,elsewhere]"],
    "stage=export": ["run=somewhere", "format=onnx"],
    "stage=generate": ["data=generated", "output=somewhere"],
    "stage=import": ["input=llama.yaml", "output=somewhere"],
    "stage=predict": ["run=somewhere", "input=rows.csv", "output=answers.csv"],
    "stage=pretrain": ["data=tiny_corpus"],
    "stage=push": ["run=somewhere", "stage.repo=some/model"],
    "stage=report": ["runs=somewhere"],
    "stage=rerun": ["run=somewhere"],
    "stage=serve": ["run=somewhere"],
    "stage=synthesize": ["output=somewhere", "stage.model=some"],
}
FROM_RUN = (
    "stage=export",
    "stage=predict",
    "stage=push",
    "stage=rerun",
    "stage=serve",
)  # a run folder brings model, method and data


@dataclass(frozen=True)
class Mutation:
    """A mutated command.

    Args:
        kind: kind of fault.
        words: words added to a valid command.
        path: the path that must be named.
        suggested: the required suggestion; None if there is none.
    """

    kind: str
    words: tuple[str, ...]
    path: str
    suggested: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of a mutated command."""

    base: tuple[str, ...]
    mutation: Mutation
    code: int
    started: bool
    said: str

    @property
    def caught(self) -> bool:
        """Whether it ended in exit code 2 with the right path, before anything was started."""
        told = any(f"{start}{self.mutation.path}: " in self.said for start in ("error: ", "\n  "))
        return self.code == 2 and not self.started and told and "Traceback" not in self.said

    @property
    def helped(self) -> bool:
        """Whether the right suggestion is the first one."""
        at = self.said.find("Did you mean '")
        if self.mutation.suggested is None:
            return True
        if self.mutation.suggested.startswith("write "):
            return self.mutation.suggested in self.said
        return at >= 0 and self.said[at:].startswith(f"Did you mean '{self.mutation.suggested}'?")


@cache
def bases(*groups: str) -> tuple[tuple[str, ...], ...]:
    """Every choice of these or all groups with its required options; the command without words comes first."""
    found: list[tuple[str, ...]] = [()]
    for group in groups or catalogue.groups():
        for choice in catalogue.choices_of(group):
            word = f"{group}={choice}"
            found.append((word, *NEEDS.get(word, ())))
    return tuple(base for base in found if _valid(base))


def _valid(base: tuple[str, ...]) -> bool:
    try:
        command_line.check(base)
    except ConfigError:
        return False  # a method that the default data or model does not fit
    return True


@cache
def values_of(base: tuple[str, ...]) -> dict[str, Any]:
    """The composed values, flat."""
    return dict(_flat(compose.compose_values(base)[0]))


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def annotation(key: str) -> Any:
    """The type of a key; None below a mapping."""
    known: Any = RunConfig
    for part in key.split("."):
        fields = dotted.fields_of(known)
        if not fields or part not in fields:
            return None
        known = fields[part]
    return known


def keys(base: tuple[str, ...]) -> list[str]:
    """Typed keys of a composition that a command may set in its stage."""
    own = ("model", "method", "data", "seed") if base and base[0] in FROM_RUN else ()
    given = {word.partition("=")[0] for word in base}
    skipped = (*own, "experiment", "published", "sweep", "runs", "run")
    return [
        key
        for key in values_of(base)
        if key.split(".")[0] not in skipped and key not in given and annotation(key) is not None
        and key.count(".") <= 3
    ]  # fmt: skip


def misspelt(word: str, chance: random.Random) -> str:
    """A word with one letter lost, doubled, changed, or two swapped; never the word itself."""
    while True:
        at = chance.randrange(len(word))
        how = chance.randrange(4)
        if how == 0 and len(word) > 3:
            made = word[:at] + word[at + 1 :]
        elif how == 1:
            made = word[:at] + word[at] + word[at:]
        elif how == 2 and at + 1 < len(word):
            made = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        else:
            made = word[:at] + chance.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :]
        if made != word and made[0].isalpha() and made[-1] not in "._-":
            return made


Maker = Callable[[tuple[str, ...], random.Random], Mutation | None]


def misspelt_key(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A key with a typing error in one of its parts, with or without a plus."""
    key = chance.choice([key for key in keys(base) if "." in key])
    parts = key.split(".")
    at = chance.randrange(1, len(parts))
    wrong = [*parts[:at], misspelt(parts[at], chance), *parts[at + 1 :]]
    if len(parts[at]) < 4 or dotted.unknown_key(".".join(wrong)) is None:
        return None
    plus = chance.choice(["", "", "+", "++"])
    return Mutation("misspelt key", (f"{plus}{'.'.join(wrong)}=1",), ".".join(wrong), ".".join(parts[: at + 1]))


def misspelt_choice(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A choice with a typing error."""
    group = chance.choice([group for group in catalogue.groups() if group not in {w.split("=")[0] for w in base}])
    choice = chance.choice(catalogue.choices_of(group))
    wrong = misspelt(choice, chance)
    if len(choice) < 4 or wrong in catalogue.choices_of(group):
        return None
    return Mutation("misspelt choice", (f"{group}={wrong}",), group, choice)


def misspelt_value(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """One of a few words that a key accepts, with a typing error."""
    words = [key for key in keys(base) if typing.get_origin(annotation(key)) is typing.Literal and key.count(".") == 1]
    key = chance.choice(words)
    value = chance.choice([value for value in typing.get_args(annotation(key)) if isinstance(value, str)])
    wrong = misspelt(value, chance)
    if len(value) < 4 or wrong in typing.get_args(annotation(key)) or key.endswith(".name"):
        return None
    return Mutation("misspelt value", (f"{key}={wrong}",), key, value)


WRONG = {"int": ["abc", "1.5", "true", "[1]"], "float": ["abc", "true", "[0.1]"], "bool": ["1", "maybe", "0.5"]}
WRONG["str"] = ["[a]", "{a: 1}", "true"]


def wrong_type(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A value of the wrong type for the key."""
    key = chance.choice(keys(base))
    kind = type(values_of(base)[key]).__name__
    if kind not in WRONG or typing.get_origin(annotation(key)) is typing.Literal:
        return None
    value = chance.choice(WRONG[kind])
    if kind == "str" and (value[0] in "[{" or "tuple" in str(annotation(key)) or "dict" in str(annotation(key))):
        value = "true"
    if kind == "int" and value == "1.5" and "float" in str(annotation(key)):
        value = "abc"
    if value == "true" and "bool" in str(annotation(key)):  # a key of words, true and false
        return None
    return Mutation("wrong type", (f"{key}={value}",), key)


def wrong_nesting(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A value in place of a section, a section in place of a value, or a key in another section."""
    how = chance.randrange(3)
    key = chance.choice([key for key in keys(base) if key.count(".") == 1])
    section, name = key.split(".")
    if how == 0:
        if isinstance(values_of(base)[key], dict) or dotted.fields_of(annotation(key)) is None:
            return None
        return Mutation("wrong nesting", (f"{key}.inner=1",), f"{key}.inner")
    if how == 1:
        inner = sorted({key.rpartition(".")[0] for key in keys(base) if key.count(".") == 2})
        if not inner:  # a command may have no section within a section
            return None
        outer = chance.choice(inner)
        return Mutation("wrong nesting", (f"{outer}=5",), outer)
    if name in ("name",) or section == "stage" or base[:1] == ("stage=synthesize",):
        return None
    other = chance.choice([group for group in ("train", "tracking") if group != section])
    sections = dotted.fields_of(RunConfig) or {}
    owners = [each for each, kind in sections.items() if name in (dotted.fields_of(kind) or {})]
    if owners != [section] or nearest(name, dotted.fields_of(sections[other]) or {}):
        return None
    return Mutation("wrong nesting", (f"{other}.{name}=1",), f"{other}.{name}", key)


OUTSIDE = {
    "train.epochs": ["0", "-1", "nan", "inf"],
    "train.batch_size": ["0", "-16"],
    "train.learning_rate": ["0", "-1e-4", "nan"],
    "train.weight_decay": ["-0.1"],
    "train.max_grad_norm": ["0"],
    "train.keep_checkpoints": ["0"],
    "train.process_timeout": ["0", "-5"],
    "data.split.validation": ["0", "0.5", "1.5"],
    "data.split.test": ["-0.1", "0.6"],
    "data.max_length": ["7", "-1"],
    "data.near_duplicates.threshold": ["0", "1.1"],
    "method.classifier_dropout": ["1", "-0.1"],
    "method.loss.smoothing": ["1", "-1"],
    "method.loss.gamma": ["-2"],
    "seed": ["-1"],
}


def out_of_range(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A number that is too small or too large."""
    key = chance.choice([key for key in OUTSIDE if key in keys(base)] or ["train.epochs"])
    return Mutation("out of range", (f"{key}={chance.choice(OUTSIDE[key])}",), key)


def smuggled(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A key introduced by a plus or another package."""
    key = chance.choice([key for key in keys(base) if key.count(".") == 1 and annotation(key) is not None])
    if dotted.below_mapping(key):
        return None
    group = chance.choice(["train", "tracking"])
    choice = chance.choice(catalogue.choices_of(group))
    return chance.choice(
        [
            Mutation("smuggled", (f"+{key}=1",), key, f"write {key}=1 without the +"),
            Mutation("smuggled", (f"+{group}={choice}",), group, f"write {group}={choice}"),
            Mutation("smuggled", (f"{group}@model={choice}",), group, f"write {group}=<name> without @"),
            Mutation("smuggled", ("+nothing.here=1",), "nothing.here"),
            Mutation("smuggled", ("+train._target_=os.system",), "train._target_"),
            Mutation("smuggled", ("+model.architecture._target_=os.system",), "model.architecture._target_"),
            Mutation("smuggled", ("+hydra.callbacks.x._target_=os.system",), "hydra.callbacks.x._target_"),
        ]
    )


def deleted(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A deleted key or group."""
    key = chance.choice([*keys(base), *catalogue.groups()])
    return Mutation("deleted", (f"~{key}",), f"~{key}")


CONTRADICTIONS = [
    (("train.batch_size=17", "train.micro_batch_size=5"), "train"),
    (("model.think=closed", "model.prompt=plain"), "model"),
    (("method.learn=all",), "method"),
    (("method.adapter=null",), "method"),
    (("method.head=classifier",), "method"),
    (("method.loss.name=focal",), "method"),
    (("method=qlora", "method.learn=all", "method.adapter=null"), "method"),
    (("method=qlora", "method.adapter.variant=pissa"), "method"),
    (("method=qlora", "train.strategy=fsdp"), "configuration"),
    (("method=majority", "train.strategy=ddp"), "configuration"),
    (("data.source=mixture",), "data"),
    (("data.ratios={a: 1}",), "data"),
    (("port=80",), "configuration"),
    (("input=a.csv",), "configuration"),
    (("format=onnx",), "configuration"),
    (("data.labels=[a,a]",), "data.labels"),
    (("data.prompt='no place'",), "data.prompt"),
    (("run=somewhere", "seed=3"), "seed"),
]


def contradictory(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """Incompatible options, on the command without words."""
    if base:
        return None
    words, path = chance.choice(CONTRADICTIONS)
    return Mutation("contradictory", words, path)


def twice(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A duplicate key or choice."""
    if chance.randrange(2):
        group = chance.choice([group for group in ("train", "tracking") if f"{group}=" not in " ".join(base)] or ["x"])
        if group == "x":
            return None
        first, second = chance.sample(list(catalogue.choices_of(group)), 2)
        return Mutation("given twice", (f"{group}={first}", f"{group}={second}"), group)
    key = chance.choice(keys(base))
    return Mutation("given twice", (f"{key}=1", f"{key}=2"), key)


def empty(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A key without a value, a value without a key."""
    key = chance.choice(keys(base))
    if isinstance(values_of(base)[key], int | float):
        return Mutation("empty", (f"{key}=",), key)
    group = chance.choice([group for group in catalogue.groups() if group not in {w.split("=")[0] for w in base}])
    return chance.choice([Mutation("empty", (f"{group}=",), group), Mutation("empty", (key,), key)])


ALIKE = {"a": "а", "e": "е", "o": "о", "c": "с", "p": "р", "i": "і", "x": "х"}


def alike(base: tuple[str, ...], chance: random.Random) -> Mutation | None:
    """A Cyrillic, full-width or invisible letter in a key, a choice or a value."""

    def spoil(word: str) -> str:
        places = [at for at, letter in enumerate(word) if letter in ALIKE]
        if not places or not chance.randrange(3):
            at = chance.randrange(1, len(word))
            return word[:at] + chance.choice(["\u200b", "\u2060"]) + word[at:]
        at = chance.choice(places)
        wide = chr(ord(word[at]) + 0xFEE0)
        return word[:at] + chance.choice([ALIKE[word[at]], wide]) + word[at + 1 :]

    how = chance.randrange(2)
    if how == 0:
        key = chance.choice(keys(base))
        wrong = spoil(key)
        return Mutation("look-alike", (f"{wrong}=1",), wrong, key)
    group = chance.choice([group for group in catalogue.groups() if group not in {w.split("=")[0] for w in base}])
    choice = chance.choice(catalogue.choices_of(group))
    return Mutation("look-alike", (f"{group}={spoil(choice)}",), group, choice)


MAKERS: tuple[Maker, ...] = (
    misspelt_key, misspelt_choice, misspelt_value, wrong_type, wrong_nesting, out_of_range, smuggled, deleted,
    contradictory, twice, empty, alike,
)  # fmt: skip


def mutated(number: int, seed: int, of: tuple[tuple[str, ...], ...]) -> Iterator[tuple[tuple[str, ...], Mutation]]:
    """`number` mutated commands, of all kinds and over all bases in turn."""
    chance = random.Random(seed)
    made = 0
    while made < number:
        maker = MAKERS[made % len(MAKERS)]
        base = () if maker is contradictory else of[made * 7 % len(of)] if chance.randrange(2) else chance.choice(of)
        mutation = maker(base, chance)
        if mutation is not None:
            made += 1
            yield base, mutation


def judge(base: tuple[str, ...], mutation: Mutation) -> Verdict:
    """Run the real check on a command."""
    reached: list[bool] = []
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.guard(lambda: reached.append(True), ["run.py", *base, *mutation.words], Session())
    return Verdict(base, mutation, code, bool(reached), said.getvalue())


def run(number: int, seed: int = 8, of: tuple[tuple[str, ...], ...] | None = None) -> list[Verdict]:
    """Judge `number` mutated commands."""
    return [judge(base, mutation) for base, mutation in mutated(number, seed, of or bases())]


def main() -> int:
    """Judge and count; exit code 1 if the required shares are not reached."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    with tempfile.TemporaryDirectory() as empty_folder, contextlib.chdir(empty_folder):
        found = run(number)
        left = list(Path(empty_folder).iterdir())
    print(f"{number:,} mutations of {len(bases())} valid commands")
    for kind, count in sorted(Counter(verdict.mutation.kind for verdict in found).items()):
        own = [verdict for verdict in found if verdict.mutation.kind == kind]
        hinted = [verdict for verdict in own if verdict.mutation.suggested is not None]
        print(
            f"  {kind:16} {sum(v.caught for v in own):5,} of {count:5,} caught"
            f"  {sum(v.helped for v in hinted):5,} of {len(hinted):5,} with the right suggestion first"
        )
    caught, hinted = sum(v.caught for v in found), [v for v in found if v.mutation.suggested is not None]
    helped = sum(v.helped for v in hinted)
    print(f"caught {caught:,} of {len(found):,}; right suggestion first {helped:,} of {len(hinted):,}", end="; ")
    print(f"torch imported: {'torch' in sys.modules}; files left: {len(left)}")
    for verdict in [v for v in found if not v.caught] + [v for v in hinted if not v.helped][:40]:
        print("MISSED" if not verdict.caught else "HINT", verdict.base, verdict.mutation, verdict.code, verdict.said)
    good = caught == len(found) and helped >= 0.95 * len(hinted) and "torch" not in sys.modules and not left
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
