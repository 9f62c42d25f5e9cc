"""The one trainer: trl's SFTTrainer fed with finished rows, loss where labels are, validation by the scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from trl import SFTTrainer

from finsa.modeling.classifier import Classifier
from finsa.modeling.mixture import Mixture
from finsa.training.objective import Objective
from finsa.training.recovery import Recovery
from finsa.training.throughput import Meter

Validate = Callable[[torch.nn.Module], dict[str, float]]


class FinsaTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains on finished rows.

    Args:
        validate: called with the model; its numbers choose the checkpoint.
        objective: what a step makes small.
        lr_ratio: learning rate of LoRA's B over that of A (LoRA+, Hayou et al. 2024).
        recovery: makes micro-batches smaller where memory does not suffice.
        **kwargs: as SFTTrainer takes them.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` has divided by the whole step

    def __init__(
        self, *, validate: Validate, objective: Objective, lr_ratio: float, recovery: Recovery, **kwargs: Any
    ) -> None:
        self.validate, self.objective, self.lr_ratio, self.recovery = validate, objective, lr_ratio, recovery
        exact = [(p, p.data) for p in kwargs["model"].parameters() if p.requires_grad]
        super().__init__(**kwargs)
        for parameter, data in exact:
            parameter.data = data  # trl rounds adapters on a quantised base to bfloat16; they stay in float32 here
        self.meter = Meter(kwargs["model"], len(objective.suffix), self.args.gradient_checkpointing)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | None]:
        """Fetch the micro-batches of an optimiser step, and the sum of their weights over all processes."""
        self.recovery.begin()
        samples = list(islice(epoch_iterator, num_batches))
        if not samples:
            return samples, None
        weight = torch.stack([self.objective.weight(batch) for batch in samples]).sum(0).to(device)
        return samples, self.accelerator.gather(weight).view(-1, *weight.shape).sum(0)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run a micro-batch forward and backward, in smaller parts where memory asks for it."""
        plain = super().training_step
        self.meter.count(inputs)
        return self.recovery.step(model, inputs, lambda part: plain(model, part, num_items_in_batch))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Average the loss over the weights of the whole optimiser step, all processes and micro-batches."""
        loss = self.objective.total(model, inputs)
        if num_items_in_batch is None:
            return (loss / self.objective.weight(inputs)).sum()
        # DDP averages gradients over processes, while the weights are already those of all of them.
        return (loss / num_items_in_batch).sum() * self.accelerator.num_processes

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser; with LoRA+ the matrices B get groups of their own with their own learning rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.lr_ratio == 1:
            return optimizer
        fast = {p for name, p in self.model.named_parameters() if "lora_B" in name}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if p in fast]
            group["params"] = [p for p in group["params"] if p not in fast]
            if moved:
                optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * self.lr_ratio})
        return optimizer

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Validate with the project's own scorer instead of a loss over padded batches."""
        with self.meter.paused():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate(self.model).items()}
        self.log(dict(metrics))
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, which is no training time."""
        with self.meter.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a checkpoint; of a model with a head only what learns, not the base again."""
        super()._save(output_dir, self.model.learnt() if isinstance(self.model, Classifier | Mixture) else state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run folder says more, and trl's asks wandb for a URL."""
