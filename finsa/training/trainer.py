"""The trainer: trl's SFTTrainer on tokenized rows, with exact resuming and a stop at the first non-finite loss.

A checkpoint of transformers contains weights, optimizer, schedule and random states. `FinsaTrainer` also restores the
order of the rows within an epoch, patience, the loss not logged yet, the token count, and whether training is over.

On a GPU, checking every step for a non-finite loss would synchronize with the device. There a flag on the device makes
the optimizer skip its steps from the first bad one on, and the host reads the flag when it logs or saves; so weights
and optimizer are still those from before the bad step. On a CPU every step is checked immediately, at no cost.

These private methods of transformers' Trainer are overridden, for which transformers and trl are pinned to a minor
version: `_get_train_sampler`, `_run_epoch`, `_clip_grad_norm`, `_save_checkpoint`, `_save`. Each gives its reason.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTTrainer

from finsa.errors import FinsaError, RunError, Stopped
from finsa.models import hardware
from finsa.models.classifier import Classifier
from finsa.models.moe.mixture import Mixture
from finsa.runs import files, processes
from finsa.training import checkpoints, distributed
from finsa.training.batches import Batch, Step, StepSplitter
from finsa.training.checkpoints import EPOCH, STATE, Checkpoint, Progress
from finsa.training.objective import Objective
from finsa.training.progress import Meter

NOT_FINITE = "not_finite.json"  # losses of the rows of a step that was not finite


class FinsaTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains on tokenized rows. For transformers a batch is a whole optimizer step, which is split here.

    Args:
        objective: of a step.
        splitter: splits a step into micro-batches, which are halved if memory does not suffice.
        validate: called with the model; its metrics select the checkpoint.
        pause: entered while a checkpoint is written.
        rows: number of real rows; further rows of the data set are padding with weight 0.
        lr_ratio: learning rate of LoRA's B over that of A (LoRA+, Hayou et al. 2024).
        log_file: file whose length is recorded in checkpoints; None if there is none.
        resumed: checkpoint to resume from; its folder is also passed to `train`.
        stopped: gives the signal that asks to save and stop; None while there is none.
        identify: returns the id of a training row by its number, for messages.
        on_smaller: called with the new sizes when micro-batches become smaller.
        **kwargs: as SFTTrainer takes them.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` has divided by the weight of the whole step

    def __init__(
        self,
        *,
        objective: Objective,
        splitter: StepSplitter,
        validate: Callable[[torch.nn.Module], dict[str, float]],
        pause: Callable[[], AbstractContextManager[None]],
        rows: int,
        lr_ratio: float,
        log_file: Path | None,
        resumed: Checkpoint | None,
        stopped: Callable[[], int | None],
        identify: Callable[[int], str],
        on_smaller: Callable[[dict[str, float]], None],
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self.objective, self.splitter, self.validate, self.pause = objective, splitter, validate, pause
        self.rows, self.lr_ratio, self.log_file, self.resumed = rows, lr_ratio, log_file, resumed
        self.stopped, self.identify, self.on_smaller = stopped, identify, on_smaller
        self.step, self.halved = Step([]), False
        self.tokens = 0  # real tokens trained on, counted on the host, so that no step synchronizes with the device
        self.validated: list[int] = []  # steps at which this process has validated
        self.recent: list[tuple[int, float, list[int]]] = []  # steps since the last check: number, epoch before, rows
        self.seconds_before, self.started = resumed.progress.seconds if resumed else 0.0, time.monotonic()
        trainable = [(p, p.data) for p in kwargs["model"].parameters() if p.requires_grad]
        super().__init__(callbacks=[_Resume(self), *callbacks], **kwargs)
        for parameter, data in trainable:
            parameter.data = data  # trl casts adapters of a quantized model to bfloat16; they stay in float32 here
        self.args.logging_nan_inf_filter = False  # it would hide non-finite losses, and synchronizes with the device
        self.folder = Path(self.args.output_dir)
        self.has_bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self.first_bad_step = torch.full((), -1, device=self.args.device)
        self.meter = Meter(kwargs["model"], len(objective.suffix), self.args.activation_checkpointing)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, which supports FSDP on a CPU too."""
        super().create_accelerator_and_postprocess()
        distributed.allow_fsdp_on_cpu(self)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer; with LoRA+ the matrices B are in parameter groups with a different learning rate."""
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

    # ------------------------------------------------------------------------------------------------ a step

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Sample the order of the rows.

        Private, because no argument makes several processes use one order, and padding rows come last (test_steps).
        """
        sampler = super()._get_train_sampler(self.train_dataset.select(range(self.rows)))
        return distributed.same_order(sampler, len(self.train_dataset))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | None]:
        """Fetch a step, split into micro-batches, and the sum of its weights over all processes."""
        step: Step | None = next(epoch_iterator, None)
        if step is None:
            return [], None
        real = [row for row in step.rows if row["row"] < self.rows]
        self.tokens += sum(len(row["input_ids"]) for row in real)
        self.recent.append((self.state.global_step + 1, self.state.epoch or 0.0, [row["row"] for row in real]))
        self.step, batches = step, self.splitter(step)
        self.meter.count(real, batches)
        weight = hardware.to_device(torch.stack([self.objective.weight(batch) for batch in batches]).sum(0), device)
        return [batches], self.accelerator.gather(weight).view(-1, *weight.shape).sum(0)

    def training_step(
        self, model: torch.nn.Module, inputs: list[Batch], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward passes of a step; if memory does not suffice, repeated with half the micro-batch.

        Returns:
            The step's loss, as this process sees it.

        Raises:
            RunError: if a single row does not fit.
        """
        batches = inputs
        while True:
            try:
                return self._accumulate(model, batches, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:
                if not hardware.out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Outside of the handler, whose traceback references the failed tensors. The loss is divided by the weight
            # of the whole step, so that smaller micro-batches add up to the same gradients.
            self._halve_micro_batch(reason)
            model.zero_grad()
            hardware.release_memory()
            batches = self.splitter(self.step)

    def _accumulate(self, model: torch.nn.Module, batches: list[Batch], weight: Any) -> torch.Tensor:
        """Forward and backward passes of all micro-batches; processes exchange gradients at the last one."""
        losses = []
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            self.accelerator.gradient_state._set_sync_gradients(left == 0)
            moved = {name: hardware.to_device(tensor, self.args.device) for name, tensor in batch.items()}
            with self.accelerator.no_sync(model) if left else nullcontext():
                losses.append(super().training_step(model, moved, weight))
        loss = torch.stack(losses).sum()
        self.has_bad_loss = self.has_bad_loss | ~torch.isfinite(loss)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Divide the loss by the weight of the whole step, over all processes and micro-batches."""
        loss = self.objective.total(model, inputs)
        if num_items_in_batch is None:
            return (loss / self.objective.weight(inputs)).sum()
        # DDP averages gradients over processes, while the weight is already that of all of them.
        return (loss / num_items_in_batch).sum() * self.accelerator.num_processes

    def _halve_micro_batch(self, reason: str) -> None:
        """Halve the micro-batch from now on; with several processes stop instead, because the others would wait."""
        most = max(map(len, self.splitter.groups([len(row["input_ids"]) for row in self.step.rows])))
        if most == 1 or processes.world_size() > 1:
            size = "one row" if most == 1 else f"{most} rows in one of several processes"
            longest = max(len(row["input_ids"]) for row in self.step.rows)
            raise RunError(
                f"out of memory at a micro-batch of {size}, {longest} tokens ({reason}). Set "
                f"{'' if most == 1 else 'a smaller train.micro_batch_size, '}train.gradient_checkpointing=true, a "
                "smaller data.max_length or method.quantization=nf4; stage=check estimates the memory. When "
                "more memory is free, the same command with resume=true resumes from the last checkpoint"
            )
        self.splitter.rows, self.halved = -(-most // 2), True
        self.on_smaller(self.sizes())
        gc.collect()

    def sizes(self) -> dict[str, float]:
        """Rows of a micro-batch, and micro-batches of a step of this process."""
        rows = self.args.per_device_train_batch_size
        return {"micro_batch_size": self.splitter.rows, "accumulation": -(-rows // self.splitter.rows)}

    # ------------------------------------------------------------------------------------------------ non-finite losses

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip gradients; from the first non-finite step on, the optimizer skips its steps.

        Private, because only here the norm is known before the optimizer's step, and computing it twice is costly
        (test_checkpoints: a loss that is not finite).
        """
        norm = super()._clip_grad_norm(model)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = self.has_bad_loss | ~torch.isfinite(torch.as_tensor(whole, device=self.has_bad_loss.device))
        step = self.state.global_step + 1
        self.first_bad_step = torch.where((self.first_bad_step < 0) & bad, step, self.first_bad_step)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # a fused optimizer reads the flag on the device
            optimizer.found_inf = (self.first_bad_step >= 0).float()
        if self.args.device.type == "cpu":
            self.require_finite()
        return norm

    def require_finite(self) -> None:
        """Stop if a step since the last check was not finite.

        Raises:
            FinsaError: with the step and its rows; a checkpoint from before the step is saved.
        """
        step = int(self.first_bad_step)
        if step < 0:
            self.recent.clear()
            return
        epoch, numbers = next(((epoch, rows) for number, epoch, rows in self.recent if number == step), (0.0, []))
        self.first_bad_step.fill_(-1)
        self.has_bad_loss.fill_(False)
        self.recent.clear()
        saved = self._save_before(step, epoch)
        rows = self._row_losses(numbers)
        bad = [row for row in rows if not row["finite"]]
        file = self.folder / NOT_FINITE
        if processes.is_main():
            files.write_text(file, json.dumps({"step": step, "rows": rows}, ensure_ascii=False, indent=1) + "\n")
        names = ", ".join(row["id"] for row in bad[:5]) or "none by itself; the step as a whole is not finite"
        raise FinsaError(
            f"training: loss or gradient of step {step} is not finite. Rows: {names} ({len(bad)} of {len(rows)}, "
            f"{file}). {saved}. Inspect these rows, or lower train.learning_rate"
        )

    def _save_before(self, step: int, epoch: float) -> str:
        """Save the state before a step, if the step is of the current epoch, and describe what is saved."""
        self.model.zero_grad()
        if int(epoch) != int(self.state.epoch or 0.0) or step == 1:
            return "Checkpoints up to then are intact"
        if self.state.global_step != step - 1:  # since the bad step, the schedule has advanced, but not the optimizer
            self.state.global_step, self.state.epoch = step - 1, epoch
            self.lr_scheduler.step(step - 1)
        if not (self.folder / f"checkpoint-{step - 1}").is_dir():
            self._save_checkpoint(self.model, None)
        return f"Step {step - 1} is saved"

    def _row_losses(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Loss of each row by itself, and whether loss and gradient are finite."""
        results = []
        self.model.eval()
        for number in numbers:
            (batch,) = self.splitter(Step([self.train_dataset[number]]))
            self.model.zero_grad()
            loss = self.compute_loss(self.model, self._prepare_inputs(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            finite = bool(torch.isfinite(loss)) and all(bool(torch.isfinite(grad).all()) for grad in grads)
            results.append({"row": number, "id": self.identify(number), "loss": float(loss.detach()), "finite": finite})
        self.model.zero_grad()
        self.model.train()
        return results

    # ------------------------------------------------------------------------------------------------ log, validation

    @property
    def seconds(self) -> float:
        """Wall time of the training, including the time before it was resumed."""
        return self.seconds_before + time.monotonic() - self.started

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a record; losses are checked first, and throughput includes the time before the training was resumed."""
        if "loss" in logs:
            self.require_finite()
        if self.resumed and "train_runtime" in logs:
            share = logs["train_runtime"] / max(self.seconds, 1e-9)
            logs["train_runtime"] = round(self.seconds, 4)
            logs |= {name: round(logs[name] * share, 3) for name in logs if name.endswith("_per_second")}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Validate with finsa's scorer instead of a loss over padded batches."""
        self.validated.append(self.state.global_step)
        with self.meter.paused():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate(self.model).items()}
        self.log(dict(metrics))
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _run_epoch(self, **kwargs: Any) -> None:
        """Run an epoch; the random states at its beginning determine the order of its rows.

        Private, because these must be saved and restored before the rows are sampled, and because a training that is
        over must not validate again (test_checkpoints: a training that was stopped).
        """
        if self.resumed and kwargs["epoch"] == kwargs["epochs_trained"]:
            if self.resumed.progress.over or self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
                return
            within = kwargs["steps_trained_in_current_epoch"] > 0
            self._load_rng_state(str(self.resumed.path / EPOCH if within else self.resumed.path))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save_rng_state(str(self.folder / EPOCH))
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint to a staging folder, seal it, and move it to its final place.

        Private, because transformers writes in place and removes older checkpoints before the new one is sealed
        (test_checkpoints: a full disk, damaged checkpoints).

        Raises:
            RunError: if it cannot be written.
        """
        with self.pause(), self.meter.paused():
            self.require_finite()
            name = f"checkpoint-{self.state.global_step}"
            staging = self.folder / f"{files.STAGING}{name}"
            try:
                self._write_checkpoint(staging, name, model, trial)
            except (OSError, SafetensorError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                if isinstance(error, RuntimeError) and "writ" not in reason:
                    raise
                shutil.rmtree(staging, ignore_errors=True)
                raise RunError(
                    f"{self.folder / name} cannot be written: {reason}. Earlier checkpoints are intact: free disk "
                    "space, and repeat the command with resume=true"
                ) from None

    def _write_checkpoint(self, staging: Path, name: str, model: Any, trial: Any) -> None:
        staged, wait = staging / name, self.accelerator.wait_for_everyone
        progress = Progress(
            over=self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            tokens=int(processes.all_reduce(np.array([int(self.tokens)]))[0]),
            seconds=round(self.seconds, 3),
            open_loss=float(self.accelerator.gather(self._tr_loss.detach()).mean()),
            logged_loss=self._total_loss_scalar,
            logged_step=self._globalstep_last_logged,
            log_bytes=self.log_file.stat().st_size if self.log_file and self.log_file.is_file() else 0,
        )
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        wait()
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(self.folder)
        wait()
        best = self.folder / f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        self.state.best_model_checkpoint = None if best is None else str(best)
        if self.args.should_save:
            shutil.copytree(self.folder / EPOCH, staged / EPOCH)
            self.state.save_to_json(str(staged / STATE))
            checkpoints.seal(staged, progress)
            files.sync_tree(staged)
            if self.log_file is not None and self.log_file.is_file():
                files.sync(self.log_file)
            files.move(staged, self.folder / name)
            shutil.rmtree(staging, ignore_errors=True)
            checkpoints.rotate(self.folder, self.args.save_total_limit, best, self.folder / name)
        wait()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the weights of a checkpoint, by process 0.

        Private, because `save_model` gathers the shards of a sharded model and then calls this. Of a model with a
        classification head or a router, only what was trained is written, not the base (test_moe_joint).
        """
        if not self.args.should_save:
            return
        if isinstance(self.model, Classifier | Mixture):
            learned = self.model.trainable_state()
            state_dict = learned if state_dict is None else {name: state_dict[name] for name in learned}
        super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: the run folder has one, and that of trl queries wandb."""

    def restore(self) -> None:
        """Restore the state from the manifest of a checkpoint."""
        if self.resumed is None:
            return
        progress = self.resumed.progress
        self.tokens = progress.tokens if processes.is_main() else 0  # they are summed over the processes
        self._tr_loss = torch.tensor(progress.open_loss, device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = progress.logged_loss, progress.logged_step
        self._initial_global_step = 0
        self.state.best_model_checkpoint = None if self.resumed.best is None else str(self.resumed.best)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = self.state.stateful_callbacks[type(callback).__name__]["attributes"]
                callback.early_stopping_patience_counter = saved["early_stopping_patience_counter"]


class _Resume(TrainerCallback):  # type: ignore[misc]
    """Restores the state of a resumed training, and saves and stops on a signal."""

    def __init__(self, trainer: FinsaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last step of an epoch waits for the validation at its end, if there is one, and is saved with it.
        follows = state.epoch % 1 == 0 and args.eval_strategy == "epoch"
        if self.trainer.stopped() is not None and not control.should_training_stop and not follows:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = self.trainer.stopped()
        if number is not None:
            raise Stopped(number, f"step {state.global_step} is saved")
