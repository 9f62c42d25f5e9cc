"""Prefix and suffix of a text: the same rendering of the prompt in training, evaluation, prediction and serving."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from finsa.data.few_shot import BREAK, ExampleRows
from finsa.data.labels import LabelSpace
from finsa.errors import ConfigError, Problem

# Placeholders while a chat template is rendered; no template or tokenizer gives them a meaning.
_TEXT, _TARGET, _ANSWER, _EXAMPLES = (f"\u2063finsa-{name}\u2063" for name in ("text", "target", "answer", "examples"))
OPEN, CLOSE = "<think>", "</think>"
# Chat templates that contain today's date (Llama 3.2) get this one, so that the prompt does not change from day to
# day. It is the default date of Llama 3.1's template.
DATE = datetime(2024, 7, 26)
_DATED = "".join(f"|replace('%{code}', '{DATE:%{code}}')" for code in "dmyYbBaAjHIMSp")
_FIXED_DATE = f"{{%- macro strftime_now(form) -%}}{{{{ form{_DATED} }}}}{{%- endmacro -%}}"


def with_target(target: str, text: str) -> str:
    """A target and a text as one input: the target is its first line. Classical methods read it in this form."""
    return f"{' '.join(target.split())}\n{text}"


@dataclass(frozen=True)
class ThoughtMarks:
    """Text around a thought in a prompt that ends where the thought starts.

    Args:
        close: ends a thought.
        after: between a thought and the answer, with `close`.
        empty: suffix of the prompt with an empty thought; ends where the answer starts.
    """

    close: str
    after: str
    empty: str


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt around the text, or around text and target.

    Args:
        prefix: before the text, or before whichever of text and target comes first.
        suffix: after the last of them; ends exactly where the answer starts, or the thought before it.
        middle: between text and target; None without a target.
        target_first: whether the target comes before the text.
        opening: of the chat template, before the examples; empty without examples.
        fixed_examples: between opening and prefix, if they are the same for all texts.
        examples_for: otherwise, returns the examples for a text.
        thought: what closes a thought; None: the model writes none.
    """

    prefix: str
    suffix: str
    middle: str | None = None
    target_first: bool = False
    opening: str = ""
    fixed_examples: str = ""
    examples_for: Callable[[str], str] | None = None
    thought: ThoughtMarks | None = None

    @classmethod
    def of(
        cls,
        template: str,
        labels: LabelSpace,
        style: str,
        think: str,
        tokenizer: Any,
        examples: ExampleRows | None = None,
        marks: tuple[str, str] | None = None,
    ) -> Prompt:
        """Render a template.

        Args:
            template: with ``{text}`` once and optionally ``{target}`` and ``{labels}``.
            labels: their words fill ``{labels}``, joined by `` / ``.
            style: ``plain``, or ``chat`` to wrap it into the tokenizer's chat template.
            think: ``closed`` disables thinking: by the switch of the chat template, or with an empty think block before
                the answer. ``open`` ends the prompt where a thought starts.
            tokenizer: has the chat template.
            examples: labeled rows that come before the text, in the same turn; None: none.
            marks: open and close a thought; None: those of the chat template.

        Raises:
            ConfigError: if a chat template is required but missing, cannot render a message, or has no thoughts.
        """
        examples = None if examples is None or examples.settings.count == 0 else examples
        user = template.format(text=_TEXT, target=_TARGET, labels=" / ".join(labels.words))
        user = _EXAMPLES + user if examples else user
        if style == "chat":
            user = _chat(user, think, tokenizer, marks)
        elif think == "open" and marks is None:
            raise _no_thoughts("a plain prompt has")
        elif think != "none" and marks is not None:
            user += f"{marks[0]}\n" if think == "open" else f"{marks[0]}\n\n{marks[1]}\n\n"
        opening, user = user.split(_EXAMPLES) if examples else ("", user)
        parts = re.split(f"{_TEXT}|{_TARGET}", user)
        middle = parts[1] if len(parts) == 3 else None
        prompt = cls(parts[0], parts[-1], middle, middle is not None and user.index(_TARGET) < user.index(_TEXT))
        if think == "open":
            close = marks[1] if marks else CLOSE
            empty = prompt.suffix.rstrip("\n") + f"\n\n{close}\n\n"
            prompt = replace(prompt, thought=ThoughtMarks(close, f"\n{close}\n\n", empty))
        if examples is None:
            return prompt

        def examples_for(text: str = "") -> str:
            """The examples for a text, without the chat template."""
            blocks = (
                [plain.prefix, *plain.parts(one), plain.suffix, labels.words[k]] for one, k in examples.choose(text)
            )
            return "".join("".join([*block, BREAK]) for block in blocks)

        plain = Prompt.of(template, labels, "plain", "none", None)
        if examples.fixed:
            return replace(prompt, opening=opening, fixed_examples=examples_for())
        return replace(prompt, opening=opening, examples_for=examples_for)

    def parts(self, given: str) -> tuple[str, str, str]:
        """Divide an input into what the prompt has before the text, the text, and what it has after the text.

        Args:
            given: a text; for a prompt with a target, from `with_target`.
        """
        if self.middle is None:
            return "", given, ""
        target, _, text = given.partition("\n")
        return (target + self.middle, text, "") if self.target_first else ("", text, self.middle + target)


