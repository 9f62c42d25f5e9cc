"""Examples of rows as the model sees them: the tokens and the loss mask of training, split into readable parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Literal

from rich.table import Table as RichTable
from rich.text import Text

from finsa.config import RunConfig
from finsa.data.rows import IGNORE, Row
from finsa.data.tokenized import TokenizedDataset, TrainingRows
from finsa.data.values import TASKS, VALUES
from finsa.evaluation import tables
from finsa.evaluation.tables import visible

Part = Literal["prompt", "text", "truncated", "answer", "end"]
STYLES = {"prompt": "dim", "text": "cyan", "truncated": "red strike", "answer": "bold green", "end": "magenta"}
TRUNCATED_SHOWN = 60  # characters of truncated text that the terminal shows


@dataclass(frozen=True)
class Piece:
    """A token, or several tokens that together form one character.

    Args:
        text: decoded tokens.
        ids: token ids.
        loss: whether the tokens are in the loss.
    """

    text: str
    ids: tuple[int, ...]
    loss: bool


@dataclass(frozen=True)
class Segment:
    """A part of a row.

    Args:
        part: prompt, text, answer, end, or truncated (text that was removed and that the model does not see).
        pieces: its tokens; truncated text is one piece without ids.
        tokens: number of tokens; for truncated text, the number removed.
    """

    part: Part
    pieces: tuple[Piece, ...]
    tokens: int

    @property
    def text(self) -> str:
        """The text of the part."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def loss_tokens(self) -> int:
        """Number of tokens in the loss."""
        return sum(len(piece.ids) for piece in self.pieces if piece.loss)


@dataclass(frozen=True)
class Example:
    """A row, split into its parts.

    Args:
        split, id, label: of the row.
        segments: in token order; truncated text is at the position from which it was removed.
        seen: whether the model sees the answer, as in training.
    """

    split: str
    id: str
    label: str
    segments: tuple[Segment, ...]
    seen: bool

    @property
    def tokens(self) -> int:
        """Number of tokens of the row, without truncated text."""
        return sum(segment.tokens for segment in self.segments if segment.part != "truncated")

    @property
    def loss_tokens(self) -> int:
        """Number of tokens in the loss."""
        return sum(segment.loss_tokens for segment in self.segments)


def examples(data: TokenizedDataset, cfg: RunConfig, count: int) -> list[Example]:
    """Choose a few rows of every split and divide them into parts.

    Args:
        data: the rows and their tokens.
        cfg: determines which training rows are used, and which tokens are in the loss.
        count: rows per split: one of each class in turn, including a truncated row if there is one.
    """
    chosen = []
    if data.task == "multi_label":  # whatever the default method of the command, only questions about labels suit it
        cfg = cfg.model_copy(update={"method": cfg.method.model_copy(update={"loss_on": "label"})})
    for split, table in data.dataset.splits.items():
        if not table.height:
            continue
        rows, texts = _rows(data, cfg, split), data.texts(split)
        trained = split == "train" and cfg.method.learn != "nothing"
        for at in _chosen(rows, count):
            row = table.row(rows.order[at], named=True)
            given = texts[rows.order[at]]
            chosen.append(
                Example(
                    split=split,
                    id=row["id"],
                    label=_label(data, row),
                    segments=tuple(_segments(data, rows, at, given, trained)),
                    seen=trained,
                )
            )
    return chosen


def _label(data: TokenizedDataset, row: dict[str, Any]) -> str:
    """The class of a row; its number; or its labels."""
    names = data.dataset.labels.names
    if data.task == "regression":
        return f"{row[VALUES][0]:g}"
    if data.task == "multi_label":
        return "; ".join(name for name, has in zip(names, row[VALUES], strict=True) if has) or "no label"
    return names[row["label"]]


def _rows(data: TokenizedDataset, cfg: RunConfig, split: str) -> TrainingRows:
    """The rows that training would use; for a held-out split, all rows in order."""
    if split == "train":
        return data.training_rows(cfg)
    gold = data.gold(split)
    truth, order = data.truth(split) if data.task in TASKS else None, list(range(len(gold)))
    return TrainingRows(data.renderer, data.prompts(split), gold, order, cfg.method, None, truth=truth)


def _chosen(rows: TrainingRows, count: int) -> list[int]:
    """Positions of the chosen rows: every class once before any twice, and a truncated row."""
    seen: dict[int, list[int]] = {}
    for at, row in enumerate(rows.order):
        of_class = seen.setdefault(rows.gold[row], [])
        if len(of_class) < count:
            of_class.append(at)
    turns = chain.from_iterable(zip_longest(*(seen[label] for label in sorted(seen))))
    chosen = [at for at in turns if at is not None][:count]
    cut = next((at for at, row in enumerate(rows.order) if rows.prompts.cut[row]), None)
    if cut is not None and not any(rows.prompts.cut[rows.order[at]] for at in chosen):
        of_cut = rows.gold[rows.order[cut]]
        chosen[next((n for n, at in enumerate(chosen) if rows.gold[rows.order[at]] == of_cut), -1)] = cut
    return chosen


