"""Rows as the model sees them: the tokens and the loss mask that training uses, taken apart for reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from finsa.config import RunConfig
from finsa.data.rows import IGNORE, Row
from finsa.data.tokenized import TokenizedDataset, TrainingRows

Part = Literal["prompt", "text", "cut", "answer", "end"]
# What would end a line, or command a terminal, is shown as a sign of its own.
SIGNS = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "␡", 0x0A: "↵\n", 0x0D: "␍", 0x09: "⇥"}


@dataclass(frozen=True)
class Piece:
    """Tokens that are written together, because only together they are whole characters.

    Args:
        text: what they stand for.
        ids: the tokens.
        loss: whether they are learnt.
    """

    text: str
    ids: tuple[int, ...]
    loss: bool


@dataclass(frozen=True)
class Segment:
    """A part of a row.

    Args:
        part: prompt, text, answer, end; or cut: text that did not fit and that the model does not see.
        pieces: its tokens; of cut text, one piece without ids.
        tokens: how many tokens it has, or, of cut text, would have had.
    """

    part: Part
    pieces: tuple[Piece, ...]
    tokens: int

    @property
    def text(self) -> str:
        """The whole part as text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def learnt(self) -> int:
        """Number of tokens that carry loss."""
        return sum(len(piece.ids) for piece in self.pieces if piece.loss)


@dataclass(frozen=True)
class Example:
    """A row, taken apart.

    Args:
        split, id, label: of the row.
        segments: in the order of the tokens; the cut text stands where it was cut.
        seen: whether the model is given the answer (in training), or has to find it.
    """

    split: str
    id: str
    label: str
    segments: tuple[Segment, ...]
    seen: bool

    @property
    def tokens(self) -> int:
        """Tokens of the row, without what was cut."""
        return sum(segment.tokens for segment in self.segments if segment.part != "cut")

    @property
    def learnt(self) -> int:
        """Number of tokens that carry loss."""
        return sum(segment.learnt for segment in self.segments)


def visible(text: str) -> str:
    """Write control characters as signs; a line's end stays one, with a sign before it."""
    return text.translate(SIGNS)


def examples(job: TokenizedDataset, cfg: RunConfig, count: int) -> list[Example]:
    """Take apart a few rows of every split.

    Args:
        job: the task; its own renderer and training rows are asked, nothing is rendered a second time.
        cfg: says which training rows are used, and which tokens carry loss.
        count: per split. One row of each class in turn; among them one whose text was cut, if there is one.
    """
    found = []
    for split, table in job.dataset.splits.items():
        if not table.height:
            continue
        rows = _rows(job, cfg, split)
        learnt = split == "train" and cfg.method.learn != "nothing"
        for at in _chosen(rows, count):
            row = table.row(rows.order[at], named=True)
            found.append(
                Example(
                    split=split,
                    id=row["id"],
                    label=job.dataset.labels.names[row["label"]],
                    segments=tuple(_segments(job, rows, at, row["text"], learnt)),
                    seen=learnt,
                )
            )
    return found


def _rows(job: TokenizedDataset, cfg: RunConfig, split: str) -> TrainingRows:
    """The rows that training would read; of a held-out split, the same with every row in its place."""
    if split == "train":
        return job.training_rows(cfg)
    gold = job.gold(split)
    return TrainingRows(job.renderer, job.prompts(split), gold, list(range(len(gold))), cfg.method, None)


def _chosen(rows: TrainingRows, count: int) -> list[int]:
    """Numbers of rows that show the most: every class once before any twice, and a cut text."""
    seen: dict[int, list[int]] = {}
    for at, row in enumerate(rows.order):
        of_class = seen.setdefault(rows.gold[row], [])
        if len(of_class) < count:
            of_class.append(at)
    turns = chain.from_iterable(zip(*(_filled(seen[label], count) for label in sorted(seen)), strict=True))
    chosen = [at for at in turns if at is not None][:count]
    cut = next((at for at, row in enumerate(rows.order) if rows.prompts.cut[row]), None)
    if cut is not None and not any(rows.prompts.cut[rows.order[at]] for at in chosen):
        of_cut = rows.gold[rows.order[cut]]
        chosen[next((n for n, at in enumerate(chosen) if rows.gold[rows.order[at]] == of_cut), -1)] = cut
    return chosen


def _filled(numbers: list[int], count: int) -> list[int | None]:
    return [*numbers, *[None] * (count - len(numbers))]


def _segments(job: TokenizedDataset, rows: TrainingRows, at: int, text: str, learnt: bool) -> Iterator[Segment]:
    renderer, row, number = job.renderer, _whole(job, rows, at), rows.order[at]
    length = len(row["input_ids"])
    prompt = min(len(rows.prompts[number]), length)
    answer = length - 1 if row["input_ids"][-1] == renderer.end and length > prompt else length
    text_end = len(rows.prompts[number]) - len(renderer.suffix)
    ends = (len(renderer.prefix), text_end, prompt, answer, length)
    parts: Sequence[Part] = ("prompt", "text", "prompt", "answer", "end")
    start = 0
    for part, end in zip(parts, ends, strict=True):
        if start < end or part == "text":
            yield Segment(part, tuple(_pieces(renderer.tokenizer, row, range(start, end), learnt)), end - start)
        cut = int(rows.prompts.cut[number])
        if part == "text" and cut:
            kept = tuple(_pieces(renderer.tokenizer, row, range(start, end), learnt))
            yield Segment("cut", (Piece(_rest(text, kept), (), False),), cut)
        start = end


def _whole(job: TokenizedDataset, rows: TrainingRows, at: int) -> Row:
    """A row with its answer: where it is one choice among the labels, that of its own label, which the loss raises.

    A classification head reads no answer, and nothing behind the text.
    """
    row = rows[at]
    if "target" not in row or "text_span" in row:
        return row
    answer = list(job.renderer.answers[row["target"]])
    return Row(input_ids=[*row["input_ids"], *answer], labels=[*row["labels"], *answer])


def _pieces(tokenizer: Any, row: Row, positions: range, learnt: bool) -> Iterator[Piece]:
    """Decode tokens as they come; a token that ends within a character waits for the next."""
    ids: list[int] = []
    for at in positions:
        ids.append(row["input_ids"][at])
        loss = learnt and row["labels"][at] != IGNORE
        following = at + 1 in positions and loss == (learnt and row["labels"][at + 1] != IGNORE)
        text = decode(tokenizer, ids)
        if text.endswith("\ufffd") and following:
            continue
        yield Piece(text, tuple(ids), loss)
        ids = []


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that tokens stand for, special ones and spaces included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _rest(text: str, pieces: Sequence[Piece]) -> str:
    """What follows the kept tokens in the text; nothing where a tokenizer writes text in another way."""
    kept = "".join(piece.text for piece in pieces).rstrip("\ufffd")
    return text[len(kept) :] if text.startswith(kept) else ""
