"""How many steps a fit takes. No torch here, so that a batch larger than the data is told at once."""

from __future__ import annotations

import math

from finsa.config import Train, divisor
from finsa.errors import ConfigError, Problem


def steps_of(train: Train, rows: int, world: int = 1) -> int:
    """Optimiser steps of a fit: every epoch's last, incomplete step counts.

    Raises:
        ConfigError: where a batch is larger than the data.
    """
    if train.batch_size > rows:
        text = f"{train.batch_size} is more than the {rows} training rows. Set train.batch_size={rows} or less"
        raise ConfigError([Problem("train.batch_size", text)])
    micro = -(-rows // (train.micro_batch_size * world))
    per_epoch = -(-micro // accumulation(train, world))
    return min(train.max_steps or 10**12, max(1, math.ceil(per_epoch * train.epochs)))


def accumulation(train: Train, world: int = 1) -> int:
    """Micro-batches per optimiser step and process.

    Raises:
        ConfigError: where the processes do not divide the batch.
    """
    per_process, rest = divmod(train.batch_size, train.micro_batch_size * world)
    if rest:
        text = f"{train.batch_size} is no multiple of micro_batch_size x processes = {train.micro_batch_size} x {world}"
        if train.batch_size % world == 0:
            text += f"; set train.micro_batch_size={divisor(train.batch_size // world, train.micro_batch_size)}"
        raise ConfigError([Problem("train.batch_size", text)])
    return per_process
