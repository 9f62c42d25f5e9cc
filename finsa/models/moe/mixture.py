"""A mixture of LoRA experts in one pass of the backbone.

The gate is made once per row, before the layers that use it, from the mean over the text's own tokens: position 0 of a
causal model sees nothing, and a prompt says what the task is rather than where the text comes from.

Letters: b rows of a batch, s tokens, d hidden width, E experts, r rank of each, c classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

from finsa.config import FOLDER_NAME, MoeJointStage
from finsa.errors import ModelError
from finsa.models.classifier import load_head, save_head, text_mean
from finsa.models.moe import experts as folders
from finsa.models.moe.experts import Expert
from finsa.models.moe.routing import Router, chosen, load_router
from finsa.models.moe.stacking import Route, StackedLinear, attach, early_states

FILE = "router.safetensors"
MANIFEST = "manifest.json"


class Mixture(torch.nn.Module):
    """A causal language model whose adapted layers hold all experts, a router, and perhaps a classification head.

    Args:
        backbone: a frozen causal language model of transformers; `detach` gives it back.
        experts: in their order.
        stage: how the router reads and how the experts are mixed.
        classes: of the classification head; None: the LM head answers.
        head_dropout: on the head's input, while training.
        seed: of router and head.
    """

    accepts_loss_kwargs = True  # transformers' trainer asks for these two
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        backbone: Any,
        experts: Sequence[Expert],
        stage: MoeJointStage,
        classes: int | None,
        head_dropout: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.backbone, self.config = backbone, backbone.config  # first: its type is the model's
        self.adapters, self.stage, self.route = list(experts), stage, Route()
        self.experts = tuple(expert.name for expert in experts)
        self.only: int | None = None
        self.paths = attach(backbone, experts, self.route)
        device = next(backbone.parameters()).device
        torch.manual_seed(seed)
        width = backbone.config.hidden_size
        self.router = Router(width, stage.router.hidden, len(experts), stage.router.dropout).to(device)
        self.dropout = torch.nn.Dropout(head_dropout)
        self.head = torch.nn.Linear(width, classes).to(device) if classes is not None else None

    def forward(self, input_ids: torch.Tensor, text_span: torch.Tensor, **inputs: Any) -> Any:
        """Answer rows.

        Args:
            input_ids: (b, s), padded on the right.
            text_span: start and end of each row's text, (b, 2).
            inputs: what the causal language model takes besides.

        Returns:
            Logits (b, c) of the classification head; without one, what the causal language model returns.
        """
        self._decide(input_ids, text_span)
        if self.stage.mix == "output":
            return self._mixed_outputs(input_ids, text_span, inputs)
        return self._answer(input_ids, text_span, inputs)

    def _decide(self, input_ids: torch.Tensor, text_span: torch.Tensor) -> None:
        """Make the gates, and tell the layers."""
        logits = self.router(text_mean(self._read(input_ids), text_span))
        gates = chosen(logits, "soft" if self.training else self.stage.routing, self.stage.top_k)
        if self.only is not None:
            gates = functional.one_hot(torch.full_like(gates[:, 0], self.only, dtype=torch.long), len(self.experts))
        self.route.logits, self.route.gates = logits, gates.float()
        self._tell(self.route.gates)

    def _tell(self, gates: torch.Tensor) -> None:
        rank, scale = self.adapters[0].config.r, self.adapters[0].scale
        self.route.factors = (gates * scale).repeat_interleave(rank, dim=1)[:, None]

    def _read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the router reads, (b, s, d): embeddings, or states of the base alone after its first layers."""
        with torch.no_grad():
            if self.stage.router.read == "embeddings":
                return self.backbone.get_input_embeddings()(input_ids)  # type: ignore[no-any-return]
            self.route.factors = None
            return early_states(self.backbone.base_model, input_ids, self.stage.router.layer)

    def _answer(self, input_ids: torch.Tensor, text_span: torch.Tensor, inputs: dict[str, Any]) -> Any:
        if self.head is None:
            return self.backbone(input_ids=input_ids, **inputs)
        states = self.backbone.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(self.dropout(text_mean(states[: len(text_span)], text_span)))

    def _mixed_outputs(self, input_ids: torch.Tensor, text_span: torch.Tensor, inputs: dict[str, Any]) -> Any:
        """Mix the experts' last hidden states, as FinSA-MoE does: one pass over E*b rows, expert after expert."""
        gates = self.route.gates
        assert gates is not None
        number = len(self.experts)
        self._tell(torch.eye(number, device=gates.device).repeat_interleave(len(gates), dim=0))

        def mix(module: Any, given: Any, output: Any) -> Any:
            states = output.last_hidden_state.unflatten(0, (number, len(gates)))
            output.last_hidden_state = torch.einsum("be,ebsd->bsd", gates.to(states.dtype), states)
            return output

        repeated = {
            name: value.repeat(number, *[1] * (value.dim() - 1))
            if name in ("attention_mask", "position_ids")
            else value
            for name, value in inputs.items()
        }
        hook = self.backbone.base_model.register_forward_hook(mix)
        try:
            return self._answer(input_ids.repeat(number, 1), text_span, repeated)
        finally:
            hook.remove()

    @contextmanager
    def alone(self, expert: int | None) -> Iterator[None]:
        """Within, one expert answers every row, whatever the router says; None: the router decides."""
        self.only = expert
        try:
            yield
        finally:
            self.only = None

    @contextmanager
    def routed(self, routing: str) -> Iterator[None]:
        """Within, rows are routed another way than the configuration says."""
        kept = self.stage
        self.stage = kept.model_copy(update={"routing": routing})
        try:
            yield
        finally:
            self.stage = kept

    def shares(self) -> torch.Tensor:
        """The gates of the last pass's rows, (b, E)."""
        assert self.route.gates is not None, "no row has passed yet"
        return self.route.gates

    def layers(self) -> dict[str, StackedLinear]:
        """The layers with experts, by path."""
        return {path: self.backbone.get_submodule(path) for path in self.paths}

    def learn(self, experts: bool) -> None:
        """Mark what learns: router and head, and the experts or not; never the base."""
        self.backbone.requires_grad_(False)
        for layer in self.layers().values():
            layer.lora_A.requires_grad_(experts)
            layer.lora_B.requires_grad_(experts)

    def learnt(self) -> dict[str, torch.Tensor]:
        """What learns, by name: all that a trainer's checkpoint has to hold."""
        return {name: p.detach().contiguous() for name, p in self.named_parameters() if p.requires_grad}

    def expert_weights(self, number: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A (r, in) and B (out, r) of one expert, by path."""
        rank = self.adapters[number].config.r
        part = slice(number * rank, (number + 1) * rank)
        return {path: (layer.lora_A[part], layer.lora_B[:, part]) for path, layer in self.layers().items()}

    def save(self, folder: Path, labels: Sequence[str]) -> None:
        """Write ``adapters/<expert>/`` (PEFT) and ``mixture/`` (router, and the head where there is one)."""
        for number, expert in enumerate(self.adapters):
            folders.write(expert, self.expert_weights(number), folder / "adapters" / expert.name)
        place = folder / "mixture"
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().cpu() for name, t in self.router.state_dict().items()}, place / FILE)
        if self.head is not None:
            save_head(self.head, place, labels)
        # Last, so that a manifest tells of a whole mixture.
        (place / MANIFEST).write_text(json.dumps(self._manifest(labels), ensure_ascii=False, indent=1) + "\n", "utf-8")

    def _manifest(self, labels: Sequence[str]) -> dict[str, Any]:
        """What another program has to know to use the files."""
        first = self.adapters[0]
        return {
            "experts": list(self.experts),
            "rank": first.config.r,
            "scale": first.scale,
            "targets": sorted(first.config.target_modules),
            "head": "lm" if self.head is None else "classifier",
            "labels": list(labels),
            **self.stage.model_dump(include={"mix", "routing", "top_k", "router"}),
        }

    def load(self, folder: Path) -> None:
        """Read the router, and the head where there is one.

        Raises:
            ModelError: where they are missing or of another size.
        """
        load_router(self.router, folder / "mixture" / FILE)
        if self.head is not None:
            load_head(self.head, folder / "mixture")

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Pass it on to the base, without reentrance: gates would get no gradient through a reentrant one."""
        self.backbone.activation_checkpointing_enable({"use_reentrant": False})

    def add_model_tags(self, tags: Any) -> None:
        """Take no tags: nothing is uploaded."""


def names(folder: Path) -> list[str]:
    """The experts of a saved mixture, in their order.

    Raises:
        ModelError: for a folder without one.
    """
    try:
        found = list(json.loads((folder / "mixture" / MANIFEST).read_text(encoding="utf-8"))["experts"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: holds no mixture that can be read: {error}") from None
    if not all(isinstance(name, str) and re.match(FOLDER_NAME, name) for name in found):
        raise ModelError(f"{folder}: an expert's name leads out of the folder")
    return found
