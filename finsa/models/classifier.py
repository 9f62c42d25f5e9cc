"""A classification head on a language model: the mean of the text tokens' last hidden states, then one linear layer.

Position 0 of a causal model sees nothing, and the last position sees the prompt's tail rather than more text; the mean
over the text tokens is what FinSA-MoE's joint stage reads too (Linear with bias after Dropout 0.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from finsa.errors import ModelError

FILE = "classifier.safetensors"


class Classifier(torch.nn.Module):
    """A base, with or without an adapter, and a head that gives one logit per class.

    Args:
        backbone: a causal language model of transformers, wrapped by PEFT or not; its LM head is not used.
        classes: their number.
        dropout: on the mean, while training.
        seed: of the head's weights.
    """

    accepts_loss_kwargs = True  # transformers' trainer asks for these two
    _keys_to_ignore_on_save = None

    def __init__(self, backbone: Any, classes: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        self.dropout = torch.nn.Dropout(dropout)
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(self.config.hidden_size, classes)
        self.head.to(next(backbone.parameters()).device)

    def forward(self, input_ids: torch.Tensor, text_span: torch.Tensor, past: Any = None) -> torch.Tensor:
        """Logits (b, c) of rows (b, s), padded on the right.

        Args:
            input_ids: the rows.
            text_span: start and end of each text in its row, (b, 2).
            past: keys and values of what stands before the rows, (b, ...) per layer.
        """
        return self.head(self.dropout(self.pooled(input_ids, text_span, past)))

    def pooled(self, input_ids: torch.Tensor, text_span: torch.Tensor, past: Any = None) -> torch.Tensor:
        """Mean of the text tokens' last hidden states, (b, d) in float32; zeros for a row without text."""
        before = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        states = causal(self.backbone).base_model(input_ids=input_ids, **before).last_hidden_state
        return text_mean(states, text_span)

    def start_from_words(self, answers: Sequence[Sequence[int]]) -> None:
        """Set the head to the LM head's rows of each label's tokens, their mean where there are several; bias 0.

        The logits then equal the LM head's at the pooled state.
        """
        rows = causal(self.backbone).get_output_embeddings().weight
        with torch.no_grad():
            for number, tokens in enumerate(answers):
                self.head.weight[number] = rows[list(tokens)].float().mean(0)
            self.head.bias.zero_()

    def save(self, folder: Path, labels: Sequence[str]) -> None:
        """Write the head and the names of its classes beside the adapter."""
        save_head(self.head, folder, labels)

    def restore(self, folder: Path) -> None:
        """Read the head back.

        Raises:
            ModelError: where there is none, or it is of other classes or another width.
        """
        load_head(self.head, folder)

    def learnt(self) -> dict[str, torch.Tensor]:
        """What learns, by name: all that a checkpoint has to hold."""
        return {name: p.detach().contiguous() for name, p in self.named_parameters() if p.requires_grad}

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Pass it on to the base."""
        causal(self.backbone).activation_checkpointing_enable(**kwargs)

    def add_model_tags(self, tags: Any) -> None:
        """Take no tags: nothing is uploaded."""


def text_mean(states: torch.Tensor, text_span: torch.Tensor) -> torch.Tensor:
    """Mean of states (b, s, d) over each text's tokens, (b, d) in float32; zeros for a row without text."""
    place = torch.arange(states.shape[1], device=states.device)
    inside = ((place >= text_span[:, :1]) & (place < text_span[:, 1:])).float()
    return torch.einsum("bs,bsd->bd", inside, states.float()) / inside.sum(1, keepdim=True).clamp(min=1)


def save_head(head: torch.nn.Linear, folder: Path, labels: Sequence[str]) -> None:
    """Write a head and the names of its classes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / FILE, metadata={"labels": "\n".join(labels)})


def labels_of(folder: Path) -> tuple[str, ...] | None:
    """The classes of the head in a folder, in their order; None where there is no head."""
    if not (folder / FILE).is_file():
        return None
    with safe_open(folder / FILE, "pt") as file:
        return tuple((file.metadata() or {}).get("labels", "").split("\n"))


def load_head(head: torch.nn.Linear, folder: Path) -> None:
    """Read a head back.

    Raises:
        ModelError: where there is none, or it is of other classes or another width.
    """
    try:
        head.load_state_dict(load_file(folder / FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder / FILE}: no head that fits: {str(error).splitlines()[-1].strip()}") from None


def causal(backbone: Any) -> Any:
    """The causal language model itself, its adapted layers included."""
    return backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
