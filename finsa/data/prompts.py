"""What stands before and after a text: one rendering for training, evaluation, prediction and serving."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finsa.data.labels import LabelSpace
from finsa.errors import ConfigError, Problem

# A stand-in for the text while a chat template is rendered; no template or tokenizer gives it a meaning.
_TEXT = "\u2063finsa-text\u2063"


@dataclass(frozen=True)
class Prompt:
    """What surrounds a text.

    Args:
        head: before it.
        tail: after it; ends exactly where the answer starts.
    """

    head: str
    tail: str

    @classmethod
    def of(cls, template: str, labels: LabelSpace, style: str, think: str, tokenizer: Any) -> Prompt:
        """Render a template.

        Args:
            template: with ``{text}`` once and optionally ``{labels}``.
            labels: whose words fill ``{labels}``, joined by `` / ``.
            style: ``plain``, or ``chat`` to wrap it into the tokenizer's chat template.
            think: ``closed`` puts a closed think block before the answer.
            tokenizer: asked for its chat template.

        Raises:
            ConfigError: where a chat template is asked for and there is none.
        """
        user = template.format(text=_TEXT, labels=" / ".join(labels.words))
        if style == "chat":
            user = _chat(user, think, tokenizer)
        head, tail = user.split(_TEXT)
        return cls(head, tail)


def _chat(user: str, think: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            [Problem("model.prompt", "this tokenizer has no chat template; set model.prompt=plain model.think=none")]
        )
    message = [{"role": "user", "content": user}]
    rendered: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    if think == "none":
        return rendered
    # Templates of reasoning models open the block themselves (R1, GLM-Z1) or leave it to the model (Qwen3).
    opened = rendered.rstrip().endswith("<think>")
    return rendered.rstrip("\n") + "\n\n</think>\n\n" if opened else rendered + "<think>\n\n</think>\n\n"


# Parts of what sentiments are called; a label that has none of them is no sentiment.
_SENTIMENTS = (
    *("posi", "nega", "neut", "bull", "bear", "利好", "利空", "利多", "利淡", "中性", "正面", "负面", "积极", "消极"),
    *("看多", "看空", "看涨", "看跌", "乐观", "悲观", "好评", "差评", "good", "bad", "涨", "跌", "opti", "pessi"),
)


def mismatch(prompt: str, labels: Sequence[str]) -> str | None:
    """What to set where a prompt asks for the sentiment and the labels, such as intents, are none.

    Args:
        prompt: the template.
        labels: names and words of the labels.

    Returns:
        A sentence; None where prompt and labels go together, or numbers and single letters leave it open.
    """
    asks = "情感" in prompt or "sentiment" in prompt.lower()
    words = [label.lower() for label in labels if len(label) > 1 and not re.fullmatch(r"[-+\d.]+", label)]
    sentiments = {"up", "down"} & set(words) or any(part in word for word in words for part in _SENTIMENTS)
    if not asks or not words or sentiments:
        return None
    return (
        "data.prompt asks for the sentiment, which the labels do not name; for other classes set for instance "
        "\"data.prompt='文本：{text} 从{labels}中选择类别：'\""
    )
