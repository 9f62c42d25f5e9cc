"""A classification head on a language model: the mean of the text tokens' last hidden states, then one linear layer.

Position 0 of a causal model attends to nothing else, and the last position is the end of the prompt rather than of the
text; FinSA-MoE's joint stage reads the mean over the text tokens too (Linear with bias after Dropout 0.1).

Letters: b rows of a batch, s tokens, d hidden width, c classes.
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

HEAD_FILE = "classifier.safetensors"


class Classifier(torch.nn.Module):
    """A base model, with or without an adapter, and a head that gives one logit per class.

    Args:
        backbone: a causal language model of transformers, wrapped by PEFT or not; its LM head is not used.
        classes: number of classes.
        dropout: dropout on the mean during training.
        seed: seed of the head's initial weights.
    """

    accepts_loss_kwargs = True  # transformers' trainer reads these two attributes
    _keys_to_ignore_on_save = None

    def __init__(self, backbone: Any, classes: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        self.dropout = torch.nn.Dropout(dropout)
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(self.config.hidden_size, classes)
        self.head.to(next(backbone.parameters()).device)

    def forward(self, input_ids: torch.Tensor, text_span: torch.Tensor, past: Any = None) -> torch.Tensor:
        """Compute the logits, (b, c).

        Args:
            input_ids: rows padded on the right, (b, s).
            text_span: start and end of the text in each row, (b, 2).
            past: keys and values of a prefix of the rows, (b, ...) per layer.
        """
        return self.head(self.dropout(self.pooled(input_ids, text_span, past)))

    def pooled(self, input_ids: torch.Tensor, text_span: torch.Tensor, past: Any = None) -> torch.Tensor:
        """Mean of the text tokens' last hidden states, (b, d) in float32; zeros for a row without text."""
        cache = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        states = unwrap_peft(self.backbone).base_model(input_ids=input_ids, **cache).last_hidden_state
        return text_mean(states, text_span)

    def init_from_label_words(self, answers: Sequence[Sequence[int]]) -> None:
        """Set each class's weights to the mean of the LM head's rows of its label's tokens, and the bias to 0.

        The logits then equal the LM head's at the pooled state.

        Args:
            answers: token ids of each label.
        """
        rows = unwrap_peft(self.backbone).get_output_embeddings().weight
        with torch.no_grad():
            for number, tokens in enumerate(answers):
                self.head.weight[number] = rows[list(tokens)].float().mean(0)
            self.head.bias.zero_()

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The trainable parameters by name, which are all that a checkpoint has to contain."""
        return {name: p.detach().contiguous() for name, p in self.named_parameters() if p.requires_grad}

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Enable it in the base model."""
        unwrap_peft(self.backbone).activation_checkpointing_enable(**kwargs)

    def add_model_tags(self, tags: Any) -> None:
        """Do nothing: trl calls this, but models are not uploaded."""


def text_mean(states: torch.Tensor, text_span: torch.Tensor) -> torch.Tensor:
    """Mean of states (b, s, d) over each text's tokens, (b, d) in float32; zeros for a row without text."""
    position = torch.arange(states.shape[1], device=states.device)
    mask = ((position >= text_span[:, :1]) & (position < text_span[:, 1:])).float()
    return torch.einsum("bs,bsd->bd", mask, states.float()) / mask.sum(1, keepdim=True).clamp(min=1)


def save_head(head: torch.nn.Linear, folder: Path, labels: Sequence[str]) -> None:
    """Write a classification head and the names of its classes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / HEAD_FILE, metadata={"labels": "\n".join(labels)})


def labels_of(folder: Path) -> tuple[str, ...] | None:
    """The classes of the head in a folder, in order; None if there is no head."""
    if not (folder / HEAD_FILE).is_file():
        return None
    with safe_open(folder / HEAD_FILE, "pt") as file:
        return tuple((file.metadata() or {}).get("labels", "").split("\n"))


def load_weights(module: torch.nn.Module, file: Path) -> None:
    """Load the weights of a head or a router from a safetensors file.

    Raises:
        ModelError: if the file is missing or damaged, or its tensors have other names or shapes.
    """
    try:
        module.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be loaded: {str(error).splitlines()[-1].strip()}") from None


def unwrap_peft(backbone: Any) -> Any:
    """The causal language model within PEFT, its adapted layers included."""
    return backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
