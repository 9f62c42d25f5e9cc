"""A trainer whose trainings can be killed at any moment and go on as if nothing had been.

transformers resumes weights, optimiser, schedule and random states. What it leaves out is kept here: the order of rows
within an epoch, patience, the loss that is not logged yet, the tokens counted, and whether a training is finished.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, TrainerCallback

from finsa.errors import RunError, Stopped
from finsa.runs import files, processes
from finsa.training import checkpoints
from finsa.training.checkpoints import EPOCH, STATE, Checkpoint, Progress
from finsa.training.nan_guard import FiniteTrainer


class DurableTrainer(FiniteTrainer):
    """Saves whole, sealed checkpoints, and goes on from one exactly.

    Args:
        log: file whose end a checkpoint notes; None: there is none.
        resumed: what to go on from; `train` gets the same folder.
        stopped: tells the signal that asks for a checkpoint and an end; None while there is none.
        **kwargs: as SFTTrainer takes them.
    """

    tokens: torch.Tensor | int  # real tokens trained on

    def __init__(
        self,
        *,
        log: Path | None,
        resumed: Checkpoint | None,
        stopped: Callable[[], int | None],
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self.log_file, self.resumed, self.stopped = log, resumed, stopped
        self.before, self.started = resumed.progress.seconds if resumed else 0.0, time.monotonic()
        self.staging: Path | None = None
        super().__init__(callbacks=[_Keeper(self), *callbacks], **kwargs)
        self.place = Path(self.args.output_dir)

    @property
    def seconds(self) -> float:
        """Wall time of the training, earlier sittings included."""
        return self.before + time.monotonic() - self.started

    def restore(self) -> None:
        """Take up what a checkpoint holds besides what transformers reads of it."""
        if self.resumed is None:
            return
        known = self.resumed.progress
        self.tokens = known.tokens if processes.first() else 0  # they are added up over the processes
        self._tr_loss = torch.tensor(known.open_loss, device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = known.logged_loss, known.logged_step
        self._initial_global_step = 0
        self.state.best_model_checkpoint = None if self.resumed.best is None else str(self.resumed.best)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                kept = self.state.stateful_callbacks[type(callback).__name__]["attributes"]
                callback.early_stopping_patience_counter = kept["early_stopping_patience_counter"]

    def _run_epoch(self, **kwargs: Any) -> None:
        """Make an epoch's steps; the order of its rows is drawn from the random states it begins with."""
        if self.resumed and kwargs["epoch"] == kwargs["epochs_trained"]:
            if self.resumed.progress.over or self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
                return
            within = kwargs["steps_trained_in_current_epoch"] > 0
            self._load_rng_state(str(self.resumed.path / EPOCH if within else self.resumed.path))
        self.place.mkdir(parents=True, exist_ok=True)
        self._save_rng_state(str(self.place / EPOCH))
        super()._run_epoch(**kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; speeds of a whole training count all its sittings."""
        if self.resumed and "train_runtime" in logs:
            share = logs["train_runtime"] / max(self.seconds, 1e-9)
            logs["train_runtime"] = round(self.seconds, 4)
            logs |= {name: round(logs[name] * share, 3) for name in logs if name.endswith("_per_second")}
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, seal it, and rename it.

        Raises:
            RunError: where it cannot be written.
        """
        self.require_finite()
        try:
            self._write(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            if isinstance(error, RuntimeError) and "writ" not in reason:
                raise
            shutil.rmtree(self.place / f"{files.STAGING}{self._name()}", ignore_errors=True)
            raise RunError(
                f"{self.place / self._name()} cannot be written: {reason}. Earlier checkpoints are whole: make room, "
                "and repeat the command with resume=true"
            ) from None

    def _name(self) -> str:
        return f"checkpoint-{self.state.global_step}"

    def _write(self, model: Any, trial: Any) -> None:
        parent, wait = self.place / f"{files.STAGING}{self._name()}", self.accelerator.wait_for_everyone
        made, progress = parent / self._name(), self._progress()
        if self.args.should_save:
            shutil.rmtree(parent, ignore_errors=True)
        wait()
        self.staging = parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.staging = None
        wait()
        best = self.place / f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        self.state.best_model_checkpoint = None if best is None else str(best)
        if self.args.should_save:
            shutil.copytree(self.place / EPOCH, made / EPOCH)
            self.state.save_to_json(str(made / STATE))
            checkpoints.seal(made, progress)
            files.sync_tree(made)
            if self.log_file is not None and self.log_file.is_file():
                files.sync(self.log_file)
            files.move(made, self.place / made.name)
            shutil.rmtree(parent, ignore_errors=True)
            checkpoints.rotate(self.place, self.args.save_total_limit, best, self.place / made.name)
        wait()

    def _progress(self) -> Progress:
        return Progress(
            over=self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            tokens=int(processes.total(np.array([int(self.tokens)]))[0]),
            seconds=round(self.seconds, 3),
            open_loss=float(self.accelerator.gather(self._tr_loss.detach()).mean()),
            logged_loss=self._total_loss_scalar,
            logged_step=self._globalstep_last_logged,
            log_bytes=self.log_file.stat().st_size if self.log_file and self.log_file.is_file() else 0,
        )


class _Keeper(TrainerCallback):  # type: ignore[misc]
    """Restores what a checkpoint holds, and ends a training that was asked to end once it is saved."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last step of an epoch waits for the validation that follows, and is saved with it.
        if self.trainer.stopped() is not None and not control.should_training_stop and state.epoch % 1 != 0:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = self.trainer.stopped()
        if number is not None:
            raise Stopped(number, f"step {state.global_step} is saved")
