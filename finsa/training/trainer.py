"""The one trainer: trl's SFTTrainer fed with finished rows, loss where labels are, validation by the scorer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from finsa.models import hardware
from finsa.models.classifier import Classifier
from finsa.models.moe.mixture import Mixture
from finsa.training import distributed
from finsa.training.batching import Step
from finsa.training.objective import Objective
from finsa.training.recovery import Recovery
from finsa.training.resumable import DurableTrainer
from finsa.training.throughput import Meter

Validate = Callable[[torch.nn.Module], dict[str, float]]


class FinsaTrainer(DurableTrainer):
    """Trains on finished rows.

    Args:
        validate: called with the model; its numbers choose the checkpoint.
        objective: what a step makes small.
        lr_ratio: learning rate of LoRA's B over that of A (LoRA+, Hayou et al. 2024).
        recovery: cuts smaller micro-batches where memory does not suffice.
        saving: entered while a checkpoint is written.
        rows: how many of the rows are real; those behind them weigh nothing.
        **kwargs: as DurableTrainer takes them.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` has divided by the whole step

    def __init__(
        self,
        *,
        validate: Validate,
        objective: Objective,
        lr_ratio: float,
        recovery: Recovery,
        saving: Callable[[], AbstractContextManager[None]],
        rows: int,
        **kwargs: Any,
    ) -> None:
        self.saving = saving
        self.validate, self.objective, self.lr_ratio, self.rows = validate, objective, lr_ratio, rows
        self.recovery, self.step = recovery, Step([])
        self.validated: list[int] = []  # steps, of this sitting
        self.first_step: float | None = None  # seconds of forward and backward: what compilation costs
        self.tokens = 0  # real tokens trained on, counted where the rows are, so that no step waits for the device
        exact = [(p, p.data) for p in kwargs["model"].parameters() if p.requires_grad]
        super().__init__(cut=recovery.cut, **kwargs)
        for parameter, data in exact:
            parameter.data = data  # trl rounds adapters on a quantised base to bfloat16; they stay in float32 here
        self.meter = Meter(kwargs["model"], len(objective.suffix), self.args.gradient_checkpointing)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; FSDP on processors as on GPUs."""
        super().create_accelerator_and_postprocess()
        distributed.allow_on_cpu(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the rows, the same in all processes."""
        inner = super()._get_train_sampler(self.train_dataset.select(range(self.rows)))
        return distributed.order(inner, self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | None]:
        """Fetch an optimiser step, cut into micro-batches, and the sum of its weights over all processes.

        To the trainer a step is one batch, so how it is cut is decided with its rows at hand.
        """
        step: Step | None = next(epoch_iterator, None)
        if step is None:
            return [], None
        real = [row for row in step.rows if row["row"] < self.rows]
        self.tokens += sum(len(row["input_ids"]) for row in real)
        self.note([row["row"] for row in real])
        self.step, batches = step, self.cut(step)
        self.meter.count(real, batches)
        weight = hardware.onto(torch.stack([self.objective.weight(batch) for batch in batches]).sum(0), device)
        return [batches], self.accelerator.gather(weight).view(-1, *weight.shape).sum(0)

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of a whole optimiser step, micro-batch after micro-batch.

        Returns:
            The step's loss, as this process sees it.
        """
        started, plain = time.monotonic(), super().training_step

        def make(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
            losses = []
            for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
                self.accelerator.gradient_state._set_sync_gradients(left == 0)
                moved = {name: hardware.onto(tensor, self.args.device) for name, tensor in batch.items()}
                with self.accelerator.no_sync(model) if left else nullcontext():
                    losses.append(plain(model, moved, num_items_in_batch))
            return torch.stack(losses).sum()

        loss = self.recovery.run(model, self.step, inputs, make)
        if self.first_step is None:
            self.first_step = round(time.monotonic() - started, 2)
        return loss

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
        self.validated.append(self.state.global_step)
        with self.meter.paused():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate(self.model).items()}
        self.log(dict(metrics))
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, which is no training time."""
        with self.saving(), self.meter.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a checkpoint, by process 0; of a model with a head only what learns, not the base again."""
        if not self.args.should_save:
            return
        if isinstance(self.model, Classifier | Mixture):
            learnt = self.model.learnt()
            state_dict = learnt if state_dict is None else {name: state_dict[name] for name in learnt}
        super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run folder says more, and trl's asks wandb for a URL."""
