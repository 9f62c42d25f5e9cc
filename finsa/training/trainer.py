"""The one trainer: trl's SFTTrainer fed with finished rows, loss where labels are, validation by the scorer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from trl import SFTTrainer

from finsa.training.loss import labelled_loss

Validate = Callable[[torch.nn.Module], dict[str, float]]


class FinsaTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains on finished rows.

    Args:
        validate: called with the model; its numbers choose the checkpoint.
        **kwargs: as SFTTrainer takes them.
    """

    def __init__(self, *, validate: Validate, **kwargs: Any) -> None:
        self.validate = validate
        self.tokens: torch.Tensor | int = 0  # real tokens trained on; a tensor, so that no step waits for the device
        super().__init__(**kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Average the loss over the labelled tokens of the whole optimiser step, all processes and micro-batches."""
        self.tokens = self.tokens + inputs["lengths"].sum()
        loss = labelled_loss(model, inputs["input_ids"], inputs["labels"])
        items = (inputs["labels"][:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        # DDP averages gradients over processes, while the items are already those of all of them.
        return loss / items * (self.accelerator.num_processes if num_items_in_batch is not None else 1)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Validate with the project's own scorer instead of a loss over padded batches."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate(self.model).items()}
        self.log(dict(metrics))
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run folder says more, and trl's asks wandb for a URL."""
