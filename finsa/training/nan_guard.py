"""A trainer that stops at the first loss or gradient that is no number, before it spoils a weight.

On a GPU a look at every step would make the host wait for it. There a flag on the device makes the optimiser skip its
steps from the first bad one on, and the host looks when it logs or saves; so weights and optimiser are still those from
before the bad step. On a CPU the look costs nothing and is taken at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from finsa.errors import FinsaError
from finsa.runs import files, processes
from finsa.training.batching import Cutter, Step

REPORT = "not_finite.json"


class FiniteTrainer(SFTTrainer):  # type: ignore[misc]
    """Stops with the rows that make a loss or gradient infinite, or no number.

    Args:
        identify: gives a training row's id by its number.
        cut: makes micro-batches of an optimiser step.
        **kwargs: as SFTTrainer takes them.
    """

    def __init__(self, *, identify: Callable[[int], str], cut: Cutter, **kwargs: Any) -> None:
        self.identify, self.cut = identify, cut
        self.recent: list[tuple[int, float, list[int]]] = []  # step, epoch before it, rows; since the last look
        super().__init__(**kwargs)
        self.args.logging_nan_inf_filter = False  # it would hide what is looked for, and waits for the device
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self.first_bad = torch.full((), -1, device=self.args.device)

    def note(self, numbers: list[int]) -> None:
        """Note which rows the next step is made of."""
        self.recent.append((self.state.global_step + 1, self.state.epoch or 0.0, numbers))

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Make a micro-batch's forward and backward, and look at its loss."""
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.bad_loss = self.bad_loss | ~torch.isfinite(loss)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; from the first bad step on the optimiser makes none."""
        norm = super()._clip_grad_norm(model)
        plain = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = self.bad_loss | ~torch.isfinite(torch.as_tensor(plain, device=self.bad_loss.device))
        step = self.state.global_step + 1
        self.first_bad = torch.where((self.first_bad < 0) & bad, step, self.first_bad)
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if getattr(inner, "_step_supports_amp_scaling", False):
            inner.found_inf = (self.first_bad >= 0).float()
        if self.args.device.type == "cpu":
            self.require_finite()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Look before a loss is logged."""
        if "loss" in logs:
            self.require_finite()
        super().log(logs, start_time)

    def require_finite(self) -> None:
        """Stop where a step since the last look was bad.

        Raises:
            FinsaError: naming step and rows; a checkpoint from before the step is saved.
        """
        step = int(self.first_bad)
        if step < 0:
            self.recent.clear()
            return
        known = [(epoch, rows) for number, epoch, rows in self.recent if number == step]
        self.first_bad.fill_(-1)
        self.bad_loss.fill_(False)
        self.recent.clear()
        numbers = [row for _, rows in known for row in rows]
        saved = self._save_before(step, known[0][0] if known else 0.0)
        found = self._rows(numbers)
        bad = [row for row in found if not row["finite"]]
        file = Path(self.args.output_dir) / REPORT
        if processes.first():
            files.write_text(file, json.dumps({"step": step, "rows": found}, ensure_ascii=False, indent=1) + "\n")
        shown = ", ".join(row["id"] for row in bad[:5]) or "none alone; the whole step is too large"
        raise FinsaError(
            f"training: loss or gradient of step {step} is infinite or no number. Rows: {shown} ({len(bad)} of "
            f"{len(found)}, {file}). {saved}. Look at these rows, or lower train.learning_rate"
        )

    def _save_before(self, step: int, epoch: float) -> str:
        """Save what was there before a step, where it is of the epoch that is going on."""
        self.model.zero_grad()
        if int(epoch) != int(self.state.epoch or 0.0) or step == 1:
            return "Checkpoints up to then are whole"
        if self.state.global_step != step - 1:  # seen late: the optimiser has made no step since, the schedule has
            self.state.global_step, self.state.epoch = step - 1, epoch
            self.lr_scheduler.step(step - 1)
        if not (Path(self.args.output_dir) / f"checkpoint-{step - 1}").is_dir():
            self._save_checkpoint(self.model, None)
        return f"Step {step - 1} is saved"

    def _rows(self, numbers: list[int]) -> list[dict[str, Any]]:
        """The loss of each row alone, and whether it and its gradient are numbers."""
        found = []
        self.model.eval()
        for number in numbers:
            (batch,) = self.cut(Step([self.train_dataset[number]]))
            batch = self._prepare_inputs(batch)
            self.model.zero_grad()
            loss = self.compute_loss(self.model, batch)
            loss.backward()
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            finite = bool(torch.isfinite(loss)) and all(bool(torch.isfinite(grad).all()) for grad in grads)
            found.append({"row": number, "id": self.identify(number), "loss": float(loss.detach()), "finite": finite})
        self.model.zero_grad()
        self.model.train()
        return found
