"""Several processes that run one job, started by ``torchrun`` or ``accelerate launch``.

Process 0 alone writes to the run folder, the trackers and the terminal. Processes exchange only numbers and JSON, never
pickles.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finsa.config import RunConfig
from finsa.errors import ConfigError, Problem, RunError

if TYPE_CHECKING:  # a wrong option need not wait for it
    from numpy.typing import NDArray

DISTRIBUTED = ("train", "evaluate", "predict", "rerun")  # stages that several processes can run
INDEPENDENT = ("predict",)  # of these, the ones whose processes communicate through files only

# Environment variables by which libraries print and report less.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of loading; hub.cache_alone shows those of downloads
}


def quiet() -> None:
    """Set the variables of `QUIET` that the user has not set."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def world_size() -> int:
    """Number of processes, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def rank() -> int:
    """Number of this process."""
    return int(os.environ.get("RANK") or "0") if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is process 0, which writes the results."""
    return rank() == 0


def require(cfg: RunConfig) -> None:
    """Refuse what this number of processes cannot do, before anything heavy is imported.

    Raises:
        ConfigError: with the command that fixes it.
    """
    stage, strategy, number = cfg.stage.name, cfg.train.strategy, world_size()
    if number > 1 and stage not in DISTRIBUTED:
        text = f"{stage} runs in one process, but {number} were started: leave out torchrun or accelerate launch"
        raise ConfigError([Problem("stage", f"{text}. {', '.join(DISTRIBUTED)} can use several processes")])
    if number > 1 and getattr(cfg.stage, "engine", "local") == "ray":
        text = f"ray starts the workers itself, but {number} processes were started: leave out torchrun, or this key"
        raise ConfigError([Problem("stage.engine", text)])
    if stage != "train":
        return
    if number > 1 and strategy == "single":
        text = f"single is one process, but {number} were started: add train.strategy=ddp, or start with python run.py"
        raise ConfigError([Problem("train.strategy", text)])
    if number == 1 and strategy != "single":
        text = f"{strategy} needs several processes: torchrun --nproc-per-node 2 run.py train.strategy={strategy} ..."
        raise ConfigError([Problem("train.strategy", text)])


def require_cluster(address: str, key: str) -> None:
    """Check that the head of a Ray cluster can be reached: Ray itself would try for minutes.

    Args:
        address: ``<host>:<port>``; others are ``auto``, where Ray knows at once, and ``local``.
        key: of the address, for the message.

    Raises:
        ConfigError: if nothing accepts connections there.
    """
    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"no Ray cluster at {address} ({reason}). Start its head with: ray start --head --port={port}"
        raise ConfigError([Problem(key, text)]) from None


def require_world_size(run: Path, number: int | None) -> None:
    """Refuse to repeat a run with a different number of processes: sums would be rounded differently.

    Args:
        run: its folder.
        number: of processes that the run had; None: an older version did not record it.

    Raises:
        ConfigError: with the command that starts the same number.
    """
    if number in (None, world_size()):
        return
    had, start = ("1 process", "python")
    if number != 1:
        had, start = f"{number} processes", f"torchrun --nproc-per-node {number}"
    text = f"{run} was run with {had}, not {world_size()}: {start} run.py stage=rerun run={run}"
    raise ConfigError([Problem("run", text)])


@contextmanager
def process_group(cfg: RunConfig) -> Iterator[None]:
    """Connect the processes of a job; if one of them is lost, the job ends instead of waiting forever.

    Raises:
        RunError: if another process has ended, or has not responded for ``train.process_timeout`` seconds.
    """
    if world_size() == 1 or cfg.stage.name in INDEPENDENT:
        yield
        return
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=cfg.train.process_timeout))
        yield
    except (RuntimeError, ValueError) as error:
        signs = ("Connection closed by peer", "Connection reset by peer", "gloo", "Gloo", "Timed out waiting", "NCCL")
        if not isinstance(error, distributed.DistError) and not any(sign in str(error) for sign in signs):
            raise
        text = str(error).strip().splitlines()[-1][:200]
        raise RunError(
            f"process {rank()} of {world_size()} lost the connection to another one, which was stopped or failed "
            f"({text}). Look for the first error above; the same command with resume=true resumes from the last "
            "checkpoint"
        ) from error
    distributed.destroy_process_group()


def is_distributed() -> bool:
    """Whether other processes run this job too, so that work can be divided among them."""
    if world_size() == 1:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def broadcast(value: Any) -> Any:
    """Send a JSON value from process 0 to all processes, and return it."""
    if not is_distributed():
        return value
    import torch

    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    torch.distributed.broadcast(size, 0)
    if not is_main():
        content = torch.empty(int(size), dtype=torch.uint8)
    torch.distributed.broadcast(content, 0)
    return json.loads(bytes(content.tolist()))


def maximum(number: int | None) -> int | None:
    """The largest of the numbers of all processes; None if no process has one."""
    if not is_distributed():
        return number
    import torch

    largest = torch.tensor([number or 0])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest) or None


def all_reduce(values: NDArray[Any]) -> NDArray[Any]:
    """Sum an array over all processes."""
    if not is_distributed():
        return values
    import numpy as np
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(values))
    torch.distributed.all_reduce(tensor)
    return tensor.numpy()


def shard(batches: list[list[int]]) -> list[tuple[list[int], bool]]:
    """Select the batches of this process; every process gets the same number of them.

    The processes of a sharded model must run the same number of forward passes. So a process that has no batch left
    repeats the first one, and its result does not count. The batches are those of a single process: every row is scored
    next to the same rows, so the result is the same bit by bit.

    Returns:
        The batches, each with whether it counts.
    """
    if not is_distributed():
        return [(batch, True) for batch in batches]
    selected = [(batch, True) for batch in batches[rank() :: world_size()]]
    return selected + [(batch, False) for batch in batches[:1]] * (-(-len(batches) // world_size()) - len(selected))


def is_sharded(model: Any) -> bool:
    """Whether the parameters of a model are sharded over several processes (FSDP)."""
    return is_distributed() and any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextmanager
def gathered_parameters(model: Any) -> Iterator[None]:
    """Replace the trainable parameters of a sharded model by full ones, to save them; forward passes are impossible."""
    import torch

    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # reading the state dict does so, and only the process that saves reads it
    shards = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad and hasattr(parameter, "full_tensor")
    ]
    full: dict[int, torch.nn.Parameter] = {}
    for module, name, parameter in shards:
        if id(parameter) not in full:  # tied parameters are gathered once
            full[id(parameter)] = torch.nn.Parameter(parameter.detach().full_tensor().cpu())
        module._parameters[name] = full[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in shards:
            module._parameters[name] = parameter
