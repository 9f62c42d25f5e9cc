"""A mixture of LoRA experts: the router, and a model that computes all experts in one pass of the base model.

The gates of a row are computed once, before the layers that use them, from the mean over the tokens of the text.
Position 0 of a causal model attends to nothing else, and the prompt says what the task is rather than where the text
comes from.

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
from finsa.models.classifier import HEAD_FILE, load_weights, save_head, text_mean
from finsa.models.moe.experts import Expert, write
from finsa.models.moe.stacking import Route, StackedLinear, attach, early_states

ROUTER_FILE = "router.safetensors"
MANIFEST = "manifest.json"
MIN_TEMPERATURE = 0.1  # of the router, as published


class Router(torch.nn.Module):
    """FinSA-MoE's router: Linear, LayerNorm, ReLU, Dropout 0.1 and Linear (d, 64, E), over a trained temperature.

    Its input is first scaled to mean 0 and variance 1, without parameters. The published router reads last hidden
    states, which the model's final norm has scaled; embeddings are so small that the bias of the first layer would
    dominate them.

    Args:
        width: d.
        hidden: width of the hidden layer.
        experts: number of experts.
        dropout: dropout on the hidden layer during training.
    """

    def __init__(self, width: int, hidden: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.inside = torch.nn.Sequential(
            torch.nn.Linear(width, hidden),
            torch.nn.LayerNorm(hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(hidden, experts),
        )
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Compute logits (b, E) from one vector for each text, (b, d)."""
        scaled = functional.layer_norm(text.float(), text.shape[1:])
        logits: torch.Tensor = self.inside(scaled) / self.temperature.clamp(min=MIN_TEMPERATURE)
        return logits


def gates_of(logits: torch.Tensor, routing: str, k: int) -> torch.Tensor:
    """Compute the gates of the experts, (b, E), which sum to 1.

    Args:
        logits: logits of the router, (b, E).
        routing: ``soft``: all experts; ``top_k``: the k most likely, in proportion; ``hard``: the most likely one.
        k: number of experts for ``top_k``.
    """
    k = {"soft": logits.shape[1], "hard": 1}.get(routing, k)
    if k >= logits.shape[1]:
        return logits.softmax(dim=1)
    indices = logits.topk(k, dim=1).indices
    masked = torch.full_like(logits, float("-inf")).scatter(1, indices, logits.gather(1, indices))
    return masked.softmax(dim=1)


def balance_loss(gates: torch.Tensor) -> torch.Tensor:
    """KL divergence of the mean gates u from uniform, sum u ln(u E): 0 for equal use, ln E for a single expert.

    The published term has the two swapped and is divided by E twice, (1/E) sum (1/E) ln((1/E) / u): an unused expert
    makes it infinite, and its value depends on E through the "batchmean" of a vector in torch.

    Args:
        gates: (b, E).
    """
    mean = gates.mean(dim=0)
    return (mean * (mean * len(mean)).clamp(min=1e-8).log()).sum()


