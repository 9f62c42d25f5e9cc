"""Out of memory in a training step: half the micro-batch, twice the accumulation, the same optimiser step.

A step that failed has left parts of its gradients behind. They are thrown away and the step's micro-batches so far are
made again, each in smaller parts; the loss divides by the whole step's weight, so that parts add up to the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from finsa.errors import RunError
from finsa.modeling import hardware

Batch = dict[str, torch.Tensor]


class Recovery:
    """Makes micro-batches smaller when one does not fit.

    Args:
        micro: rows of a micro-batch.
        accumulation: micro-batches of an optimiser step.
        suffix: number of label-tree tokens behind every row.
        tell: takes the new sizes, each time they change.
        alone: whether this is the only process; of several, one that starts anew would leave the others waiting.
    """

    def __init__(
        self, micro: int, accumulation: int, suffix: int, tell: Callable[[dict[str, float]], None], alone: bool
    ) -> None:
        self.micro, self.accumulation, self.suffix, self.tell, self.alone = micro, accumulation, suffix, tell, alone
        self.size = micro
        self._made: list[Batch] = []

    def begin(self) -> None:
        """Start an optimiser step."""
        self._made = []

    def step(self, model: torch.nn.Module, batch: Batch, run: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
        """Run a micro-batch forward and backward.

        Args:
            model: its gradients are dropped where the step is made again.
            batch: as the collator makes it.
            run: adds a batch's gradients, and returns its share of the step's loss.

        Returns:
            The micro-batch's share of the loss.

        Raises:
            RunError: where a single row does not fit.
        """
        self._made.append(batch)
        waiting = [batch]
        while True:
            failed = ""
            try:
                for each in waiting:
                    loss = torch.stack([run(part) for part in split(each, self.size, self.suffix)]).sum()
                return loss
            except (RuntimeError, MemoryError) as error:
                if not hardware.out_of_memory(error):
                    raise
                failed = str(error).splitlines()[0]
            self._shrink(batch, failed)  # outside of the handler, whose traceback holds the tensors that did not fit
            model.zero_grad()
            hardware.release_memory()
            waiting = list(self._made)

    def _shrink(self, batch: Batch, failed: str) -> None:
        rows = min(self.size, len(batch["lengths"]))
        if rows == 1 or not self.alone:
            what = "one row" if rows == 1 else f"{rows} rows in one of several processes"
            raise RunError(
                f"out of memory at a micro-batch of {what}, {batch['input_ids'].shape[1]} tokens ({failed}). Set "
                f"{'' if rows == 1 else 'train.micro_batch_size smaller, '}train.gradient_checkpointing=true, a "
                "smaller data.max_length or method.quantization=nf4; stage=check estimates what is needed. Where "
                "more memory is free, the same command with resume=true goes on from the last checkpoint"
            )
        self.size = -(-rows // 2)
        parts = -(-self.micro // self.size)
        self.tell({"micro_batch_size": self.size, "accumulation": self.accumulation * parts})
        gc.collect()


def split(batch: Batch, size: int, suffix: int) -> list[Batch]:
    """Divide a batch into parts of at most `size` rows, each padded to its own longest row only."""
    rows = len(batch["lengths"])
    if rows <= size:
        return [batch]
    parts = []
    for start in range(0, rows, size):
        part = {name: value[start : start + size] for name, value in batch.items()}
        longest = int(part["lengths"].max()) + suffix
        parts.append(part | {name: part[name][:, :longest] for name in ("input_ids", "labels")})
    return parts


def facts(recovery: Recovery) -> dict[str, Any]:
    """What the run's record keeps."""
    return {
        "micro_batch_size": recovery.size,
        "accumulation": recovery.accumulation * -(-recovery.micro // recovery.size),
        "micro_batch_halved": recovery.size < recovery.micro,
    }
