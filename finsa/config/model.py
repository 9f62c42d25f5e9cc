"""The section ``model``: a base model, its tokenizer and its prompt format."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finsa.config.base import Name, Section


class LoraTargets(Section):
    """Named sets of linear layers that an adapter can be attached to.

    Args:
        query_value, attention, all: module names of the architecture; each set contains the one before it.
    """

    query_value: tuple[str, ...]
    attention: tuple[str, ...]
    all: tuple[str, ...]


class Thought(Section):
    """Text that a model writes before its answer (chain of thought, Wei et al. 2022); used with ``think=open``.

    Args:
        marks: text that opens and text that closes a thought; null: ``<think>`` and ``</think>``, if the chat template
            has them.
        max_tokens: tokens after which a thought is cut; 0: thoughts are empty. ``data.max_length`` does not count them.
        samples: thoughts per answer, over which probabilities are averaged (self-consistency, Wang et al. 2023).
        temperature: divides the logits of a thought's tokens; 0: the most probable token, always.
        top_p: a token is drawn from the most probable ones that have this probability together.
    """

    marks: tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] | None
    max_tokens: NonNegativeInt
    samples: PositiveInt
    temperature: NonNegativeFloat
    top_p: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def _check_samples(self) -> Thought:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples of temperature=0 are all equal; set thought.samples=1 or thought.temperature=0.6")
        return self


class Model(Section):
    """A base model, its tokenizer and its prompt format.

    Args:
        inference: number type of predictions; auto: as in training. int8: linear layers in 8 bit, on a CPU.
        trust_remote_code: run Python code that ships with the weights; can only be set on the command line.
        architecture: contents of ``config.json``: for random weights, and for memory plans while the file is not on
            this machine; if it is, the two must agree. null: only the file is used. A null value removes an inherited
            key.
    """

    name: Name
    hub_id: str | None
    revision: str
    weights: Literal["pretrained", "random"]
    path: str | None
    tokenizer: str | None
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    inference: Literal["auto", "bfloat16", "float32", "int8"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    prompt: Literal["plain", "chat"]
    think: Literal["none", "closed", "open"]
    thought: Thought
    trust_remote_code: bool
    adapter_learning_rate: PositiveFloat
    lora_targets: LoraTargets | None
    architecture: dict[str, Any] | None

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.weights == "pretrained" and not (self.path or self.hub_id):
            raise ValueError("weights=pretrained needs path (a local folder) or hub_id; or set model.weights=random")
        if self.think == "closed" and self.prompt != "chat" and self.thought.marks is None:
            raise ValueError("think=closed needs prompt=chat; set model.think=none or model.prompt=chat")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("architecture needs a model_type, such as qwen2")
        if self.weights == "random" and self.architecture is None and self.path is None:
            raise ValueError("weights=random needs architecture, or a path with a config.json")
        return self
