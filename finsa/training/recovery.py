"""Out of memory in a training step: half the micro-batch, twice the accumulation, the same optimiser step.

A step that failed has left parts of its gradients behind. They are thrown away and its rows are cut anew, smaller; the
loss divides by the whole step's weight, so that smaller parts add up to the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from finsa.errors import RunError
from finsa.models import hardware
from finsa.training.batching import Cutter, Step

Batch = dict[str, torch.Tensor]


class Recovery:
    """Makes micro-batches smaller when one does not fit.

    Args:
        cut: makes micro-batches; it cuts smaller from then on.
        rows: of an optimiser step on this process.
        tell: takes the new sizes, each time they change.
        alone: whether this is the only process; of several, one that starts anew would leave the others waiting.
    """

    def __init__(self, cut: Cutter, rows: int, tell: Callable[[dict[str, float]], None], alone: bool) -> None:
        self.cut, self.rows, self.tell, self.alone = cut, rows, tell, alone
        self.halved = False

    def run(
        self, model: torch.nn.Module, step: Step, batches: list[Batch], make: Callable[[list[Batch]], torch.Tensor]
    ) -> torch.Tensor:
        """Make an optimiser step's forward and backward passes.

        Args:
            model: its gradients are dropped where the step is made again.
            step: its rows.
            batches: they, as they are cut now.
            make: adds the batches' gradients, and returns the step's loss.

        Raises:
            RunError: where a single row does not fit.
        """
        while True:
            failed = ""
            try:
                return make(batches)
            except (RuntimeError, MemoryError) as error:
                if not hardware.out_of_memory(error):
                    raise
                failed = str(error).splitlines()[0]
            self._shrink(step, failed)  # outside of the handler, whose traceback holds the tensors that did not fit
            model.zero_grad()
            hardware.release_memory()
            batches = self.cut(step)

    def _shrink(self, step: Step, failed: str) -> None:
        most = max(map(len, self.cut.groups(step)))
        if most == 1 or not self.alone:
            what = "one row" if most == 1 else f"{most} rows in one of several processes"
            longest = max(len(row["input_ids"]) for row in step.rows)
            raise RunError(
                f"out of memory at a micro-batch of {what}, {longest} tokens ({failed}). Set "
                f"{'' if most == 1 else 'train.micro_batch_size smaller, '}train.gradient_checkpointing=true, a "
                "smaller data.max_length or method.quantization=nf4; stage=check estimates what is needed. Where "
                "more memory is free, the same command with resume=true goes on from the last checkpoint"
            )
        self.halved = True
        self.cut.halve(most)
        self.tell(self.sizes())
        gc.collect()

    def sizes(self) -> dict[str, float]:
        """Rows of a micro-batch, or its padded tokens, and micro-batches of a step where rows say how many."""
        if self.cut.tokens is not None:
            return {"micro_batch_tokens": self.cut.tokens}
        return {"micro_batch_size": self.cut.rows, "accumulation": -(-self.rows // self.cut.rows)}

    def facts(self) -> dict[str, Any]:
        """What the run's record keeps."""
        return {**self.sizes(), "micro_batch_halved": self.halved}
