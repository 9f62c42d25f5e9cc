"""What the machine computes with: threads, precision, and its description for the record."""

from __future__ import annotations

import gc
import logging
import os
import platform
import resource
import sys
import time
import warnings
from functools import cache

import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size

from finsa.config import Train


def prepare(train: Train) -> None:
    """Set threads and the precision of float32 products once, and silence the libraries' advice."""
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    if not torch.cuda.is_available():
        # Measured on CPUs: "medium" picks the faster kernels; without AMX its result stays float32-accurate.
        torch.set_float32_matmul_precision(train.matmul_precision)
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|peft)\b")


def take_own_device() -> None:
    """Of several processes on a machine, let each have the GPU of its number."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def describe(dtype: torch.dtype) -> str:
    """Name device and type: ``cpu, 2 threads, float32``."""
    name = str(dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {name}"
    return f"{platform.processor() or platform.machine()} cpu, {torch.get_num_threads()} threads, {name}"


def memory() -> int:
    """Memory of the device that models run on, in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Most memory in use so far, in bytes: allocated by torch on a GPU, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error)
    return "not enough memory: you tried to allocate" in told or (
        isinstance(error, Exception) and should_reduce_batch_size(error) and "CUDNN_STATUS_NOT_SUPPORTED" not in told
    )


def release_memory() -> None:
    """Give back what a failed attempt has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@cache
def matmul_rate(dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Operations per second of a matrix product on this device: the best of what fits into a moment.

    Shapes are those of a language model's layer; they grow until a product takes long enough to be timed. Measured once
    per process and type.

    Args:
        dtype: of both factors.
        seconds: that the measurement may take; it ends after the product that exceeds them.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    best, size, started = 0.0, 256, time.perf_counter()
    while (now := time.perf_counter()) - started < seconds:
        a, b = (torch.ones(size, width, dtype=dtype, device=device) for width in (size, 4 * size))
        _wait(a @ b)
        begun = time.perf_counter()
        _wait(a @ b)
        took = time.perf_counter() - begun
        best = max(best, 8 * size**3 / took)
        if 17 * took < seconds - (now - started) and size < 8192:
            size *= 2
    return best


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
