"""Several processes that run one job: who writes, what they agree on, and what happens when one of them is gone.

They are started by ``torchrun`` or ``accelerate launch``, whose variables say how many there are. Process 0 alone
writes run folder, trackers and terminal. What they tell each other are numbers and JSON, never pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finsa.config import RunConfig
from finsa.errors import ConfigError, Problem, RunError

if TYPE_CHECKING:  # a wrong option need not wait for it
    from numpy.typing import NDArray

SHARED = ("train", "evaluate", "predict", "rerun")  # stages that several processes can run
APART = ("predict",)  # of these, the ones whose processes meet in files alone


def world() -> int:
    """How many processes were started, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def rank() -> int:
    """Number of this process."""
    return int(os.environ.get("RANK") or "0") if world() > 1 else 0


def first() -> bool:
    """Whether this process writes."""
    return rank() == 0


def require(cfg: RunConfig) -> None:
    """Refuse what so many processes cannot do, before anything heavy is imported.

    Raises:
        ConfigError: with the command that fixes it.
    """
    stage, strategy, number = cfg.stage.name, cfg.train.strategy, world()
    if number > 1 and stage not in SHARED:
        text = f"{stage} runs in one process, and {number} were started: leave torchrun or accelerate launch out"
        raise ConfigError([Problem("stage", f"{text}. {', '.join(SHARED)} can be shared")])
    if stage != "train":
        return
    if number > 1 and strategy == "single":
        text = f"single is one process, and {number} were started: add train.strategy=ddp, or start with python run.py"
        raise ConfigError([Problem("train.strategy", text)])
    if number == 1 and strategy != "single":
        text = f"{strategy} needs several processes: torchrun --nproc-per-node 2 run.py train.strategy={strategy} ..."
        raise ConfigError([Problem("train.strategy", text)])


def require_as_many(run: Path, number: int | None) -> None:
    """Refuse to run a run again with another number of processes than made it: sums would come out otherwise.

    Args:
        run: its folder.
        number: of the processes that made it; None where an older version did not note it.

    Raises:
        ConfigError: with the command that starts as many.
    """
    if number in (None, world()):
        return
    made, start = ("1 process", "python")
    if number != 1:
        made, start = f"{number} processes", f"torchrun --nproc-per-node {number}"
    text = f"{run} was made by {made}, and {world()} started: {start} run.py stage=rerun run={run}"
    raise ConfigError([Problem("run", text)])


@contextmanager
def joined(cfg: RunConfig) -> Iterator[None]:
    """Let the processes of a job find each other; within, a lost one ends the job instead of a wait for ever.

    Raises:
        RunError: where another process is gone, or silent for longer than ``train.process_timeout`` seconds.
    """
    if world() == 1 or cfg.stage.name in APART:
        yield
        return
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=cfg.train.process_timeout))
        yield
    except (RuntimeError, ValueError) as error:
        if not _of_another(error):
            raise
        text = str(error).strip().splitlines()[-1][:200]
        raise RunError(
            f"process {rank()} of {world()} lost another one, which was stopped or failed ({text}). "
            "Look for the first error above; the same command with resume=true goes on from the last checkpoint"
        ) from error
    distributed.destroy_process_group()


def _of_another(error: Exception) -> bool:
    """Whether an error tells of another process rather than of this one."""
    from torch import distributed

    signs = ("Connection closed by peer", "Connection reset by peer", "gloo", "Gloo", "Timed out waiting", "NCCL")
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)


def together() -> bool:
    """Whether other processes run this very job with this one, so that work can be divided."""
    if world() == 1:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def agreed(value: Any) -> Any:
    """What process 0 has here, in all processes: anything that JSON can hold."""
    if not together():
        return value
    import torch

    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    torch.distributed.broadcast(size, 0)
    if not first():
        content = torch.empty(int(size), dtype=torch.uint8)
    torch.distributed.broadcast(content, 0)
    return json.loads(bytes(content.tolist()))


def any_of(number: int | None) -> int | None:
    """A number that any of the processes has, the largest; None where none has one."""
    if not together():
        return number
    import torch

    largest = torch.tensor([number or 0])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest) or None


def total(values: NDArray[Any]) -> NDArray[Any]:
    """The sum of an array over the processes; alone, the array itself."""
    if not together():
        return values
    import numpy as np
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(values))
    torch.distributed.all_reduce(tensor)
    return tensor.numpy()


def share(batches: list[list[int]]) -> list[tuple[list[int], bool]]:
    """This process's batches, as many in every process, and whether each counts.

    A model that is divided among processes computes in step with the others, so a process that has none left repeats
    the first batch, and what it finds there does not count. The batches are those of one process, so that every row is
    scored among the same neighbours and comes out the same, bit for bit.
    """
    if not together():
        return [(batch, True) for batch in batches]
    mine = [(batch, True) for batch in batches[rank() :: world()]]
    return mine + [(batch, False) for batch in batches[:1]] * (-(-len(batches) // world()) - len(mine))


def divided(model: Any) -> bool:
    """Whether a model's parameters lie in pieces on several processes (FSDP)."""
    return together() and any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Make what learns of a divided model whole, to be saved; nothing can be computed with it within."""
    import torch

    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # reading a state does so, and only the process that saves reads it
    pieces = [
        (module, name, piece)
        for module in model.modules()
        for name, piece in module._parameters.items()
        if piece is not None and piece.requires_grad and hasattr(piece, "full_tensor")
    ]
    full: dict[int, torch.nn.Parameter] = {}
    for module, name, piece in pieces:
        if id(piece) not in full:  # tied ones once
            full[id(piece)] = torch.nn.Parameter(piece.detach().full_tensor().cpu())
        module._parameters[name] = full[id(piece)]
    try:
        yield
    finally:
        for module, name, piece in pieces:
            module._parameters[name] = piece
