"""What the machine computes with: threads, precision, and its description for the record."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import platform
import sys
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch
import transformers

from finsa.config import Train
from finsa.runs import provenance


def prepare(train: Train) -> None:
    """Set device, threads and the precision of float32 products once, and silence the libraries' advice."""
    take_own_device()
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    on_gpu = torch.cuda.is_available()
    fastest = "highest" if on_gpu else cpu_precision()  # on a GPU "high" computes in TF32, with 10 bits of fraction
    precision = fastest if train.matmul_precision == "auto" else train.matmul_precision
    torch.set_float32_matmul_precision(precision)
    if not on_gpu:
        # Under "medium" torch's fused attention calls oneDNN tile by tile and is 6 to 10 times as slow (measured).
        torch.backends.cuda.enable_flash_sdp(precision != "medium")  # the CPU's too, whatever the name says
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|peft)\b")


def cpu_precision() -> str:
    """The precision of float32 products that is fast on this CPU and stays float32-accurate.

    On AMD "medium" takes oneDNN's kernels in place of MKL's, and was twice as fast. On Intel MKL is as fast, the
    attention much faster, and with AMX "medium" would compute in bfloat16.
    """
    described = Path("/proc/cpuinfo")
    amd = described.is_file() and "AuthenticAMD" in described.read_text(encoding="utf-8", errors="replace")
    return "medium" if amd else "highest"


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
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return int(psutil.virtual_memory().total)


def peak_memory() -> int:
    """Most memory in use so far, in bytes: allocated by torch on a GPU, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return provenance.peak_memory()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    from accelerate.utils.memory import should_reduce_batch_size  # most processes never need it

    told = str(error)
    return "not enough memory: you tried to allocate" in told or (
        isinstance(error, Exception) and should_reduce_batch_size(error) and "CUDNN_STATUS_NOT_SUPPORTED" not in told
    )


def release_memory() -> None:
    """Give back what a failed attempt has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Give the freed blocks that glibc keeps back to the machine: what comes next has blocks of other sizes."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library has no such call
            ctypes.CDLL(None).malloc_trim(0)


# Factors and product of a timed matrix product, at most; this memory is outside of the plan and of the recovery.
TIMED_BYTES = 320 * 2**20


@cache
def matmul_rate(dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Operations per second of a matrix product on this device: the best of what fits into a moment.

    Shapes are those of a language model's layer; they grow until a product takes long enough to be timed, up to
    `TIMED_BYTES` of memory or to what is free. Measured once per process and type.

    Args:
        dtype: of both factors.
        seconds: that the measurement may take; it ends after the product that exceeds them.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        _timed_product(512, dtype, device)  # the first product loads the kernels, which takes longer than `seconds`
    best, size, least, started = 0.0, 512, math.inf, time.perf_counter()
    while (now := time.perf_counter()) - started < seconds:
        try:
            took = _timed_product(size, dtype, device)
        except (RuntimeError, MemoryError) as error:
            if not best or not out_of_memory(error):
                raise
            break
        best, least = max(best, 8 * size**3 / took), min(least, took)
        # The least time decides: on a busy machine a product of two threads may wait for one of them for long.
        if 17 * least < seconds - (now - started) and 9 * (2 * size) ** 2 * dtype.itemsize <= TIMED_BYTES:
            size, least = 2 * size, math.inf
    return best


def _timed_product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the second product of (size, size) and (size, 4 size)."""
    a, b = (torch.ones(size, width, dtype=dtype, device=device) for width in (size, 4 * size))
    if device.type == "cuda":  # constants take less power than data, and so run at a higher clock
        a, b = a.uniform_(), b.uniform_()
    _wait(a @ b)
    begun = time.perf_counter()
    _wait(a @ b)
    return time.perf_counter() - begun


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without making the host wait for the work that is queued there.

    From ordinary memory, CUDA copies only once everything queued before it is finished; from pinned memory the copy is
    queued as well.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, non_blocking=True)


def wait() -> None:
    """Wait until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