def _segments(data: TokenizedDataset, rows: TrainingRows, at: int, given: str, trained: bool) -> Iterator[Segment]:
    renderer, row, number = data.renderer, _whole(data, rows, at), rows.order[at]
    text, text_start = "".join(renderer.prompt.parts(given)), len(renderer.prefix) + len(renderer.examples_of(given))
    length = len(row["input_ids"])
    prompt = min(len(rows.prompts[number]), length)
    answer = length - 1 if row["input_ids"][-1] == renderer.end and length > prompt else length
    text_end = len(rows.prompts[number]) - len(renderer.suffix)
    ends = (text_start, text_end, prompt, answer, length)
    parts: Sequence[Part] = ("prompt", "text", "prompt", "answer", "end")
    start = 0
    for part, end in zip(parts, ends, strict=True):
        if start < end or part == "text":
            yield Segment(part, tuple(_pieces(renderer.tokenizer, row, range(start, end), trained)), end - start)
        cut = int(rows.prompts.cut[number])
        if part == "text" and cut:
            kept = tuple(_pieces(renderer.tokenizer, row, range(start, end), trained))
            yield Segment("truncated", (Piece(_rest(text, kept), (), False),), cut)
        start = end


def _whole(data: TokenizedDataset, rows: TrainingRows, at: int) -> Row:
    """A row with its answer: rows for an objective over all labels lack it, so the true label's is appended.

    A classification head reads neither an answer nor anything after the text.
    """
    row = rows[at]
    if "target" not in row or "text_span" in row:
        return row
    at_answer = row["target"]
    if data.renderer.labels.yes_no:  # of the questions, that about the rarest label of the row is shown
        at_answer = 2 * at_answer + (0 if row["values"][at_answer] else 1)
    answer = list(data.renderer.answers[at_answer])
    return Row(input_ids=[*row["input_ids"], *answer], labels=[*row["labels"], *answer])


def _pieces(tokenizer: Any, row: Row, positions: range, trained: bool) -> Iterator[Piece]:
    """Decode tokens one by one; a token that ends inside a character is decoded with the next."""
    ids: list[int] = []
    for at in positions:
        ids.append(row["input_ids"][at])
        loss = trained and row["labels"][at] != IGNORE
        following = at + 1 in positions and loss == (trained and row["labels"][at + 1] != IGNORE)
        text = decode(tokenizer, ids)
        if text.endswith("\ufffd") and following:
            continue
        yield Piece(text, tuple(ids), loss)
        ids = []


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode tokens, including special tokens and spaces."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _rest(text: str, pieces: Sequence[Piece]) -> str:
    """The text after the kept tokens; empty if the tokenizer normalizes text."""
    kept = "".join(piece.text for piece in pieces).rstrip("\ufffd")
    return text[len(kept) :] if text.startswith(kept) else ""


def show(rows: Sequence[Example]) -> None:
    """Print examples part by part: number of tokens, number of tokens in the loss, and text."""
    out = tables.console()
    legend = Text("examples as the model sees them: ", style="bold")
    for part, style in STYLES.items():
        legend.append(part, style=style).append(", ")
    legend.append("with loss", style="underline").append(" (* in the column loss); ↵ is a line break")
    out.print(legend)
    for example in rows:
        title = (
            f"{example.split}: {example.id}, {example.label}: {example.tokens} tokens, {example.loss_tokens} with loss"
        )
        if not example.seen:
            title += "; the answer is scored, not given" if example.split != "train" else "; not trained on"
        table = RichTable(title=Text(title), title_justify="left", title_style="bold", expand=True)
        table.add_column("part")
        table.add_column("tokens", justify="right")
        table.add_column("loss", justify="right")
        table.add_column("content", overflow="fold", ratio=1)
        for segment in example.segments:
            style, content = STYLES[segment.part], Text()
            if segment.part == "truncated":
                more = "…" if len(segment.text) > TRUNCATED_SHOWN else ""
                content.append(visible(segment.text[:TRUNCATED_SHOWN]) + more, style=style)
            else:
                for piece in segment.pieces:
                    content.append(visible(piece.text), style=f"{style} underline" if piece.loss else style)
            carried = f"* {segment.loss_tokens}" if segment.loss_tokens else tables.MISSING
            table.add_row(Text(segment.part, style=style), str(segment.tokens), carried, content)
        out.print(table)
