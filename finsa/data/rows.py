"""Rendering of rows: token ids and loss mask.

A row is prefix + text + suffix + answer + end token. Only the text is ever truncated, and the room for it does not
depend on the label, so a text has the same prompt tokens in training, evaluation, prediction and serving. The
parts are encoded separately, so that the tokens of an answer are those that are scored, whatever precedes them.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, overload

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.errors import ConfigError, Problem
from finsa.runs.progress import Moved, ignored

IGNORE = -100
CHUNK = 10_000  # texts encoded at a time
LEAST = 8  # minimum number of tokens that remain of the truncated part of a text
IntArray = NDArray[Any]


class Row(TypedDict):
    """One training example.

    Args:
        input_ids: token ids, (s,).
        labels: the id to predict at each position, -100 where there is no loss, (s,).
        weight: weight of the row in the loss; 1 if absent.
        target: number of its class, if the loss is over the classes.
        values: its number, or a 1 for each label that it has and a 0 for the others.
        rejected: number of the wrong class of its pair.
        reference: log-probabilities of the classes by the model that training starts from, (c,).
        text_span: start and end of the text tokens, if a head or router reads them.
        domain: number of the expert of its domain; -1 if the domain has no expert.
    """

    input_ids: list[int]
    labels: list[int]
    weight: NotRequired[float]
    target: NotRequired[int]
    values: NotRequired[list[float]]
    rejected: NotRequired[int]
    reference: NotRequired[list[float]]
    text_span: NotRequired[tuple[int, int]]
    domain: NotRequired[int]


class LazyRows(Sequence[Row]):
    """Rows that are built on access, so that millions of them fit into memory."""

    @abstractmethod
    def row(self, at: int) -> Row:
        """Build one row; `at` is not negative."""

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        """One row, or a list of them."""
        numbers = range(len(self))[at]
        return self.row(numbers) if isinstance(numbers, int) else [self.row(number) for number in numbers]


@dataclass(frozen=True, eq=False)
class Encoded(Sequence[list[int]]):
    """Tokenized prompts: a sequence of id lists, stored in flat arrays so that millions of them fit into memory.

    Args:
        prefix, suffix: tokens before and after every text.
        tokens: ids of all texts, concatenated, (t,).
        ends: end of each text in `tokens`, (n,).
        cut: number of tokens that were truncated from each text, (n,).
    """

    prefix: list[int]
    suffix: list[int]
    tokens: IntArray
    ends: IntArray
    cut: IntArray

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> list[int]: ...
    @overload
    def __getitem__(self, at: slice) -> Encoded: ...
    def __getitem__(self, at: int | slice) -> list[int] | Encoded:
        """Prefix, text and suffix of one prompt; or a slice of prompts."""
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"prompts can be sliced without gaps only, not in steps of {step}")
            start = self._start(first) if first < last else 0
            stop = int(self.ends[last - 1]) if first < last else 0
            return replace(
                self, tokens=self.tokens[start:stop], ends=self.ends[first:last] - start, cut=self.cut[first:last]
            )
        at = range(len(self))[at]
        return [*self.prefix, *self.tokens[self._start(at) : self.ends[at]].tolist(), *self.suffix]

    def _start(self, at: int) -> int:
        return int(self.ends[at - 1]) if at else 0

    @property
    def lengths(self) -> IntArray:
        """Tokens per prompt, (n,)."""
        return np.diff(self.ends, prepend=0) + len(self.prefix) + len(self.suffix)

    @property
    def truncated(self) -> int:
        """Number of truncated texts."""
        return int((self.cut > 0).sum())


class Renderer:
    """Turns texts into prompt tokens, and prompts with labels into rows.

    Args:
        tokenizer: a fast tokenizer of transformers.
        prompt: prefix and suffix of every text.
        labels: classes and the words that answer them.
        max_length: of a whole row without its examples, in tokens.

    Raises:
        ConfigError: if prompt and answer leave no room for text, two words have the same tokens, or there is no end
            token.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt, labels: LabelSpace, max_length: int) -> None:
        self.tokenizer, self.prompt, self.labels = tokenizer, prompt, labels
        self._literal, self._tokenizer_hash = _literal(tokenizer, len(tokenizer))
        leading, has_examples = _leading(tokenizer), bool(prompt.fixed_examples or prompt.examples_for)
        opening = _encode(tokenizer, prompt.opening if has_examples else prompt.prefix)
        # A rendered chat template may begin with the leading tokens already.
        self.prefix = opening if opening[: len(leading)] == leading else leading + opening
        self._after_examples = _encode(tokenizer, prompt.prefix) if has_examples else []
        prefix_length = len(self.prefix) + len(self._after_examples)
        if prompt.fixed_examples:
            self.prefix += self._literal_ids(prompt.fixed_examples) + self._after_examples
        self.suffix = _encode(tokenizer, prompt.suffix)
        marks = prompt.thought
        self.thought_end = [] if marks is None else _encode(tokenizer, marks.after)
        self.no_thought = self.suffix if marks is None else _encode(tokenizer, marks.empty)
        self.answers = [tuple(_encode(tokenizer, answer)) for answer in labels.answers]
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                [
                    Problem(
                        "model.tokenizer",
                        "has no end-of-sequence token, so the model could not learn to end its answer",
                    )
                ]
            )
        self.end: int = tokenizer.eos_token_id
        longest = max(map(len, self.answers)) + 1
        # With an empty thought, so that a text has the same room whether the model thinks or not.
        suffix_length = max(len(self.suffix), len(self.no_thought))
        self.room = max_length - prefix_length - suffix_length - longest
        if self.room < 1:
            lengths = (max_length, prefix_length, suffix_length, longest)
            raise ConfigError([Problem("data.max_length", self._no_room(prompt, *lengths))])
        if len(set(self.answers)) < len(self.answers) or not all(self.answers):
            key, listed = "data.answers" if labels.yes_no else "data.labels", ", ".join(map(repr, labels.answers))
            raise ConfigError([Problem(key, f"not all of {listed} have different tokens in this tokenizer")])

    def stored(self) -> dict[str, Any]:
        """What `restored` needs besides the tokenizer and the labels, as plain values for a file."""
        names = ("prefix", "suffix", "answers", "end", "room")
        target = {"middle": self.prompt.middle, "target_first": self.prompt.target_first}
        return {**{name: getattr(self, name) for name in names}, **target}

    @classmethod
    def restored(cls, file: Path, labels: LabelSpace, values: Mapping[str, Any]) -> Renderer:
        """The renderer of an export, without transformers; it renders prompts, not rows for training.

        Args:
            file: the ``tokenizer.json`` that was saved by the tokenizer of the original.
            labels: those of the original.
            values: its `stored`.
        """
        self = cls.__new__(cls)
        self.tokenizer, self.labels = None, labels
        self.prompt = Prompt("", "", values["middle"], values["target_first"])
        self._literal, self._tokenizer_hash = _literal_of(file.read_text(encoding="utf-8"))
        self.prefix, self.suffix, self.end, self.room = (values[name] for name in ("prefix", "suffix", "end", "room"))
        self.answers = [tuple(answer) for answer in values["answers"]]
        self._after_examples, self.thought_end, self.no_thought = [], [], self.suffix
        return self

    def _no_room(self, prompt: Prompt, max_length: int, prefix: int, suffix: int, longest: int) -> str:
        needed = prefix + suffix + longest
        listed = " / ".join(self.labels.words)
        tokens = len(_encode(self.tokenizer, listed)) if listed in prompt.prefix + prompt.suffix else 0
        spare = f", or a data.prompt without {{labels}}, which take {tokens} of them" if 2 * tokens > needed else ""
        return (
            f"{max_length} leaves no room for text: the prompt takes {prefix} + {suffix} tokens, "
            f"the longest answer with its end token {longest}. Set data.max_length={needed + 64} or more{spare}"
        )

    def _literal_ids(self, text: str) -> list[int]:
        return list(self._literal.encode(text, add_special_tokens=False).ids)

    @property
    def literal(self) -> Tokenizer:
        """A copy of the tokenizer for texts, which never parses special tokens in them."""
        return Tokenizer.from_str(self._literal.to_str())

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts into prompts, truncating each text to the room for it."""
        return self.wrap(**self.encode_texts(texts))

    def wrap(self, tokens: IntArray, ends: IntArray, cut: IntArray) -> Encoded:
        """Add prefix and suffix to encoded texts; the arrays are those of `encode_texts`."""
        return Encoded(self.prefix, self.suffix, tokens, ends, cut)

    def examples_of(self, text: str) -> list[int]:
        """The examples that only this text has, and the prompt after them; empty if all texts have the same ones."""
        if self.prompt.examples_for is None:
            return []
        return [*self._literal_ids(self.prompt.examples_for(text)), *self._after_examples]

    def encode_texts(self, texts: Sequence[str], moved: Moved = ignored) -> dict[str, IntArray]:
        """Encode texts without prefix and suffix, with their targets if the prompt has one; truncate the texts.

        Args:
            texts: n texts; for a prompt with a target, from `finsa.data.prompts.with_target`.
            moved: receives the number of texts encoded since its last call.

        Returns:
            ``tokens`` (t,), ``ends`` (n,) and ``cut`` (n,) of `Encoded`.
        """
        lengths, kept = np.zeros(len(texts), np.int64), [np.zeros(0, np.int32)]
        for start in range(0, len(texts), CHUNK):
            chunk = [self.prompt.parts(text) for text in texts[start : start + CHUNK]]
            whole = ["".join(parts) for parts in chunk]
            for number, text in enumerate(self._literal.encode_batch_fast(whole, add_special_tokens=False), start):
                ids, after = text.ids, chunk[number - start][2]
                lengths[number] = len(ids)
                if after and len(ids) > self.room:  # a target after the text is kept
                    tail = self._literal_ids(after)[: self.room]
                    ids = [*ids[: self.room - len(tail)], *tail]
                ids = ids[: self.room]
                if self.prompt.examples_for is not None:
                    ids = [*self.examples_of(texts[number]), *ids]
                kept.append(np.asarray(ids, np.int32))
            moved(len(chunk))
        cut = np.maximum(lengths - self.room, 0)
        ends = np.array([len(ids) for ids in kept[1:]], np.int64).cumsum()
        return {"tokens": np.concatenate(kept), "ends": ends, "cut": cut}

    def crowded(self, texts: Sequence[str], fixed: Sequence[int]) -> dict[int, int]:
        """Find texts that are truncated and whose fixed part leaves fewer than ``LEAST`` tokens for the rest.

        Args:
            texts: n texts, as for `encode_texts`.
            fixed: number of their leading characters that must not be truncated, with the target, (n,).

        Returns:
            Tokens of the fixed part, by the text's number.
        """
        parts, texts = [], list(texts)
        for number, (given, count) in enumerate(zip(texts, fixed, strict=True)):
            before, text, after = self.prompt.parts(given)
            parts.append(before + text[: count - (len(given) - len(text))] + after if count else "")
            texts[number] = before + text + after
        distinct = sorted({part for part in parts if part})
        tokens = {"": 0} | dict(zip(distinct, self._lengths(distinct).tolist(), strict=True))
        close = [number for number, part in enumerate(parts) if tokens[part] > self.room - LEAST and part]
        whole = self._lengths([texts[number] for number in close])
        return {
            number: tokens[parts[number]] for number, length in zip(close, whole, strict=True) if length > self.room
        }

    def _lengths(self, texts: Sequence[str]) -> IntArray:
        """Tokens per text, (n,)."""
        encoded = self._literal.encode_batch_fast(list(texts), add_special_tokens=False)
        return np.array([len(one.ids) for one in encoded], np.int64)

    def fingerprint(self) -> str:
        """Hash of what determines the tokens of a text: the tokenizer, the room, and the prompt around a target."""
        between = "" if self.prompt.middle is None else f"-{self.prompt.target_first}-{self.prompt.middle}"
        return f"{self._tokenizer_hash}-{self.room}{between}"

    def thought_ids(self, text: str, most: int) -> list[int]:
        """Encode a thought, of at most this number of tokens."""
        return self._literal_ids(text)[:most]

    def with_thought(self, prompt: Sequence[int], thought: Sequence[int]) -> list[int]:
        """Append a thought and what closes it to a prompt, which then ends where the answer starts."""
        if not thought:
            return [*prompt[: len(prompt) - len(self.suffix)], *self.no_thought]
        return [*prompt, *thought, *self.thought_end]

    def row(
        self,
        prompt: Sequence[int],
        label: int,
        loss_on: Literal["all", "response", "label"],
        thought: Sequence[int] | None = None,
    ) -> Row:
        """Append the answer and its end token to a prompt, and set the loss mask.

        Args:
            prompt: from `encode`.
            label: class number.
            loss_on: ``all``: every token but the first, which nothing predicts; ``response``: thought, answer and end
                token; ``label``: none, and no answer is appended, because the loss is over the classes.
            thought: tokens of the thought before the answer. An empty one is part of the prompt, without a loss.
        """
        if loss_on == "label":
            return Row(input_ids=list(prompt), labels=[IGNORE] * len(prompt), target=label)
        prompt = self.with_thought(prompt, ()) if thought is not None and not thought else prompt
        answer = [*thought, *self.thought_end] if thought else []
        answer += [*self.answers[label], self.end]
        context = [IGNORE, *prompt[1:]] if loss_on == "all" else [IGNORE] * len(prompt)
        return Row(input_ids=[*prompt, *answer], labels=[*context, *answer])

    def text_row(self, prompt: Sequence[int], label: int) -> Row:
        """A row for a head over the text tokens: the prompt up to their end, since a causal model reads no further."""
        ids = self.until_text_end(prompt)
        return Row(input_ids=ids, labels=[IGNORE] * len(ids), target=label, text_span=self.text_span(prompt))

    def text_span(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Start and end of the text tokens in a prompt."""
        return len(self.prefix), len(prompt) - len(self.suffix)

    def until_text_end(self, prompt: Sequence[int]) -> list[int]:
        """Prefix and text of a prompt, without its suffix."""
        return list(prompt[: len(prompt) - len(self.suffix)])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=4)
