"""Instruction rows and chats as one text with its answer: the same rendering in training, prediction and serving.

A single user turn is the text itself. Where there is more, a system turn, earlier turns, the result of a tool, the text
is the whole conversation, a line ``role: content`` per turn. Only the last turn (of an instruction row: its input) may
be truncated; what precedes it is the row's fixed part.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from finsa.config import Data
from finsa.data.cleaning import normalize
from finsa.data.readers import as_text

CHATS = ("messages", "conversations")
INSTRUCTION = ("instruction", "output")
USED = {"alpaca": ("instruction", "input", "output", "system", "history"), "messages": ("system",)}
MEDIA = ("images", "videos", "audios", "image", "video", "audio")
ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function"), "tool"),
    "developer": "system",
}
NOT_TEXT = "unreadable: the text is a list or object"

Turn = tuple[str, str]  # role, content


@dataclass(frozen=True)
class Rendered:
    """The text of a row and its answer.

    Args:
        text: the conversation up to the answer.
        fixed: number of its leading characters that are never truncated.
        answer: the label; None if there is none.
        fault: why the row cannot be used.
        unused: parts of the row that are not in the text, such as ``earlier turns``.
    """

    text: str | None = None
    fixed: int = 0
    answer: str | None = None
    fault: str | None = None
    unused: tuple[str, ...] = ()


class _RowError(Exception):
    """Why a row cannot be used."""


def form_of(columns: Collection[str]) -> str | None:
    """The source that reads rows with these fields: ``messages``, ``alpaca``, or None for an ordinary table."""
    if any(name in columns for name in CHATS):
        return "messages"
    return "alpaca" if set(INSTRUCTION) <= set(columns) else None


def instruction_fields(data: Data) -> tuple[str, ...]:
    """The fields that every instruction row has; in pairs, the preferred answer takes the place of ``output``."""
    return INSTRUCTION if data.columns.rejected is None else ("instruction", data.columns.label)


def answer_of(value: Any) -> str | None:
    """The text of an answer, which is a text or, in pairs of chats, a turn."""
    turn = _parsed(value)
    if not isinstance(turn, dict):
        return None if isinstance(turn, list) else as_text(value)
    content = turn.get("content", turn.get("value"))
    return content if isinstance(content, str) else None


def chat_column(data: Data, columns: Collection[str]) -> str | None:
    """The column with the turns: the one that ``data.columns.text`` names, ``messages`` or ``conversations``."""
    named = data.columns.text if data.columns.text != "text" else None
    return next((name for name in (named, *CHATS) if name is not None and name in columns), None)


def fields_of(data: Data, columns: Collection[str]) -> list[str]:
    """The columns that `render` reads."""
    wanted = {*USED[data.source], *MEDIA, "tools", data.columns.label, chat_column(data, columns)}
    return [name for name in columns if name in wanted]


def render(row: Mapping[str, Any], data: Data) -> Rendered:
    """Write an instruction row or a chat as one text with its answer.

    Args:
        row: by column; lists and objects unchanged, or as JSON text.
        data: its ``source`` is ``alpaca`` or ``messages``; ``turns`` says how much of a conversation is read.
    """
    try:
        if any(_filled(row.get(name)) for name in MEDIA):
            raise _RowError("unreadable: images, video or audio belong to the row")
        system = row.get("system")
        if isinstance(system, list | dict):
            raise _RowError("unreadable: system is a list or object")
        turns = [("system", str(system))] if _filled(system) else []
        return _instruction(row, turns, data) if data.source == "alpaca" else _chat(row, turns, data)
    except _RowError as fault:
        return Rendered(fault=str(fault))


def _instruction(row: Mapping[str, Any], turns: list[Turn], data: Data) -> Rendered:
    if any(isinstance(row.get(name), list | dict) for name in ("instruction", "input", "output")):
        raise _RowError(NOT_TEXT)
    instruction, given = (as_text(row.get(name)) or "" for name in ("instruction", "input"))
    given = normalize(given)
    pairs = _parsed(row.get("history")) if _filled(row.get("history")) else []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise _RowError("unreadable: history is not a list of [question, answer]")
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    turns.append(("user", f"{instruction}\n{given}" if given else instruction))
    answer = as_text(row.get(instruction_fields(data)[1]))
    return _joined(turns, given or instruction, answer, data, [])


def _chat(row: Mapping[str, Any], turns: list[Turn], data: Data) -> Rendered:
    column = chat_column(data, row)
    chat = _parsed(row.get(column)) if column else None
    if not isinstance(chat, list) or not chat or not all(isinstance(turn, dict) for turn in chat):
        raise _RowError("unreadable: not a list of turns")
    spoken = [_turn(turn) for turn in chat]
    label, unused = row.get(data.columns.label), list[str]()
    if spoken[-1][0] == "assistant":
        answer: str | None = spoken.pop()[1]
        unused += [f"the field '{data.columns.label}' (the last turn is the label)"] * _filled(label)
    else:
        answer = answer_of(label) if _filled(label) else None
    if "user" not in [role for role, _ in spoken]:
        raise _RowError("unreadable: no user turn")
    unused += ["the field 'tools'"] * _filled(row.get("tools"))
    return _joined([*turns, *spoken], spoken[-1][1], answer, data, unused)


def _turn(turn: Mapping[str, Any]) -> Turn:
    """Role and content of a turn in OpenAI's form (role, content) or ShareGPT's (from, value)."""
    role = str(turn.get("role") or turn.get("from") or "")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        parts = list[str]()
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise _RowError(f"unreadable: a turn has a part of type '{kind}', which is not text")
            parts.append(text)
        content = "".join(parts)
    called = turn.get("tool_calls") or turn.get("function_call")
    if content is None and called:
        content = json.dumps(called, ensure_ascii=False)
    if not isinstance(content, str) or not role:
        raise _RowError(f"unreadable: a turn has no {'text' if role else 'role'}")
    return ROLES.get(role, role), content


def _joined(turns: list[Turn], last: str, answer: str | None, data: Data, unused: list[str]) -> Rendered:
    """Write the turns before the answer as one text.

    Args:
        turns: at least one; the last of them ends in `last`.
        last: the part that may be truncated.
        answer: the label.
        data: ``turns`` decides between all of them and the last user turn.
        unused: what has been omitted so far.
    """
    if data.turns == "last" and len(turns) > 1:
        at = max(number for number, (role, _) in enumerate(turns) if role == "user")
        left_out = [role for number, (role, _) in enumerate(turns) if number != at]
        kinds = (f"{role} turns" if role in ("system", "tool") else "earlier turns" for role in left_out)
        unused = [*unused, *dict.fromkeys(kinds)]
        last = last if at == len(turns) - 1 else turns[at][1]
        turns = [turns[at]]
    if len(turns) == 1:
        text = turns[0][1]
    else:
        kept = [turn for turn in turns[:-1] if normalize(turn[1])] + turns[-1:]
        text = "\n".join(f"{role}: {normalize(content)}" for role, content in kept)
    text, last = normalize(text), normalize(last)
    if not last:
        return Rendered("", 0, answer, None, tuple(unused))
    return Rendered(text, len(text) - len(last), answer, None, tuple(unused))


def _parsed(value: Any) -> Any:
    """Parse a list or object, which tables contain as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None


def _filled(value: Any) -> bool:
    """Whether a field is not empty; tables contain empty lists as text."""
    return value is not None and value not in ("", "[]", "null", [], {}) and str(value).strip() != ""
