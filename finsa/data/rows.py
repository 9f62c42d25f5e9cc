"""Tokens and loss mask, written together.

A row is prefix + text + suffix + answer + end token. Only the text is ever truncated, and the room for it does not
depend on the row's label, so a text has the same prompt tokens in training, evaluation, prediction and serving. The
parts are encoded separately, so that an answer's tokens are the ones that are scored, whatever precedes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
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
LEAST = 8  # tokens that the part of a text that may be truncated keeps at least
IntArray = NDArray[Any]


class Row(TypedDict):
    """One training example.

    Args:
        input_ids: token ids, (s,).
        labels: per position, the id that is learnt there (-100: none), (s,).
        weight: how much the row counts; absent: 1.
        target: its class, where the row is one choice among the classes.
        text_span: first position of the text and the one after its last, where a head or router reads the text tokens.
        domain: number of the expert whose domain it is; -1: none's.
    """

    input_ids: list[int]
    labels: list[int]
    weight: NotRequired[float]
    target: NotRequired[int]
    text_span: NotRequired[tuple[int, int]]
    domain: NotRequired[int]


@dataclass(frozen=True, eq=False)
class Encoded(Sequence[list[int]]):
    """Prompts of texts, as tokens: a sequence of id lists, kept in flat arrays so that millions of them fit.

    Args:
        prefix, suffix: tokens before and after every text.
        tokens: ids of all texts, one after another, (t,).
        ends: where each text ends in `tokens`, (n,).
        cut: number of text tokens that did not fit, per text, (n,).
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
                raise ValueError(f"prompts can be taken in runs only, not in steps of {step}")
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
        """How many texts were cut."""
        return int((self.cut > 0).sum())


