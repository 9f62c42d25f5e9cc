"""The machine that models run on: device, threads, precision, memory and speed."""

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
    """Set device, threads and the precision of float32 products, and silence the libraries' warnings."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # one GPU for each process on this machine
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    on_gpu = torch.cuda.is_available()
    fastest = "highest" if on_gpu else cpu_precision()  # on a GPU "high" computes in TF32, with 10 bits of fraction
    precision = fastest if train.matmul_precision == "auto" else train.matmul_precision
    torch.set_float32_matmul_precision(precision)
    if not on_gpu:
        # Under "medium" torch's fused attention calls oneDNN tile by tile and is 6 to 10 times as slow (measured).
        torch.backends.cuda.enable_flash_sdp(precision != "medium")  # despite its name, for the CPU as well
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|peft)\b")


def cpu_precision() -> str:
    """The fastest precision of float32 products on this CPU that keeps float32 accuracy.

    On AMD "medium" selects oneDNN's kernels instead of MKL's and was twice as fast. On Intel MKL is as fast, attention
    is much faster, and with AMX "medium" would compute in bfloat16.
    """
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "medium" if amd else "highest"


def describe(dtype: torch.dtype) -> str:
    """Device and dtype in words, such as ``x86_64 cpu, 2 threads, float32``."""
    name = str(dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {name}"
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()} cpu, {threads} thread{'s' * (threads > 1)}, {name}"


def total_memory() -> int:
    """Memory of the device that models run on, in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return int(psutil.virtual_memory().total)


def peak_memory() -> int:
    """Peak memory so far, in bytes: allocated by torch on a GPU, otherwise resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return provenance.peak_memory()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU or CPU ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    from accelerate.utils.memory import should_reduce_batch_size  # imported late: rarely needed

    message = str(error)
    return "not enough memory: you tried to allocate" in message or (
        isinstance(error, Exception) and should_reduce_batch_size(error) and "CUDNN_STATUS_NOT_SUPPORTED" not in message
    )


def release_memory() -> None:
    """Free the memory that a failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return the freed blocks that glibc keeps to the system, before allocations of other sizes follow."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # other C libraries lack this function
            ctypes.CDLL(None).malloc_trim(0)


# Maximal size of the factors and the product together; neither the memory plan nor the OOM recovery accounts for it.
TIMED_BYTES = 320 * 2**20


@cache
def matmul_rate(dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Measure the FLOP/s of a matrix product on this device, once per process and dtype: the best of several.

    Shapes are those of a language model's layer; they grow until a product takes long enough to be timed, up to
    `TIMED_BYTES` or the free memory.

    Args:
        dtype: dtype of both factors.
        seconds: duration of the measurement; it ends after the product that exceeds it.
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
        # By the minimum, because on a busy machine a product may wait long for one of its threads.
        if 17 * least < seconds - (now - started) and 9 * (2 * size) ** 2 * dtype.itemsize <= TIMED_BYTES:
            size, least = 2 * size, math.inf
    return best


def _timed_product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds that a second product of (size, size) and (size, 4 size) takes."""
    a, b = (torch.ones(size, width, dtype=dtype, device=device) for width in (size, 4 * size))
    if device.type == "cuda":  # constants take less power than data, and so run at a higher clock
        a, b = a.uniform_(), b.uniform_()
    torch.matmul(a, b)
    synchronize()
    begun = time.perf_counter()
    torch.matmul(a, b)
    synchronize()
    return time.perf_counter() - begun


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the work that is queued there.

    CUDA copies from pageable memory only after all queued work has finished; a copy from pinned memory is queued.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, non_blocking=True)


def synchronize() -> None:
    """Wait until the device has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