class Mixture(torch.nn.Module):
    """A causal language model with all experts in its adapted layers, a router, and optionally a classification head.

    Args:
        backbone: a frozen causal language model of transformers; `stacking.detach` restores it.
        experts: the experts, in order.
        stage: what the router reads and how the experts are mixed.
        classes: number of classes of the classification head; None for the LM head.
        head_dropout: dropout on the input of the classification head during training.
        seed: seed of the initial weights of router and head.
    """

    accepts_loss_kwargs = True  # transformers' trainer reads these two attributes
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
        self.backbone, self.config = (
            backbone,
            backbone.config,
        )  # first, as the model's dtype is that of its first parameter
        self.adapters, self.stage, self.route = list(experts), stage, Route()
        self.experts = tuple(expert.name for expert in experts)
        self.only: int | None = None  # the expert that answers alone, whatever the router says
        self.paths = attach(backbone, experts, self.route)
        device = next(backbone.parameters()).device
        torch.manual_seed(seed)
        width = backbone.config.hidden_size
        self.router = Router(width, stage.router.hidden, len(experts), stage.router.dropout).to(device)
        self.dropout = torch.nn.Dropout(head_dropout)
        self.head = torch.nn.Linear(width, classes).to(device) if classes is not None else None

    def forward(self, input_ids: torch.Tensor, text_span: torch.Tensor, **inputs: Any) -> Any:
        """Route the rows and compute their outputs.

        Args:
            input_ids: rows padded on the right, (b, s).
            text_span: start and end of the text in each row, (b, 2).
            inputs: other arguments of the causal language model.

        Returns:
            Logits (b, c) of the classification head; without one, the outputs of the causal language model.
        """
        with torch.no_grad():
            if self.stage.router.read == "embeddings":
                states = self.backbone.get_input_embeddings()(input_ids)
            else:  # the first layers of the base model, without experts
                self.route.factors = None
                states = early_states(self.backbone.base_model, input_ids, self.stage.router.layer)
        logits = self.router(text_mean(states, text_span))
        gates = gates_of(logits, "soft" if self.training else self.stage.routing, self.stage.top_k)
        if self.only is not None:
            gates = functional.one_hot(torch.full_like(gates[:, 0], self.only, dtype=torch.long), len(self.experts))
        self.route.logits, self.route.gates = logits, gates.float()
        self._set_factors(self.route.gates)
        compute = self._mix_outputs if self.stage.mix == "output" else self._outputs
        return compute(input_ids, text_span, inputs)

    def _set_factors(self, gates: torch.Tensor) -> None:
        rank, scale = self.adapters[0].config.r, self.adapters[0].scale
        self.route.factors = (gates * scale).repeat_interleave(rank, dim=1)[:, None]

    def _outputs(self, input_ids: torch.Tensor, text_span: torch.Tensor, inputs: dict[str, Any]) -> Any:
        if self.head is None:
            return self.backbone(input_ids=input_ids, **inputs)
        states = self.backbone.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(self.dropout(text_mean(states[: len(text_span)], text_span)))

    def _mix_outputs(self, input_ids: torch.Tensor, text_span: torch.Tensor, inputs: dict[str, Any]) -> Any:
        """Mix the last hidden states of the experts, as FinSA-MoE does, in one pass over E*b rows."""
        gates = self.route.gates
        assert gates is not None
        number = len(self.experts)
        self._set_factors(torch.eye(number, device=gates.device).repeat_interleave(len(gates), dim=0))

        def mix(module: Any, args: Any, output: Any) -> Any:
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
            return self._outputs(input_ids.repeat(number, 1), text_span, repeated)
        finally:
            hook.remove()

    @contextmanager
    def using_expert(self, expert: int | None) -> Iterator[None]:
        """Use one expert for every row within this context; None leaves the choice to the router."""
        self.only = expert
        try:
            yield
        finally:
            self.only = None

    @contextmanager
    def routed(self, routing: str) -> Iterator[None]:
        """Use another routing than the configured one within this context."""
        configured = self.stage
        self.stage = configured.model_copy(update={"routing": routing})
        try:
            yield
        finally:
            self.stage = configured

    def gates(self) -> torch.Tensor:
        """The gates of the rows of the last forward pass, (b, E)."""
        assert self.route.gates is not None, "there has been no forward pass yet"
        return self.route.gates

    def layers(self) -> dict[str, StackedLinear]:
        """The layers with experts, by path."""
        return {path: self.backbone.get_submodule(path) for path in self.paths}

    def set_trainable(self, experts: bool) -> None:
        """Make the experts trainable or freeze them; the base model is always frozen, router and head never are."""
        self.backbone.requires_grad_(False)
        for layer in self.layers().values():
            layer.lora_A.requires_grad_(experts)
            layer.lora_B.requires_grad_(experts)

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The trainable parameters by name, which are all that a checkpoint has to contain."""
        return {name: p.detach().contiguous() for name, p in self.named_parameters() if p.requires_grad}

    def expert_weights(self, number: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A (r, in) and B (out, r) of one expert, by path."""
        rank = self.adapters[number].config.r
        part = slice(number * rank, (number + 1) * rank)
        return {path: (layer.lora_A[part], layer.lora_B[:, part]) for path, layer in self.layers().items()}

    def save(self, folder: Path, labels: Sequence[str]) -> None:
        """Write ``adapters/<expert>/`` (PEFT) and ``mixture/`` (the router, and the classification head if any)."""
        for number, expert in enumerate(self.adapters):
            write(expert, self.expert_weights(number), folder / "adapters" / expert.name)
        place = folder / "mixture"
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().cpu() for name, t in self.router.state_dict().items()}, place / ROUTER_FILE)
        if self.head is not None:
            save_head(self.head, place, labels)
        first = self.adapters[0]
        manifest = {  # all that another program needs to use the files
            "experts": list(self.experts),
            "rank": first.config.r,
            "scale": first.scale,
            "targets": sorted(first.config.target_modules),
            "head": "lm" if self.head is None else "classifier",
            "labels": list(labels),
            **self.stage.model_dump(include={"mix", "routing", "top_k", "router"}),
        }
        # Written last, so that a mixture with a manifest is complete.
        (place / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")

    def load(self, folder: Path) -> None:
        """Load the router, and the classification head if any.

        Raises:
            ModelError: if they are missing or of another size.
        """
        load_weights(self.router, folder / "mixture" / ROUTER_FILE)
        if self.head is not None:
            load_weights(self.head, folder / "mixture" / HEAD_FILE)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Enable it in the base model, never reentrant: the gates would get no gradient."""
        self.backbone.activation_checkpointing_enable({"use_reentrant": False})

    def add_model_tags(self, tags: Any) -> None:
        """Do nothing: trl calls this, but models are not uploaded."""


def expert_names(folder: Path) -> list[str]:
    """The experts of a saved mixture, in order.

    Raises:
        ModelError: if the folder contains no mixture.
    """
    try:
        names = list(json.loads((folder / "mixture" / MANIFEST).read_text(encoding="utf-8"))["experts"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} contains no readable mixture: {error}") from None
    if not all(isinstance(name, str) and re.match(FOLDER_NAME, name) for name in names):
        raise ModelError(f"{folder}: the name of an expert is a path out of the folder")
    return names