class Renderer:
    """Turns texts into prompt tokens, and prompts with labels into rows.

    Args:
        tokenizer: a fast tokenizer of transformers.
        prompt: what surrounds a text.
        labels: classes and their words.
        max_length: most tokens of a whole row.

    Raises:
        ConfigError: where prompt and answer leave no room for text, words are encoded alike, or there is no end token.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt, labels: LabelSpace, max_length: int) -> None:
        self.tokenizer, self.labels = tokenizer, labels
        self._literal, self._tokenizer_hash = _literal(tokenizer, len(tokenizer))
        self.prefix = _leading(tokenizer) * (not _starts_special(tokenizer, prompt.prefix)) + _encode(
            tokenizer, prompt.prefix
        )
        self.suffix = _encode(tokenizer, prompt.suffix)
        self.answers = [tuple(_encode(tokenizer, word)) for word in labels.words]
        if tokenizer.eos_token_id is None:
            raise ConfigError([Problem("model.tokenizer", "has no end token, so no answer could be learnt to end")])
        self.end: int = tokenizer.eos_token_id
        longest = max(map(len, self.answers)) + 1
        self.room = max_length - len(self.prefix) - len(self.suffix) - longest
        if self.room < 1:
            raise ConfigError([Problem("data.max_length", self._no_room(prompt, max_length, longest))])
        if len(set(self.answers)) < len(self.answers) or not all(self.answers):
            raise ConfigError([Problem("data.labels", f"{labels.words} are not distinct in this tokenizer")])

    def _no_room(self, prompt: Prompt, max_length: int, longest: int) -> str:
        needed = len(self.prefix) + len(self.suffix) + longest
        listed = " / ".join(self.labels.words)
        tokens = len(_encode(self.tokenizer, listed)) if listed in prompt.prefix + prompt.suffix else 0
        spare = f", or a data.prompt without {{labels}}, which take {tokens} of them" if 2 * tokens > needed else ""
        return (
            f"{max_length} leaves no room for text: the prompt takes {len(self.prefix)} + {len(self.suffix)} tokens, "
            f"the longest answer with its end token {longest}. Set data.max_length={needed + 64} or more{spare}"
        )

    @property
    def literal(self) -> Tokenizer:
        """A copy of the tokenizer for texts, which takes none of them for markup."""
        return Tokenizer.from_str(self._literal.to_str())

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts into prompts, cutting each text to the room there is."""
        return self.wrap(**self.encode_texts(texts))

    def wrap(self, tokens: IntArray, ends: IntArray, cut: IntArray) -> Encoded:
        """Put prefix and suffix around encoded texts; the arrays are those of `encode_texts`."""
        return Encoded(self.prefix, self.suffix, tokens, ends, cut)

    def encode_texts(self, texts: Sequence[str], moved: Moved = ignored) -> dict[str, IntArray]:
        """Encode and truncate texts, without prefix and suffix.

        Args:
            texts: n texts.
            moved: is told how many more are encoded.

        Returns:
            ``tokens`` (t,), ``ends`` (n,) and ``cut`` (n,), as `Encoded` has them.
        """
        lengths, kept = np.zeros(len(texts), np.int64), [np.zeros(0, np.int32)]
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            for number, text in enumerate(self._literal.encode_batch_fast(chunk, add_special_tokens=False), start):
                ids = text.ids
                lengths[number] = len(ids)
                kept.append(np.asarray(ids[: self.room], np.int32))
            moved(len(chunk))
        fitting = np.minimum(lengths, self.room)
        return {"tokens": np.concatenate(kept), "ends": np.cumsum(fitting), "cut": lengths - fitting}

    def crowded(self, texts: Sequence[str], fixed: Sequence[int]) -> dict[int, int]:
        """Find texts that do not fit, and whose fixed part leaves less than ``LEAST`` tokens for the rest.

        Args:
            texts: n texts.
            fixed: number of their leading characters that must not be truncated, (n,).

        Returns:
            Tokens of the fixed part, by the text's number.
        """
        parts = [text[:count] for text, count in zip(texts, fixed, strict=True)]
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
        """Hash of what decides a text's tokens: the tokenizer and the room for a text."""
        return f"{self._tokenizer_hash}-{self.room}"

    def row(self, prompt: Sequence[int], label: int, loss_on: Literal["all", "response", "label"]) -> Row:
        """Append the answer and its end token to a prompt, and mark what is learnt.

        Args:
            prompt: from `encode`.
            label: class number.
            loss_on: ``all`` marks every token but the first (nothing predicts it), ``response`` answer and end token.
                ``label`` marks none and appends nothing: the row is one choice among the classes.
        """
        if loss_on == "label":
            return Row(input_ids=list(prompt), labels=[IGNORE] * len(prompt), target=label)
        answer = [*self.answers[label], self.end]
        context = [IGNORE, *prompt[1:]] if loss_on == "all" else [IGNORE] * len(prompt)
        return Row(input_ids=[*prompt, *answer], labels=[*context, *answer])

    def text_row(self, prompt: Sequence[int], label: int) -> Row:
        """The part of a prompt that a head over the text tokens reads: what follows the text cannot reach them."""
        ids = self.until_text_end(prompt)
        return Row(input_ids=ids, labels=[IGNORE] * len(ids), target=label, text_span=self.text_span(prompt))

    def text_span(self, prompt: Sequence[int]) -> tuple[int, int]:
        """First position of a prompt's text and the one after its last."""
        return len(self.prefix), len(prompt) - len(self.suffix)

    def until_text_end(self, prompt: Sequence[int]) -> list[int]:
        """Prefix and text of a prompt, without its suffix."""
        return list(prompt[: len(prompt) - len(self.suffix)])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=4)
def _literal(tokenizer: Any, size: int) -> tuple[Tokenizer, str]:
    """The tokenizer for texts, which are never markup: "<|im_end|>" or "</think>" in one is encoded as characters.

    Args:
        tokenizer: of transformers; rebuilding a large one takes a second, so the result is kept.
        size: its vocabulary's, which tells whether tokens were added since.

    Returns:
        The tokenizer, and a hash of all its settings.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = True  # tokens added as ordinary ones would be matched in texts all the same
    written = json.dumps(settings)
    literal = Tokenizer.from_str(written)
    literal.encode_special_tokens = True
    literal.no_truncation()
    literal.no_padding()
    return literal, sha256(written.encode()).hexdigest()


def _leading(tokenizer: Any) -> list[int]:
    """Tokens that this tokenizer puts before every text (<s>, [gMASK]<sop>); what it puts behind is not wanted."""
    probe = _encode(tokenizer, "a")
    whole = list(tokenizer("a")["input_ids"])
    return whole[: whole.index(probe[0])] if probe and probe[0] in whole else []


def _starts_special(tokenizer: Any, prefix: str) -> bool:
    """Whether a rendered chat template already begins with the leading tokens."""
    leading = _leading(tokenizer)
    return bool(leading) and _encode(tokenizer, prefix)[: len(leading)] == leading