def _literal(tokenizer: Any, size: int) -> tuple[Tokenizer, str]:
    """The tokenizer for texts, which encodes special tokens such as "<|im_end|>" or "</think>" as ordinary characters.

    Args:
        tokenizer: of transformers; rebuilding a large one takes a second, so the result is cached.
        size: of its vocabulary, which changes when tokens are added.

    Returns:
        The tokenizer, and a hash of all its settings.
    """
    return _literal_of(tokenizer.backend_tokenizer.to_str())


def _literal_of(text: str) -> tuple[Tokenizer, str]:
    """`_literal` of the text of a ``tokenizer.json``."""
    settings = json.loads(text)
    for token in settings["added_tokens"]:
        token["special"] = True  # otherwise added tokens would still be matched in texts
    written = json.dumps(settings)
    literal = Tokenizer.from_str(written)
    literal.encode_special_tokens = True
    literal.no_truncation()
    literal.no_padding()
    return literal, sha256(written.encode()).hexdigest()


def _leading(tokenizer: Any) -> list[int]:
    """Tokens that a tokenizer adds before every text (<s>, [gMASK]<sop>), without those that it adds after it."""
    probe = _encode(tokenizer, "a")
    whole = list(tokenizer("a")["input_ids"])
    return whole[: whole.index(probe[0])] if probe and probe[0] in whole else []