def _chat(user: str, think: str, tokenizer: Any, marks: tuple[str, str] | None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            [Problem("model.prompt", "this tokenizer has no chat template; set model.prompt=plain model.think=none")]
        )

    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template

    def render(*turns: str, **switches: bool) -> str:
        roles = ("user", "assistant")
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        asked = len(turns) == 1
        settings = {"chat_template": template, "tokenize": False, "add_generation_prompt": asked}
        rendered: str = tokenizer.apply_chat_template(messages, **settings, **switches)
        return rendered

    switches = {} if think == "none" else {"enable_thinking": think == "open"}
    opens, closes = marks or (OPEN, CLOSE)
    try:
        rendered, plain = render(user, **switches), render(user)
    except (TemplateError, TypeError, ValueError) as error:
        text = f"this tokenizer's chat template cannot render a user's message ({str(error)[:120]})"
        raise ConfigError([Problem("model.prompt", f"{text}; set model.prompt=plain model.think=none")]) from None
    if think == "open":
        if marks is None and (rendered.rstrip().endswith(CLOSE) or not (OPEN in template or CLOSE in template)):
            raise _no_thoughts("the chat template of this model has")
        # R1 and GLM-Z1 open the block themselves, Qwen3 leaves its mark to the model.
        return rendered.rstrip("\n") + "\n" if rendered.rstrip().endswith(opens) else f"{rendered}{opens}\n"
    if think == "closed" and rendered == plain and not rendered.rstrip().endswith(closes):
        # The template has no switch for thinking. It opens the block itself (R1, GLM-Z1) or leaves it to the model.
        opened = rendered.rstrip().endswith(opens)
        rendered = rendered.rstrip("\n") + f"\n\n{closes}\n\n" if opened else rendered + f"{opens}\n\n{closes}\n\n"
    try:
        turn = render(user, _ANSWER, **switches).split(_ANSWER)[0]
    except (TemplateError, TypeError, ValueError):
        return rendered
    # Some templates (ChatGLM3, early ones of GLM-4-0414) leave the line break before an answer to the model.
    gap = turn.removeprefix(rendered).rstrip(" ") if turn.startswith(rendered) else ""
    return rendered + gap if gap.isspace() else rendered


def _no_thoughts(what: str) -> ConfigError:
    text = f"{what} no thoughts ({OPEN}); choose a reasoning model such as model=qwen3_0_6b, set model.think=none, or "
    marks = f"model.thought.marks=['{OPEN}','{CLOSE}']"
    return ConfigError([Problem("model.think=open", f'{text}name the text around a thought: "{marks}"')])


def without_thoughts(text: str) -> str:
    """Remove ``<think>`` blocks, including one that the prompt opened and one that is never closed."""
    text = re.sub(f"{OPEN}.*?{CLOSE}", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = re.split(CLOSE, text, flags=re.IGNORECASE)[-1]
    return re.split(OPEN, text, flags=re.IGNORECASE)[0].strip()


# Parts of the names of sentiments; a label without any of them is not a sentiment.
_SENTIMENTS = (
    *("posi", "nega", "neut", "bull", "bear", "利好", "利空", "利多", "利淡", "中性", "正面", "负面", "积极", "消极"),
    *("看多", "看空", "看涨", "看跌", "乐观", "悲观", "好评", "差评", "good", "bad", "涨", "跌", "opti", "pessi"),
)


def mismatch(prompt: str, labels: Sequence[str]) -> str | None:
    """How to fix a prompt that asks for the sentiment although the labels, such as intents, are not sentiments.

    Args:
        prompt: the template.
        labels: names and words of the labels.

    Returns:
        A sentence; None if prompt and labels agree, or if the labels are numbers or single letters.
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
